"""explain: every reason for which a run does not move, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from orchestrator.cli.explain import last_errors
from orchestrator.cli.reasons import Case, Reason, reasons
from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import (
    Asked,
    Attempted,
    CancelAsked,
    CancelRefused,
    DeadlinePassed,
    Operated,
    Parked,
    Returned,
    Settled,
    Undo,
    encode,
)
from orchestrator.store import liveness
from orchestrator.store.pauses import Pause
from orchestrator.store.runs import Inbox, Outstanding, Serving
from tests.cli.conftest import Terminal

SHOP = "tests.cli.shop"


def _codes(terminal: Terminal, run_id: str) -> list[str]:
    return [reason["code"] for reason in terminal.json("explain", run_id)["reasons"]]


@pytest.fixture
def database(terminal: Terminal) -> Iterator[psycopg.Connection[Any]]:
    """The database of the runs, to have workers in it that do nothing."""
    with psycopg.connect(terminal.database_url, autocommit=True) as connection:
        yield connection


def _worker(database: psycopg.Connection[Any], queue: str, *targets: str) -> None:
    liveness.register(database, node=f"{queue}@here", host="here", pid=1, queues=[queue], targets=targets, slots=2)


def test_no_worker_at_all(terminal: Terminal) -> None:
    run_id = terminal.start("checkout", "1")
    assert _codes(terminal, run_id) == ["no worker"]
    said = terminal.ok("explain", run_id)
    assert "No worker is running" in said and "celery -A <app> worker -Q celery" in said


def test_no_worker_on_the_queue(terminal: Terminal, database: psycopg.Connection[Any]) -> None:
    _worker(database, "mails", f"{SHOP}.checkout@1")
    run_id = terminal.start("checkout", "1")
    assert _codes(terminal, run_id) == ["no queue"]
    assert "No worker serves queue 'celery'" in terminal.ok("explain", run_id)


def test_a_worker_that_does_not_know_the_saga(terminal: Terminal, database: psycopg.Connection[Any]) -> None:
    _worker(database, "celery", "something.else")
    run_id = terminal.start("checkout", "1")
    assert _codes(terminal, run_id) == ["no saga"]


def test_a_version_that_no_worker_has(terminal: Terminal, database: psycopg.Connection[Any]) -> None:
    _worker(database, "celery", f"{SHOP}.checkout@2", f"{SHOP}.checkout@10")
    run_id = terminal.start("checkout", "1")
    assert _codes(terminal, run_id) == ["no version"]
    said = " ".join(terminal.ok("explain", run_id).split())
    assert f"pinned to version 1 of {SHOP}.checkout, which no worker of queue 'celery' has" in said
    assert "they have version 2, 10" in said


def test_a_start_that_is_set_for_later(terminal: Terminal) -> None:
    run_id = terminal.start("checkout", "1", "--countdown", "600")
    assert _codes(terminal, run_id) == ["start"]


def test_a_timer(worked: Terminal) -> None:
    run_id = worked.start("nap", "1")
    worked.until(run_id, "running")
    [reason] = _settled(worked, run_id, "timer")
    assert reason["text"].startswith("It sleeps: a timer wakes it at ")


def _settled(terminal: Terminal, run_id: str, code: str) -> list[dict[str, Any]]:
    """Wait until the first reason has this code; returns all."""
    from tests.cli.conftest import eventually

    def look() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = terminal.json("explain", run_id)["reasons"]
        return found if found[0]["code"] == code else []

    return eventually(look)


def test_a_retry_that_is_not_due_yet(worked: Terminal) -> None:
    run_id = worked.start("patient", "1")
    [reason] = _settled(worked, run_id, "retry")
    assert reason["text"].startswith(f"Step {SHOP}.flaky#0: retry 2 of 5 in ")
    assert reason["text"].endswith("The last attempt failed: TimeoutError: no answer.")


def test_an_undo_that_is_parked(worked: Terminal) -> None:
    run_id = worked.start("checkout", "bad-norefund")
    worked.until(run_id, "parked")
    [reason] = worked.json("explain", run_id)["reasons"]
    assert reason["text"].startswith(f"Parked at the undo of {SHOP}.charge#0, because its undo failed 2 times")
    assert "ConnectionError: the provider is down" in reason["text"]
    assert [hint.split()[1] for hint in reason["hints"]] == ["retry", "resolve", "skip"]


def test_a_pivot_in_doubt(worked: Terminal) -> None:
    run_id = worked.start("pivot", "1")
    worked.until(run_id, "parked")
    assert "point of no return" in worked.json("explain", run_id)["reasons"][0]["text"]


def test_an_error_in_saga_code(worked: Terminal) -> None:
    run_id = worked.start("buggy", "1")
    worked.until(run_id, "parked")
    said = " ".join(worked.ok("explain", run_id).split())
    assert "Parked as a whole: the saga function raised AttributeError" in said
    assert f"saga history {run_id} --traceback" in said


def test_a_run_that_ended(worked: Terminal) -> None:
    run_id = worked.start("checkout", "bad")
    worked.until(run_id, "compensated")
    assert _codes(worked, run_id) == ["ended", "error"]


# -- without a database ------------------------------------------------------------------------------------------------
NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
KEY = "shop.charge#0"
SERVING = Serving("w@here", ["celery"], ["shop.charge", "shop@1"], 2, NOW, 0)


def _case(work: Outstanding, **changes: Any) -> Case:
    run = {"id": "r", "saga": "shop", "version": 1, "state": "running", "position": 3, "deadline_at": None,
           "past_pivot": False, "parked": [], "started_at": NOW}  # fmt: skip
    fold = Fold(RunInfo("r", "shop", 1, {}, NOW, "celery"))
    fold.apply_row(NOW, [Asked(KEY, "shop.charge", {}, undo=Undo("shop.refund"))])
    return replace(Case(run, fold, [work], Inbox(0, None, NOW), [SERVING]), **changes)


def _work(**changes: Any) -> Outstanding:
    work = Outstanding(KEY, "do", "shop.charge", "celery", "shop.charge", 0, NOW, None, False, None, None, None, False,
                       None, None, True, True, None, False, 0, NOW)  # fmt: skip
    return replace(work, **changes)


def _ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


RUNNING = {"begun": True, "begun_at": _ago(3), "attempt": 2, "node": "w@here", "node_dead": False,
           "deadline_at": NOW + timedelta(seconds=27)}  # fmt: skip


def _only(case: Case) -> Reason:
    [reason] = reasons(case)
    return reason


def test_a_step_that_runs() -> None:
    text = _only(_case(_work(**RUNNING))).text
    assert text.startswith(f"Running step {KEY} (retry 2 of 5) on w@here since ")
    assert "(3 s ago), times out at " in text and text.endswith("(in 27 s).")


def test_an_item_of_a_map_is_told_with_the_name_of_its_step() -> None:
    assert reasons(_case(_work(**{**RUNNING, "key": "[3]"})))[0].text.startswith("Running step [3] (shop.charge) (")


def test_a_step_that_was_told_to_stop() -> None:
    assert "told to stop" in _only(_case(_work(**RUNNING, stop=True))).text


def test_a_step_that_has_to_send_a_heartbeat() -> None:
    assert "without a heartbeat before" in _only(_case(_work(**RUNNING, expires_at=NOW + timedelta(seconds=2)))).text


def test_a_step_whose_worker_is_dead() -> None:
    assert _only(_case(_work(**{**RUNNING, "node_dead": True}))).code == "worker lost"


def test_a_step_whose_worker_has_not_been_heard_of() -> None:
    silent = replace(SERVING, seen_at=_ago(60))
    reason = _only(_case(_work(**RUNNING), workers=[silent]))
    assert reason.code == "worker silent"
    assert "silent for 1 min" in reason.text


def test_workers_that_have_not_been_heard_of_do_not_count() -> None:
    silent = replace(SERVING, seen_at=_ago(60))
    assert _only(_case(_work(), workers=[silent])).code == "no worker"


def test_a_task_that_no_worker_of_the_queue_knows() -> None:
    elsewhere = replace(SERVING, node="mail@here", queues=["mails"])
    unknowing = replace(SERVING, targets=["shop@1"])
    reason = _only(_case(_work(), workers=[elsewhere, unknowing]))
    assert reason.code == "no task"
    assert "none of them knows task shop.charge (mail@here knows it, but does not serve that queue)" in reason.text
    assert reason.text.count("Deploy it there.") == 1


def test_a_turn_that_needs_no_code_is_taken_by_any_worker_of_the_queue() -> None:
    unknowing = replace(SERVING, targets=["something.else"])
    anyone = _work(key="", role="turn", target="*")
    assert _only(_case(anyone, workers=[unknowing])).code == "turn"
    assert _only(_case(replace(anyone, due_at=_ago(30)), workers=[unknowing])).code == "not taken"


def test_a_run_that_was_cancelled_waits_for_no_code(terminal: Terminal, database: psycopg.Connection[Any]) -> None:
    run_id = terminal.start("checkout", "1")
    terminal.ok("cancel", run_id)
    _worker(database, "celery", "something.else")
    [turn] = terminal.json("show", run_id)["outstanding"]
    assert (turn["target"], turn["target_served"]) == ("*", True)
    assert "no task" not in _codes(terminal, run_id)


def test_workers_that_are_busy() -> None:
    reason = _only(_case(_work(due_at=_ago(30)), workers=[replace(SERVING, draining=2)]))
    assert reason.code == "busy"
    assert "has been due for 30 s: all 2 slots of w@here are busy" in reason.text


def test_workers_that_are_free_and_take_nothing() -> None:
    assert _only(_case(_work(due_at=_ago(30)))).code == "not taken"


def test_the_broker_is_not_suspected_while_a_worker_has_just_been_killed_or_is_just_starting() -> None:
    """As in the quickstart, where `explain` asked "is the broker up?" a second after `kill -9`."""
    assert _only(_case(_work(due_at=_ago(4)))).code == "due"
    assert _only(_case(_work(due_at=_ago(4)), workers=[replace(SERVING, draining=2)])).code == "busy"


def test_of_a_queue_that_is_paused_nothing_else_is_said() -> None:
    paused = [Pause("queue", "celery", "ann", "", NOW, False)]
    assert _only(_case(_work(due_at=_ago(30)), pauses=paused)).code == "paused"
    assert _only(_case(_work(), pauses=paused)).code == "paused"
    codes = [reason.code for reason in reasons(_case(_work(), pauses=paused, workers=[]))]
    assert codes == ["paused", "no worker"]


def test_what_ends_with_a_full_stop_gets_no_second_one() -> None:
    case = _case(_work(**RUNNING))
    case.fold.apply_row(NOW, [Parked("", "drift", "it has drifted. Deploy, and retry.")])
    assert reasons(case)[0].text.startswith("Parked as a whole: it has drifted. Deploy, and retry. Its saga code")


def test_a_step_that_nobody_awaited_is_named_if_its_failure_ended_the_run() -> None:
    """Its own error was all that was told."""
    error = {"type": "ValueError", "message": "no such card"}
    ended = {"state": "failed", "finished_at": NOW, "error": error, "left_effects": []}
    case = _case(_work())
    case.run.update(ended)
    case.fold.apply_row(NOW, [Returned(1), Settled(KEY, "rejected", error=error)])
    assert reasons(case)[1].text == (
        f"What ended it: {KEY}, which the saga asked for and never awaited, failed: ValueError: no such card."
    )


def test_saga_code_that_blocked_is_told_once() -> None:
    why = "the saga function ran for 30 s"
    case = _case(_work(**RUNNING))
    case.fold.apply_row(NOW, [Parked("", "code", why, {"type": "BlockedError", "message": why})])
    text = reasons(case)[0].text
    assert text.count(why) == 1 and "BlockedError" not in text


def test_a_retry_whose_error_ends_with_a_full_stop_gets_no_second_one() -> None:
    case = _case(_work(due_at=NOW + timedelta(seconds=9), attempt=1))
    case = replace(case, errors={(KEY, "do"): {"type": "PayloadError", "message": "Pass another one."}})
    assert _only(case).text.endswith("Pass another one.")


@pytest.mark.parametrize("role", ["code", "pivot"])
def test_a_page_of_an_error_is_cut(role: str) -> None:
    error = {"type": "HTTPError", "message": "<" * 8000}
    case = _case(_work(**RUNNING))
    case.fold.apply_row(NOW, [Parked("", role, f"the saga function raised HTTPError: {'<' * 8000}", error)])
    assert len(reasons(case)[0].text) < 1500


def test_what_to_do_about_a_drift_is_not_cut_off() -> None:
    case = _case(_work(**RUNNING))
    case.fold.apply_row(NOW, [Parked("", "drift", f"it has drifted {'-' * 800}. Deploy, and retry.")])
    reason = reasons(case)[0]
    assert "Deploy, and retry." in reason.text and "saga replay r    # the difference" in reason.hints


def test_work_that_is_due_right_now() -> None:
    assert _only(_case(_work())).code == "due"


def test_an_undo_that_waits_for_a_lost_attempt() -> None:
    quiet = NOW + timedelta(minutes=4)
    case = _case(_work(role="undo", due_at=quiet))
    case.fold.apply_row(NOW, [Attempted(KEY, 1, {"type": "LeaseLost"}, quiet=quiet.isoformat())])
    assert _only(case).code == "quiet"


def test_a_turn_that_only_its_deadline_wakes() -> None:
    deadline = NOW + timedelta(hours=1)
    turn = _work(key="", role="turn", target="shop@1", due_at=deadline)
    case = _case(turn)
    case.run["deadline_at"] = deadline
    assert _only(case).text.endswith("(in 1 h); then it is undone.")


def test_a_start_that_is_set_for_later_of_a_run_that_was_told_something() -> None:
    case = _case(_work(key="", role="turn", target="shop@1", due_at=NOW + timedelta(hours=1)))
    case.run.update(state="pending", position=2)
    assert _only(case).code == "start"


def test_a_start_that_is_set_for_later_of_a_run_that_was_paused() -> None:
    case = _case(_work(key="", role="turn", target="shop@1", due_at=_ago(-7200)))
    case.run.update(state="paused", started_at=_ago(-3600), deadline_at=_ago(-7200))
    case.fold.apply_row(NOW, [Operated("pause", by="ann")])
    assert [reason.code for reason in reasons(case)] == ["paused", "start", "deadline"]
    assert "start is set for" in reasons(case)[1].text and "in 1 h" in reasons(case)[1].text


def test_a_run_that_waits_for_a_signal_is_not_said_to_wait_for_nothing_but_its_deadline() -> None:
    case = _case(_work(key="", role="turn", target="shop@1", due_at=_ago(-3600)))
    case.run["deadline_at"] = _ago(-3600)
    case.fold.apply_row(NOW, [Asked("signal:go#0", "go", {}, kind="signal")])
    signal, deadline = reasons(case)
    assert (signal.code, deadline.code) == ("signal", "deadline")
    assert deadline.text.startswith("Its deadline is ")


@pytest.mark.parametrize("role", ["do", "undo", "probe"])
def test_a_retry_of_anything_tells_the_last_error(role: str) -> None:
    case = _case(_work(role=role, attempt=2, due_at=_ago(-4)))
    rows = [(1, NOW, [encode(Attempted(KEY, n, {"type": "Bad", "message": f"no. {n}"}, role)) for n in (1, 2)])]
    case = replace(case, errors=last_errors(rows))
    assert _only(case).text.endswith(" The last attempt failed: Bad: no. 2.")


def test_a_cancel_that_waits_for_a_pivot() -> None:
    case = _case(_work(**RUNNING))
    case.fold.apply_row(NOW, [Asked("pay#0", "shop.pay", {}, effect="pivot"), CancelAsked("ann", "too dear")])
    assert reasons(case)[0].code == "stopped"
    assert reasons(case)[0].text.startswith("It was told to stop by ann (too dear). That is decided by")


def test_a_timer_after_a_deadline_that_has_only_alarmed() -> None:
    case = _case(_work(key="", role="turn", target="shop@1", due_at=NOW + timedelta(hours=1)))
    case.run.update(deadline_at=_ago(60), past_pivot=True)
    case.fold.apply_row(_ago(60), [DeadlinePassed(), CancelRefused("deadline")])
    assert _only(case).code == "timer"


@pytest.mark.parametrize("role", ["code", "drift"])
def test_a_run_past_its_pivot_is_not_said_to_be_cancelled(role: str) -> None:
    case = _case(_work())
    case.fold.apply_row(NOW, [Parked("", role, "the code is wrong")])
    case.run.update(past_pivot=True)
    parked = reasons(case)[0]
    assert "cancel" not in parked.text and "point of no return" in parked.text
    assert parked.hints[:2] == ("saga retry r", "saga resolve r --result JSON")


def test_arrivals_that_nobody_has_read() -> None:
    case = _case(_work(**RUNNING), inbox=Inbox(2, _ago(5), NOW))
    assert [reason.code for reason in reasons(case)] == ["running", "arrivals"]
    assert reasons(case)[1].text.startswith("2 arrivals wait to be read by its next turn, since ")


def test_a_step_that_waits_for_its_turn_under_a_rate_limit() -> None:
    limit = {"gate": "shop.charge:eu", "every": 0.01, "rate": "100/s"}
    reason = _only(_case(_work(limit=limit, in_line=True, due_at=_ago(-3e10))))
    assert reason.text == f"Step {KEY} waits for its turn under rate limit 100/s of shop.charge:eu."
    assert _only(_case(_work(limit=limit, due_at=_ago(-1)))).code == "rate limit"


def test_a_step_that_waits_for_a_slot_of_its_concurrency() -> None:
    limit = {"gate": "shop.charge:eu", "most": 5}
    reason = _only(_case(_work(limit=limit, in_line=True, let_in=5)))
    assert reason.text == f"Step {KEY} waits for one of 5 slots of shop.charge:eu."


def test_nothing_outstanding_is_said_as_it_is() -> None:
    assert reasons(replace(_case(_work()), work=[]))[0].code == "between"
