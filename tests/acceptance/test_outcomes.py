"""Every way in which a saga ends: what was done, what was undone, what is left, what the journal says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from orchestrator import SagaCancelled, SagaFailed, UsageError
from tests.acceptance import sagas
from tests.acceptance.running import Worker, World, until
from tests.acceptance.sagas import Plan

pytestmark = pytest.mark.usefixtures("worker")

A, B, C = Plan(name="a"), Plan(name="b"), Plan(name="c")
FAILS = Plan(name="x", do=["reject"])


def plan(name: str, *do: str, kind: str = "act", undo: tuple[str, ...] = ("ok",), found: str | None = None) -> Plan:
    return Plan(name=name, kind=kind, do=list(do) or ["ok"], undo=list(undo), found=found)


def ended(result: Any) -> SagaFailed:
    with pytest.raises(SagaFailed) as caught:
        result.get(timeout=60)
    return caught.value


def done_and_undone(world: World, run: Any) -> list[str]:
    return [word for word in world.told(run) if word.split()[0] in ("do", "undo")]


def parked(result: Any) -> dict[str, Any]:
    until(lambda: result.status == "parked", "the run is parked")
    (item,) = result.parked
    return dict(item)


def kinds(sql_of: psycopg.Connection[Any], run: Any) -> list[str]:
    rows = sql_of.execute("SELECT kind FROM orchestrator.history WHERE run_id = %s ORDER BY seq, n", [str(run)])
    return [kind for (kind,) in rows]


# -- a step that fails -------------------------------------------------------------------------------------------------
def test_all_steps_done(world: World, sql_of: psycopg.Connection[Any]) -> None:
    result = sagas.sequence.delay([A, B])
    assert result.get(timeout=60) == ["a done", "b done"]
    assert (result.status, result.left, result.successful()) == ("completed", [], True)
    assert world.told(result) == ["do a", "do b"]
    assert kinds(sql_of, result) == ["asked", "settled", "asked", "settled", "returned", "ended"]


def test_a_rejected_step_is_not_undone_and_those_before_it_are_in_reverse(world: World) -> None:
    result = sagas.sequence.delay([A, B, FAILS, C])
    failure = ended(result)
    assert (failure.state, failure.error_type, failure.left) == ("compensated", "StepFailed", ())
    assert done_and_undone(world, result) == ["do a", "do b", "undo b", "undo a"]
    assert [e.told for e in world.effects(result) if e.what == "told"] == ["b done", "a done"]


def test_a_plain_celery_task_undoes_a_step(world: World) -> None:
    result = sagas.sequence.delay([plan("a", kind="undone plainly"), FAILS])
    assert ended(result).state == "compensated"
    assert done_and_undone(world, result) == ["do a", "undo a"]
    assert [e.told for e in world.effects(result) if e.what == "undo"] == ["a done"]


@pytest.mark.own_process
def test_a_thread_that_a_step_starts_has_the_key_of_that_step(world: World) -> None:
    """A fresh one at each attempt would charge again."""
    result = sagas.sequence.delay([plan("a", "thread")])
    assert result.get(timeout=60) == ["a done"]
    (effect,) = world.effects(result)
    assert effect.told == effect.key and effect.key.startswith(f"{result.id}:")


def test_what_an_undo_returns_does_not_decide_whether_it_was_done(world: World) -> None:
    """Nobody asks for it: an undo that was done, and could not say so, was done again for a day, and then parked."""
    result = sagas.sequence.delay([plan("a", kind="undone talkatively"), FAILS])
    until(lambda: result.ready() or result.parked, "the run has ended, or is parked")
    assert (result.status, done_and_undone(world, result)) == ("compensated", ["do a", "undo a"])


def test_a_declared_error_is_rejected_at_once(world: World) -> None:
    assert sagas.forgiving.delay([plan("x", "refuse")]).get(timeout=60) == ["rejected Refused"]


def test_nothing_done_means_failed() -> None:
    failure = ended(sagas.sequence.delay([FAILS]))
    assert (failure.state, failure.left) == ("failed", ())


def test_a_retried_step_keeps_its_idempotency_key(world: World) -> None:
    result = sagas.sequence.delay([plan("x", "late", "error", "ok")])
    assert result.get(timeout=60) == ["x done"]
    attempts = world.effects(result)
    assert [e.attempt for e in attempts] == [1, 3]
    assert {e.key for e in attempts} == {f"{result}:tests.acceptance.steps.act#0"}


def test_a_step_that_times_out_after_its_effect_is_undone_without_a_result(world: World) -> None:
    result = sagas.sequence.delay([A, plan("x", "late")])
    failure = ended(result)
    assert (failure.state, failure.left) == ("compensated", ())
    assert done_and_undone(world, result) == ["do a", "do x", "do x", "do x", "undo x", "undo a"]
    assert [e.told for e in world.effects(result) if e.what == "told"] == [None, "a done"]
    do, undo = ({e.key for e in world.effects(result) if str(e) == word} for word in ("do x", "undo x"))
    assert undo == {f"{key}:undo" for key in do}


def test_in_doubt_and_then_rejected_is_unknown_and_undone_before_the_saga_hears_of_it(world: World) -> None:
    result = sagas.forgiving.delay([plan("x", "late", "reject")])
    assert result.get(timeout=60) == ["unknown Rejected"]
    assert done_and_undone(world, result) == ["do x", "undo x"]


def test_start_to_close_interrupts(world: World) -> None:
    result = sagas.forgiving.delay([plan("x", "hang", kind="in time")])
    assert result.get(timeout=60) == ["unknown StepTimeout"]
    assert world.told(result) == ["at x"] * 3 + ["undo x", "told x"]


def test_a_step_without_effect_just_fails(world: World) -> None:
    result = sagas.forgiving.delay([plan("x", "late", kind="look"), plan("y", "error", kind="async")])
    assert result.get(timeout=60) == ["failed TimeoutError", "failed RuntimeError"]
    assert result.left == []


def test_an_undeclared_step_in_doubt_is_left(world: World) -> None:
    result = sagas.sequence.delay([A, plan("x", "late", kind="undeclared")])
    failure = ended(result)
    assert failure.state == "compensated"
    key = "tests.acceptance.steps.undeclared#0"
    assert failure.left == ({"key": key, "task": key[:-2], "outcome": "unknown"},)
    assert result.left == list(failure.left)


# -- unknown, and then? ------------------------------------------------------------------------------------------------
def test_a_probe_that_finds_the_effect_makes_the_step_succeed(world: World) -> None:
    result = sagas.sequence.delay([plan("x", "late", kind="probed", found="found it"), B])
    assert result.get(timeout=60) == ["found it", "b done"]
    assert world.told(result) == ["do x"] * 3 + ["probe x", "do b"]


def test_a_probe_that_finds_nothing_means_rejected(world: World) -> None:
    result = sagas.forgiving.delay([plan("x", "error", kind="probed")])
    assert result.get(timeout=60) == ["rejected RuntimeError"]
    assert world.told(result) == ["probe x"]


def test_on_unknown_park_waits_for_a_person_who_vouches_for_a_result(world: World) -> None:
    result = sagas.sequence.delay([plan("x", "late", kind="park")])
    item = parked(result)
    assert item["key"] == "tests.acceptance.steps.act_or_park#0" and "unknown" in item["why"]
    with pytest.raises(
        UsageError, match=r"nothing that tests\.acceptance\.steps\.act_or_park returns: .* valid string\.$"
    ):
        result.resolve(item["key"], {"receipt": 7}, by="ann", reason="called the bank")
    result.resolve(item["key"], "by hand", by="ann", reason="called the bank")
    assert result.get(timeout=60) == ["by hand"]


def test_on_unknown_park_resolved_as_without_effect(world: World) -> None:
    result = sagas.forgiving.delay([plan("x", "late", kind="park")])
    result.resolve(parked(result)["key"], no_effect=True, by="ann", reason="nothing there")
    assert result.get(timeout=60)[0].startswith("rejected")
    assert "undo x" not in world.told(result)


def test_on_unknown_park_retried_by_hand(world: World) -> None:
    result = sagas.sequence.delay([plan("x", "late", "late", "late", "ok", kind="park")])
    result.retry(parked(result)["key"], by="ann", reason="the provider is back")
    assert result.get(timeout=60) == ["x done"]
    assert {e.key for e in world.effects(result)} == {f"{result}:tests.acceptance.steps.act_or_park#0"}


# -- undoing -----------------------------------------------------------------------------------------------------------
def test_an_undo_is_retried_with_one_idempotency_key(world: World) -> None:
    result = sagas.sequence.delay([plan("a", undo=("late", "error", "ok")), FAILS])
    assert ended(result).state == "compensated"
    undone = [e for e in world.effects(result) if e.what == "undo"]
    assert [e.attempt for e in undone] == [1, 3] and len({e.key for e in undone}) == 1


@pytest.fixture
def stuck(world: World) -> Any:
    """A run whose second undo keeps failing, the first to be undone."""
    result = sagas.sequence.delay([A, plan("b", undo=("error", "error", "error", "ok")), FAILS])
    item = parked(result)
    assert item["role"] == "undo" and "3 times" in item["why"]
    assert done_and_undone(world, result) == ["do a", "do b"]
    return result


def test_a_parked_undo_is_retried(stuck: Any, world: World, sql_of: psycopg.Connection[Any]) -> None:
    stuck.retry(stuck.parked[0]["key"], by="ann", reason="mended")
    assert ended(stuck).state == "compensated"
    assert done_and_undone(world, stuck)[2:] == ["undo b", "undo a"]
    (entry,) = sql_of.execute(
        "SELECT entry FROM orchestrator.history WHERE run_id = %s AND kind = 'operator'", [stuck.id]
    ).fetchone()  # type: ignore[misc]
    assert (entry["action"], entry["by"], entry["reason"]) == ("retry", "ann", "mended")


def test_a_parked_undo_is_skipped_and_its_effect_is_left(stuck: Any, world: World) -> None:
    stuck.skip(stuck.parked[0]["key"], by="ann", reason="written off")
    failure = ended(stuck)
    assert failure.state == "failed" and [item["key"] for item in failure.left] == ["tests.acceptance.steps.act#1"]
    assert done_and_undone(world, stuck)[2:] == ["undo a"]


def test_a_parked_undo_is_resolved_by_hand(stuck: Any, world: World) -> None:
    stuck.resolve(stuck.parked[0]["key"], by="ann", reason="undone at the counter")
    failure = ended(stuck)
    assert (failure.state, failure.left) == ("compensated", ())
    assert done_and_undone(world, stuck)[2:] == ["undo a"]


def test_only_what_is_parked_can_be_operated_on(stuck: Any) -> None:
    with pytest.raises(UsageError, match="parked there"):
        stuck.retry("tests.acceptance.steps.act#0")
    with pytest.raises(UsageError, match=r"cannot be skipped|not parked"):
        stuck.skip("")
    stuck.terminate(by="ann", reason="enough")
    failure = ended(stuck)
    assert failure.state == "terminated"
    assert sorted(item["key"][-2:] for item in failure.left) == ["#0", "#1"]


# -- pivot -------------------------------------------------------------------------------------------------------------
def test_after_the_pivot_a_failing_step_parks_and_goes_forward_only(world: World) -> None:
    steps = [A, plan("p", kind="pivot"), plan("n", "error", "error", "error", "ok", kind="after")]
    result = sagas.sequence.delay(steps)
    item = parked(result)
    assert "point of no return" in item["why"]
    with pytest.raises(UsageError, match="point of no return"):
        result.cancel()
    result.retry(item["key"], by="ann", reason="again")
    assert result.get(timeout=60)[-1] == "n done"
    assert not [word for word in world.told(result) if word.startswith("undo")]


def test_an_exception_that_leaves_the_saga_after_the_pivot_parks(world: World) -> None:
    result = sagas.sequence.delay([A, plan("p", kind="pivot"), plan("n", "reject", kind="look")])
    item = parked(result)
    assert (item["key"], item["role"]) == ("", "pivot")
    with pytest.raises(UsageError, match=r"nothing that tests\.acceptance\.sagas\.sequence returns"):
        result.resolve(value="settled by hand", by="ann", reason="delivered in person")
    result.resolve(value=["settled by hand"], by="ann", reason="delivered in person")
    assert result.get(timeout=60) == ["settled by hand"]
    assert "undo a" not in world.told(result)


def test_a_rejected_pivot_goes_back(world: World) -> None:
    result = sagas.sequence.delay([A, plan("p", "reject", kind="pivot")])
    assert ended(result).state == "compensated"
    assert done_and_undone(world, result) == ["do a", "undo a"]


def test_an_unknown_pivot_is_never_guessed(world: World) -> None:
    result = sagas.sequence.delay([A, plan("p", "late", kind="pivot")])
    item = parked(result)
    assert "nothing may be guessed" in item["why"]
    result.resolve(item["key"], no_effect=True, by="ann", reason="looked it up")
    assert ended(result).state == "compensated"
    assert done_and_undone(world, result) == ["do a", "do p", "do p", "do p", "undo a"]


# -- stopping ----------------------------------------------------------------------------------------------------------
def test_cancel_undoes_what_was_done_and_waits_for_what_has_begun(world: World) -> None:
    result = sagas.sequence.delay([A, plan("b", "gate"), C])
    world.until_at(result, "at b")
    result.cancel(reason="customer asked", by="ann")
    until(lambda: result.status == "compensating", "the cancel is taken")
    world.open(f"{result} b")
    with pytest.raises(SagaCancelled) as caught:
        result.get(timeout=60)
    assert (caught.value.state, caught.value.left) == ("cancelled", ())
    assert done_and_undone(world, result) == ["do a", "do b", "undo b", "undo a"]
    with pytest.raises(UsageError, match="cancelled already"):
        result.cancel()


def test_a_cancelled_step_is_told_at_its_next_heartbeat(world: World) -> None:
    result = sagas.sequence.delay([plan("b", kind="beat")])
    world.until_at(result, "at b")
    result.cancel()
    with pytest.raises(SagaCancelled):
        result.get(timeout=60)
    assert done_and_undone(world, result) == ["do b", "undo b"]


def test_a_cancel_that_meets_a_pivot_in_flight_is_decided_after_it(world: World) -> None:
    result = sagas.sequence.delay([A, plan("p", "gate", kind="pivot")])
    world.until_at(result, "at p")
    result.cancel(by="ann")
    world.open(f"{result} p")
    assert result.get(timeout=60) == ["a done", "p done"]
    assert "undo a" not in world.told(result)


def test_cancel_while_a_retry_is_due_later(world: World) -> None:
    result = sagas.sleeper.delay(3600)
    until(lambda: result.status == "running", "it sleeps")
    result.cancel()
    with pytest.raises(SagaCancelled):
        result.get(timeout=60)
    assert world.told(result) == []


def test_terminate_undoes_nothing_and_lists_what_is_left(world: World) -> None:
    result = sagas.sequence.delay([A, plan("n", kind="look"), plan("b", "gate")])
    world.until_at(result, "at b")
    result.terminate(reason="lawyers", by="ann")
    failure = ended(result)
    assert failure.state == "terminated"
    assert [(item["key"][-5:], item["outcome"]) for item in failure.left] == [
        ("act#0", "succeeded"),
        ("act#1", "unknown"),
    ]
    world.open(f"{result} b")
    until(lambda: "do b" in world.told(result), "the late effect")
    assert "undo a" not in world.told(result)


def test_a_deadline_compensates(world: World) -> None:
    result = sagas.hurried.delay([A, B])
    failure = ended(result)
    assert (failure.state, failure.error_type) == ("compensated", "DeadlineExceeded")
    assert done_and_undone(world, result) == ["do a", "do b", "undo b", "undo a"]


def test_a_deadline_after_the_pivot_only_alarms(world: World, sql_of: psycopg.Connection[Any]) -> None:
    result = sagas.hurried.delay([A, plan("p", kind="pivot")])
    until(lambda: "cancel refused" in kinds(sql_of, result), "the deadline is refused")
    assert result.status == "running"
    result.terminate()
    assert ended(result).state == "terminated"


# -- branches ----------------------------------------------------------------------------------------------------------
def test_gather_with_one_failing_waits_for_the_others_and_undoes_them(world: World) -> None:
    result = sagas.together.delay([plan("b", "gate"), A, FAILS])
    world.until_at(result, "at b")
    until(lambda: result.status == "compensating", "the failure is known")
    before = done_and_undone(world, result)
    assert before in (["do a"], []), "nobody begins it any more, if nobody had begun it"
    world.open(f"{result} b")
    assert ended(result).state == "compensated"
    assert done_and_undone(world, result) == [*before, "do b", *(["undo a"] if before else []), "undo b"]


def test_an_abandoned_branch_is_undone_while_the_run_completes(world: World) -> None:
    result = sagas.first_wins.delay(plan("a", "gate"), plan("b", "gate"))
    world.until_at(result, "at a")
    world.until_at(result, "at b")
    world.open(f"{result} a")
    until(lambda: "do a" in world.told(result), "the first")
    assert result.status == "running"
    world.open(f"{result} b")
    assert result.get(timeout=60) == ["a done"]
    assert sorted(done_and_undone(world, result)) == ["do a", "do b", "undo b"]
    assert result.left == []


def test_a_task_group(world: World) -> None:
    assert sagas.grouped.delay([A, B, C]).get(timeout=60) == 3
    result = sagas.grouped.delay([A, FAILS])
    assert ended(result).state == "compensated"
    assert "undo a" in world.told(result)


@pytest.mark.parametrize("how", ["timeout", "wait_for"])
def test_a_timeout_in_the_saga_abandons_the_step(world: World, how: str) -> None:
    result = sagas.by_timeout.delay(plan("b", "gate"), how)
    world.until_at(result, "at b")
    until(lambda: "do instead" in world.told(result), "the timeout")
    assert result.status == "running"
    world.open(f"{result} b")
    assert result.get(timeout=60) == "timed out"
    assert "undo b" in world.told(result)
    assert sagas.by_timeout.delay(A, how).get(timeout=60) == "in time"


def test_hundred_branches(world: World) -> None:
    result = sagas.together.delay([plan(str(n), kind="look") for n in range(100)])
    assert result.get(timeout=60) == [f"{n} done" for n in range(100)]
    assert len(world.effects(result)) == 100


# -- what a saga may use -----------------------------------------------------------------------------------------------
def test_a_sleep_is_durable_and_exact(world: World) -> None:
    slept = sagas.sleeper.delay(0.3).get(timeout=60)
    assert 0.3 <= slept < 5


def test_once_now_uuid_random_version_and_info_are_recorded(world: World, own_worker: Any) -> None:
    result = sagas.recorded.apply_async(("me",), queue=own_worker.queue)
    world.until_at(result, "at me")
    own_worker.kill()
    own_worker.start()
    world.open(f"{result} me")
    said, *rest = result.get(timeout=60)
    assert said.startswith("me by ") and rest[-2:] == [2, result.id]
    assert [e.name for e in world.effects() if e.what == "once"] == ["me"]


def test_once_with_a_function_that_misbehaves_is_a_failed_attempt(sql_of: psycopg.Connection[Any], worker: Any) -> None:
    for how, error in (
        ("SystemExit", "SystemExit"),
        ("KeyboardInterrupt", "KeyboardInterrupt"),
        ("NaN", "PayloadError"),
    ):
        result = sagas.once_badly.delay(how)
        until(lambda run=result: "attempted" in kinds(sql_of, run), "the first attempt")
        (entry,) = sql_of.execute(
            "SELECT entry FROM orchestrator.history WHERE run_id = %s AND kind = 'attempted'", [result.id]
        ).fetchone()  # type: ignore[misc]
        assert entry["error"]["type"] == error
        result.cancel()
        with pytest.raises(SagaCancelled):
            result.get(timeout=60)


@pytest.mark.parametrize("how", ["thread", "executor", "call", "delay"])
def test_what_cannot_be_replayed_parks_as_a_code_error_and_names_the_way_out(how: str) -> None:
    result = sagas.threaded.delay(how)
    item = parked(result)
    assert item["role"] == "code"
    assert re.search(r"saga\.|from a step", item["why"])
    result.cancel()
    with pytest.raises(SagaCancelled):
        result.get(timeout=60)


@pytest.mark.own_process
def test_saga_code_that_blocks_is_interrupted_and_parked_and_holds_up_no_other_run(
    world: World, new_worker: Callable[..., Worker]
) -> None:
    """A turn is anybody's to take who finds it not done: without a bound one such run holds every pool child."""
    worker = new_worker(ORCHESTRATOR_SAGA_CODE_TIMEOUT="0.5").start()
    ways = ("waits", "computes", "polls", "swallows")
    results = {how: sagas.blocking.apply_async((how,), queue=worker.queue) for how in ways}
    for how, result in results.items():
        item = parked(result)
        assert (item["key"], item["role"]) == ("", "code") and "belongs into a step" in item["why"]
        assert world.told(result) == [f"do {how}"]
    assert sagas.sequence.apply_async(([A],), queue=worker.queue).get(timeout=60) == ["a done"]
    for how, result in results.items():
        (world.folder / f"mended {how}").touch()
        result.retry()
        assert result.get(timeout=60) == f"{how} no more"


@pytest.mark.own_process
def test_a_turn_that_always_ends_its_process_is_parked_and_takes_no_other_run_along(
    world: World, own_worker: Worker
) -> None:
    deadly = sagas.deadly.apply_async(("deadly",), queue=own_worker.queue)
    others = sagas.sequence.start_many([([A],)] * 20, queue=own_worker.queue)
    item = parked(deadly)
    assert (item["key"], item["role"]) == ("", "code") and "10 processes in a row have ended" in item["why"]
    assert [other.get(timeout=60) for other in others] == [["a done"]] * 20
    (world.folder / "mended deadly").touch()
    deadly.retry()
    assert deadly.get(timeout=60) == "deadly no more"


@pytest.mark.own_process
@pytest.mark.parametrize("name", ["after a step", "after a transaction"])
def test_code_that_ends_its_process_after_a_step_is_not_taken_for_the_step(
    world: World, own_worker: Worker, name: str
) -> None:
    deadly = sagas.deadly.apply_async((name,), queue=own_worker.queue)
    item = parked(deadly)
    assert (item["key"], item["role"]) == ("", "code") and "10 processes in a row have ended" in item["why"]
    (world.folder / f"mended {name}").touch()
    deadly.retry()
    assert deadly.get(timeout=60) == f"{name} no more"
    assert world.told(deadly) in (["do first", "do first", f"do {name}"], [f"do {name}"])


def test_a_code_error_parks_and_the_mended_code_goes_on(world: World, own_worker: Any) -> None:
    result = sagas.broken.apply_async(("a",), queue=own_worker.queue)
    item = parked(result)
    assert (item["key"], item["role"]) == ("", "code") and "no_such_attribute" in item["why"]
    own_worker.stop()
    own_worker.start(ACCEPTANCE_MENDED="1")
    result.retry(reason="deployed a fix", by="ann")
    assert result.get(timeout=60) == "a done, mended"
    assert world.told(result) == ["do a"]


def test_local_and_async_steps(world: World) -> None:
    result = sagas.sequence.delay([plan("l", kind="local"), plan("m", kind="async")])
    assert result.get(timeout=60) == ["l done", "m done"]


# -- the seeds ---------------------------------------------------------------------------------------------------------
def test_order_goes_through_without_its_mail(world: World) -> None:
    result = sagas.order.delay(A, B, plan("mail", "error", kind="look"))
    assert result.get(timeout=60) is False
    assert done_and_undone(world, result) == ["do a", "do b"]


def test_order_is_refunded_when_the_goods_are_gone(world: World) -> None:
    result = sagas.order.delay(plan("charge", undo=("error", "ok")), plan("deduct", "reject"), A)
    assert ended(result).state == "compensated"
    assert done_and_undone(world, result) == ["do charge", "undo charge"]


def test_payment_is_reversed_before_the_pivot(world: World) -> None:
    result = sagas.payment.delay(plan("hold"), plan("process", "late"), plan("settle", kind="pivot"), [A])
    assert ended(result).state == "compensated"
    assert done_and_undone(world, result)[-2:] == ["undo process", "undo hold"]
    assert "do settle" not in world.told(result)


def test_payment_is_never_reversed_for_a_notification(world: World) -> None:
    notices = [plan("n1", kind="look"), plan("n2", "error", kind="look")]
    result = sagas.payment.delay(plan("hold"), plan("process"), plan("settle", kind="pivot"), notices)
    assert result.get(timeout=60) == 1
    assert not [word for word in world.told(result) if word.startswith("undo")]
