"""What a declared step is as a Celery task."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from celery import Celery, Task, chain, chord, group
from celery.app.trace import build_tracer
from celery.exceptions import Reject, Retry
from celery.utils.time import rate
from kombu import Queue
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, text

from orchestrator import Orchestrator, PayloadError, UsageError, saga, step, testing
from orchestrator.celery.doorbell import DRAIN
from orchestrator.step import StepContext, current_step


def test_a_step_has_its_queue_and_options_without_a_warning_of_celery() -> None:
    with Celery("registers", broker="memory://", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://host/db")
        with warnings.catch_warnings():
            warnings.simplefilter("error")

            @step(name="registers.declared", queue="fast", rate_limit="3/s", throws=(KeyError,))
            def declared() -> None: ...

        task = app.tasks["registers.declared"]
        assert (task.queue, task.rate_limit, task.throws) == ("fast", "3/s", (KeyError,))


def test_an_app_has_one_orchestrator() -> None:
    """A second would start a second companion in each worker, and take the settings of the first out of use."""
    with Celery("twice", broker="memory://", set_as_current=False) as app:
        first = Orchestrator(app, database_url="postgresql://host/db")
        with pytest.raises(UsageError, match="app 'twice' has an Orchestrator already"):
            Orchestrator(app, database_url="postgresql://host/other")
        assert getattr(app, "orchestrator", None) is first


def test_sagas_that_go_to_another_database_than_before_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def bind(name: str, database: str) -> tuple[Celery, list[str]]:
        caplog.clear()
        app = Celery(name, broker="memory://", set_as_current=False)
        Orchestrator(app, database_url=f"postgresql://ann:secret@host/{database}")
        return app, [message for message in caplog.messages if "than app 'several_" in message]

    first, none = bind("several_first", "db")
    same, neither = bind("several_same", "db")
    other, warned = bind("several_other", "elsewhere")
    for app in (first, same, other):
        app.close()
    alone, after = bind("several_alone", "db")
    alone.close()
    assert none == neither == after == []
    assert len(warned) == 1 and "from now on they start in the database of 'several_other'" in warned[0]
    assert "secret" not in warned[0]


def test_a_worker_drives_the_sagas_of_its_own_app_whatever_else_was_bound_after_it() -> None:
    @step(name="owned.pay")
    def pay() -> None: ...

    @saga.define(name="owned.saga")
    async def owned() -> None: ...

    with (
        Celery("owner", broker="memory://", set_as_current=False) as app,
        Celery("guest", broker="memory://", set_as_current=False) as other,
    ):
        app.conf.task_routes = {"owned.pay": {"queue": "owners"}}
        other.conf.task_routes = {"owned.pay": {"queue": "guests"}}
        owner = Orchestrator(app, database_url="postgresql://host/db")
        guest = Orchestrator(other, database_url="postgresql://host/db")
        assert (owned.starter, pay.queue, pay.task.app) == (guest, "guests", other)
        owner.take_over()
        assert (owned.starter, pay.queue, pay.task.app) == (owner, "owners", app)


def test_doorbells_do_not_wait_for_the_rate_that_an_app_has_for_its_tasks() -> None:
    """All work of a worker would, and doorbells would pile up."""
    with Celery("rated", broker="memory://", set_as_current=False) as app:
        app.conf.task_default_rate_limit = "1/h"
        app.conf.task_annotations = {"*": {"rate_limit": "1/m", "acks_late": True}}
        Orchestrator(app, database_url="postgresql://host/db")
        doorbell = app.tasks[DRAIN]
        assert (rate(doorbell.rate_limit), doorbell.acks_late) == (0, False)


def test_what_an_app_has_around_its_tasks_is_not_around_all_that_a_doorbell_brings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A transaction there would keep the effects of steps back that are on record, and lose them with the process."""
    begun: list[str] = []

    class Atomic(Task):  # type: ignore[type-arg]
        time_limit = 1

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            begun.append(self.name)
            return super().__call__(*args, **kwargs)

        def before_start(self, *_: Any) -> None:
            begun.append("before_start")

    with Celery("around", broker="memory://", task_cls=Atomic, set_as_current=False) as app:
        orchestrator = Orchestrator(app, database_url="postgresql://host/db")
        monkeypatch.setattr(orchestrator, "drain", lambda: begun.append("drains"))
        doorbell = app.tasks[DRAIN]
        assert build_tracer(DRAIN, doorbell, app=app)("m-1", [], {}).info is None
        assert (begun, doorbell.time_limit) == (["drains"], None)


def test_a_message_that_comes_before_the_schema_stays_in_the_broker(empty_database_url: str) -> None:
    with Celery("early", broker="memory://", set_as_current=False) as app:
        Orchestrator(app, database_url=empty_database_url)

        @saga.define(name="early.saga")
        async def early() -> None: ...

        task = app.tasks["early.saga"]
        task.push_request(id="m-1", args=[], kwargs={})
        with pytest.raises(Reject, match="saga migrate") as rejected:
            task.run()
        task.pop_request()
        assert rejected.value.requeue


def test_routes_may_be_configured_after_the_steps_are_declared() -> None:
    with Celery("routed", broker="memory://", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://host/db")

        @step(name="routed.refund")
        def refund() -> None: ...

        @step(name="routed.charge", compensate=refund)
        def charge() -> None: ...

        app.conf.task_routes = {"routed.charge": {"queue": "payments"}, "routed.*": {"queue": "others"}}
        assert (charge.queue, refund.queue) == ("payments", "others")
        undo = charge.arm({})
        assert undo is not None and undo.queue == "others"


def test_a_router_sees_the_task_that_it_routes_as_in_celery() -> None:
    with Celery("seen", broker="memory://", set_as_current=False) as app:
        app.conf.task_routes = (lambda name, args, kwargs, options, task=None, **_: {"queue": task.tenant},)
        orchestrator = Orchestrator(app, database_url="postgresql://host/db")

        @app.task(name="seen.pay", tenant="acme", shared=False)
        def pay() -> None: ...

        app.finalize()
        assert orchestrator._route("seen.pay") == "acme"


def test_a_router_that_cannot_do_without_arguments_is_named() -> None:
    """What it raised parked the run as an error of its saga: IndexError, tuple index out of range."""
    with Celery("reads", broker="memory://", set_as_current=False) as app:
        app.conf.task_routes = (lambda name, args, kwargs, options, task=None, **_: {"queue": args[0]},)
        Orchestrator(app, database_url="postgresql://host/db")

        @step(name="reads.pay")
        def pay() -> None: ...

        with pytest.raises(
            UsageError, match=r"^task_routes gives reads\.pay no queue: IndexError: .*, without arguments.* queue="
        ):
            _ = pay.queue


@pytest.mark.filterwarnings("ignore::celery.exceptions.CDeprecationWarning")
def test_the_queue_of_a_task_may_be_given_as_kombu_has_queues() -> None:
    with Celery("kombus", broker="memory://", set_as_current=False) as app:
        orchestrator = Orchestrator(app, database_url="postgresql://host/db")

        @app.task(name="kombus.refund", queue=Queue("payments"), shared=False)
        def refund() -> None: ...

        @step(name="kombus.charge", queue=Queue("charges"), compensate=refund)
        def charge() -> None: ...

        assert orchestrator._route("kombus.refund") == "payments"
        assert (charge.queue, charge.with_options(queue=Queue("fast")).queue) == ("charges", "fast")
        undo = charge.arm({})
        assert undo is not None and undo.queue == "payments"


def test_a_plain_task_that_undoes_is_due_on_the_queue_that_the_app_routes_it_to() -> None:
    with Celery("undoes", broker="memory://", set_as_current=False) as app:
        app.conf.task_routes = {"undoes.refund": {"queue": "refunds"}}
        Orchestrator(app, database_url="postgresql://host/db")

        @app.task(name="undoes.refund", shared=False)
        def refund(n: int) -> None: ...

        @step(name="undoes.charge", queue="payments", compensate=refund.s(1))
        def charge() -> None: ...

        undo = charge.arm({})
        assert undo is not None and undo.queue == "refunds"


def test_a_step_sent_as_a_plain_task_gets_each_argument_where_it_belongs() -> None:
    with Celery("sends", broker="memory://", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://host/db")
        app.conf.task_always_eager = True

        @step(name="sends.call")
        def call(first: int, /, second: int = 2, *rest: int, flag: bool = False, **more: int) -> list[Any]:
            return [first, second, list(rest), flag, more]

        assert call.delay(1).get() == [1, 2, [], False, {}]
        assert call.delay(1, second=3).get() == [1, 3, [], False, {}]
        assert call.delay(1, 2, 3, flag=True, other=4).get() == [1, 2, [3], True, {"other": 4}]


class Order(BaseModel):
    model_config = ConfigDict(strict=True)

    at: datetime
    cents: int = Field(alias="amount")


def test_a_step_sent_as_a_plain_task_and_tried_again_by_celery_keeps_its_arguments() -> None:
    """They are JSON by then; to be encoded as what a caller passes they would have to be lax."""
    with Celery("again", broker="memory://", set_as_current=False) as app, app.connection_for_write() as connection:
        app.conf.task_default_queue = "again"  # that broker is one for the whole process
        Orchestrator(app, database_url="postgresql://host/db")

        @step(name="again.charge")
        def charge(order: Order, data: bytes, share: Decimal = Decimal(1)) -> None: ...

        sent = connection.SimpleQueue("again")
        charge.delay(Order(at=datetime(2026, 11, 30, tzinfo=UTC), amount=1), b"\xff")
        args, kwargs, _ = sent.get(timeout=10.0).payload
        task = app.tasks["again.charge"]
        task.push_request(id="m-1", args=args, kwargs=kwargs, called_directly=False)
        for changed, expected in (None, args), ({"share": Decimal("0.50")}, [*args, "0.50"]):
            with pytest.raises(Retry):
                task.retry(kwargs=changed, countdown=0)
            assert sent.get(timeout=10.0).payload[:2] == [expected, {}]
        task.pop_request()


def _work_off(app: Celery, queue: str) -> None:
    """Run the messages of a queue as a worker does, and those that come of them."""
    with app.connection_for_read() as connection:
        messages = app.amqp.queues[queue](connection.default_channel)
        while (message := messages.get()) is not None:
            message.ack()
            args, kwargs, embed = message.decode()
            request = {**message.headers, **embed, "args": args, "kwargs": kwargs, "delivery_info": {}}
            name, task_id = message.headers["task"], message.headers["id"]
            failed = build_tracer(name, app.tasks[name], app=app)(task_id, args, kwargs, request).info
            assert failed is None, failed


@pytest.mark.parametrize("kind", ["chain", "link", "chord"])
def test_the_next_link_of_a_chain_of_celerys_own_takes_what_the_one_before_has_returned(kind: str) -> None:
    """It is JSON by then, which a strict model, or one with aliases, does not take as a value."""
    order, booked = Order(at=datetime(2026, 11, 30, tzinfo=UTC), amount=1), []
    with Celery("linked", broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        app.conf.task_default_queue = f"linked-{kind}"
        Orchestrator(app, database_url="postgresql://host/db")

        @step(name="linked.charge")
        def charge(cents: int) -> Order:
            return Order(at=order.at, amount=cents)

        @step(name="linked.book")
        def book(order: Order, note: str = "") -> None:
            booked.append(order)

        @step(name="linked.total")
        def total(orders: list[Order]) -> None:
            booked.extend(orders)

        match kind:
            case "chain":
                chain(charge.s(1), book.s("note")).apply_async()
            case "link":
                charge.apply_async((1,), link=book.s())
            case "chord":
                chord([charge.s(1), charge.s(1)], total.s()).apply_async()
        _work_off(app, f"linked-{kind}")
    assert booked == [order] * (2 if kind == "chord" else 1)


def test_what_a_caller_passes_to_a_step_is_not_taken_for_json() -> None:
    with Celery("passed", broker="memory://", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://host/db")

        @step(name="passed.book")
        def book(order: Order) -> None: ...

        with pytest.raises(PayloadError, match="valid datetime"):
            book.delay({"at": "2026-11-30T00:00:00Z", "cents": 1})


@pytest.mark.parametrize("accepted", ["all", "doorbells"])
def test_a_saga_that_is_called_as_a_step_fails_its_attempt_if_it_cannot_be_started(accepted: str) -> None:
    """Ignored it would count as done, and as rejected it would count as certainly not started."""
    with Celery("starts", broker="memory://", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://host/db", accept_messages=accepted)

        @saga.define(name="starts.saga")
        async def started(n: int) -> None: ...

        task = app.tasks["starts.saga"]
        task.push_request(id="r:starts.saga#0", args=[], kwargs={})
        token = current_step.set(StepContext("r", "starts.saga#0", 1, "r:starts.saga#0", datetime.now(UTC)))
        try:
            with pytest.raises(PayloadError, match="valid integer"):
                task.run("no number")
        finally:
            current_step.reset(token)
            task.pop_request()


@pytest.mark.parametrize("how", ["task", "canvas", "name"])
def test_a_task_that_saga_code_sends_is_refused_because_each_replay_would_send_it_again(how: str) -> None:
    with Celery("replays", broker="memory://", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://host/db")

        @app.task(name="replays.count", shared=False)
        def count(n: int) -> int:
            return n

        @saga.define(name="replays.saga")
        async def sends() -> None:
            match how:
                case "task":
                    count.delay(1)
                case "canvas":
                    chain(count.s(1), count.s(), app=app).delay()
                case _:
                    app.send_task("replays.count", [1])

        run = testing.run(sends)
        assert run.state == "parked"
        assert run.error and "sent directly in saga code" in run.error["message"]


@pytest.mark.parametrize(
    "canvas", [group, chain, lambda links: chord(links, links[0])], ids=["group", "chain", "chord"]
)
def test_a_saga_in_a_canvas_of_celerys_own_is_refused_and_durable_named(canvas: Any) -> None:
    with Celery("joins", broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://host/db")

        @saga.define(name="joins.saga")
        async def joined(n: int) -> None: ...

        task = app.tasks["joins.saga"]
        with pytest.raises(UsageError, match=r"orchestrator\.durable"):
            canvas([task.s(1), task.s(2)]).apply_async()


def test_who_takes_a_saga_for_a_step_is_told_of_children() -> None:
    @saga.define(name="takes.other")
    async def other(n: int) -> None: ...

    @saga.define(name="takes.saga")
    async def takes(how: str) -> None:
        match how:
            case "step":
                await saga.step(other, 1)  # type: ignore[call-overload]
            case "call":
                await other(1)  # type: ignore[misc]
            case _:
                other.delay(1)

    for how in ("step", "call", "delay"):
        run = testing.run(takes, how)
        assert run.state == "parked"
        assert run.error and "await saga.child(other" in run.error["message"]


@pytest.mark.parametrize("how", ["step", "map"])
def test_a_task_of_celerys_own_is_refused_as_a_step_because_no_worker_takes_it(how: str) -> None:
    with Celery("owns", broker="memory://", set_as_current=False) as app:

        @saga.define(name="owns.saga")
        async def owns() -> None:
            task = app.tasks["celery.backend_cleanup"]
            await (saga.step(task) if how == "step" else saga.map(task, [1]))

        run = testing.run(owns, stubs={"celery.backend_cleanup": None})
        assert run.state == "parked"
        assert run.error and "celery.backend_cleanup is a task of Celery's own" in run.error["message"]


@saga.define
async def looking(name: str) -> None: ...


@step(transactional=True)
def write(connection: Connection, name: str) -> int:
    connection.execute(text("INSERT INTO written VALUES (:name)"), {"name": name})
    looking.delay(name)
    looking.apply_async((name,), task_id=f"{step.current().idempotency_key} named")
    return 1 if name == "fine" else name  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "rows", "starts"), [("fine", 1, 2), ("unfit", 0, 0)])
def test_a_transactional_step_as_a_plain_celery_task_leaves_rows_and_runs_only_if_it_succeeds(
    app: Celery, database_url: str, name: str, rows: int, starts: int
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE written (name text)")
        orchestrator = Orchestrator(app, database_url=database_url)
        assert app.tasks[write.name].apply((name,)).successful() is bool(rows)
        assert connection.execute("SELECT count(*) FROM written").fetchone() == (rows,)
        assert connection.execute("SELECT count(*) FROM orchestrator.runs").fetchone() == (starts,)
        orchestrator.client.pool.close()
