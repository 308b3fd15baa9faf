"""cancel, terminate, retry, skip, resolve: what an operator does, on record."""

from __future__ import annotations

import copy
import getpass
import json
import shlex
import uuid

import pytest

from orchestrator.saga import registry as sagas
from tests.cli.conftest import Terminal, eventually

CHARGE = "tests.cli.shop.charge#0"
SETTLE = "tests.cli.shop.settle#0"


def _entries(terminal: Terminal, run_id: str, kind: str) -> list[dict[str, object]]:
    return [entry for entry in terminal.json("history", run_id) if entry["kind"] == kind]


@pytest.fixture
def asleep(worked: Terminal) -> str:
    """A run that has charged and sleeps."""
    run_id = worked.start("nap", "1")
    worked.until(run_id, "running")
    eventually(lambda: worked.json("explain", run_id)["reasons"][0]["code"] == "timer")
    return run_id


@pytest.fixture
def undo_parked(worked: Terminal) -> str:
    """A run whose undo keeps failing."""
    run_id = worked.start("checkout", "bad-norefund")
    worked.until(run_id, "parked")
    return run_id


@pytest.fixture
def pivot_parked(worked: Terminal) -> str:
    """A run whose pivot is in doubt."""
    run_id = worked.start("pivot", "1")
    worked.until(run_id, "parked")
    return run_id


def test_cancel_undoes_with_name_and_reason_on_record(worked: Terminal, asleep: str) -> None:
    worked.ok("cancel", asleep, "--by", "ann", "--reason", "customer asked")
    assert worked.until(asleep, "cancelled")["left_effects"] == []
    [cancel] = _entries(worked, asleep, "cancel")
    assert (cancel["by"], cancel["reason"]) == ("ann", "customer asked")
    assert "cancel asked by ann “customer asked”" in worked.ok("history", asleep)


def test_pause_holds_a_run_says_who_and_why_and_resume_lets_it_go(worked: Terminal, asleep: str) -> None:
    worked.ok("pause", asleep, "--by", "ann", "--reason", "the bank is closed")
    worked.until(asleep, "paused")
    [reason] = worked.json("explain", asleep)["reasons"]
    assert reason["code"] == "paused"
    assert reason["text"].startswith("Paused by ann (the bank is closed).")
    assert reason["hints"] == [f"saga resume {asleep}"]
    assert "operator: pause by ann “the bank is closed”" in worked.ok("history", asleep)
    assert f"Run {asleep} goes on. Watch" in worked.ok("resume", asleep, "--by", "bob")
    worked.until(asleep, "running")


def test_resuming_a_run_that_is_not_paused_does_not_say_that_it_goes_on(worked: Terminal, asleep: str) -> None:
    said = worked.ok("resume", asleep)
    assert f"Run {asleep} is not paused, it is running; a pause that it does not show yet is lifted." in said


def test_a_command_that_is_printed_can_be_typed_as_it_is(worked: Terminal) -> None:
    """A run of a schedule has its name in its id, and that may have spaces in it."""
    run_id = f"shop/it's every night@{uuid.uuid4()}; $HOME"
    worked.start("checkout", "bad-norefund", "--id", run_id)
    worked.until(run_id, "parked")
    (reason,) = worked.json("explain", run_id)["reasons"]
    assert len(reason["hints"]) == 3
    for hint in reason["hints"]:
        assert shlex.split(hint, comments=True)[2:] == [run_id, "tests.cli.shop.charge#0"]
        assert hint in worked.ok("explain", run_id)
    for command in ("show", "history"):
        last = worked.ok(command, run_id).splitlines()[-1]
        assert shlex.split(last.partition(": ")[2]) == ["saga", "explain", run_id]
    told = worked.ok("skip", run_id)
    assert shlex.split(told.rpartition("with: ")[2]) == ["saga", "show", run_id]


def test_what_had_parked_waits_for_nobody_once_the_run_is_terminated(worked: Terminal, undo_parked: str) -> None:
    assert "parked " in worked.ok("show", undo_parked)
    worked.ok("terminate", undo_parked)
    worked.until(undo_parked, "terminated")
    assert "parked " not in worked.ok("show", undo_parked)


def test_a_saga_is_paused_and_resumed_by_its_name(terminal: Terminal) -> None:
    run_id = terminal.start("checkout", "1")
    said = terminal.ok("pause", "--saga", "checkout", "--by", "ann", "--reason", "a bad deploy")
    assert said == "Saga tests.cli.shop.checkout is paused.\n"
    assert "paused already" in terminal.ok("pause", "--saga", "checkout")
    reason = terminal.json("explain", run_id)["reasons"][0]
    assert reason["text"].startswith("Saga tests.cli.shop.checkout is paused by ann (a bad deploy):")
    assert reason["hints"] == ["saga resume --saga tests.cli.shop.checkout"]
    assert "goes on" in terminal.ok("resume", "--saga", "checkout")
    assert "paused" not in [reason["code"] for reason in terminal.json("explain", run_id)["reasons"]]


def test_a_name_that_no_saga_of_the_app_has_is_told(terminal: Terminal) -> None:
    """It may be one whose code is gone; more likely it is misspelt."""
    paused = terminal.run("pause", "--saga", "chekout")
    assert paused.exit_code == 0 and "no saga of this app is called chekout" in paused.stderr
    assert "no saga" not in terminal.run("pause", "--saga", "checkout").stderr


@pytest.mark.parametrize(
    "command", [("pause",), ("resume",), ("list",), ("bulk", "cancel", "--yes"), ("prune", "--older-than", "1d")]
)
def test_a_name_that_several_sagas_have_means_none_of_them(
    terminal: Terminal, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.copy(terminal.shop.checkout)
    other.name = "tests.cli.other.checkout"
    monkeypatch.setitem(sagas.sagas, (other.name, 1), other)
    refused = terminal.run(*command, "--saga", "checkout")
    assert refused.exit_code == 1
    assert "several sagas are called 'checkout'; say which: tests.cli.other.checkout, tests.cli.shop" in refused.stderr


def test_a_queue_is_paused_and_resumed(terminal: Terminal) -> None:
    run_id = terminal.start("checkout", "1")
    assert terminal.json("pause", "--queue", "celery") == {"queue": "celery", "ordered": "pause", "changed": True}
    assert terminal.json("explain", run_id)["reasons"][0]["hints"] == ["saga resume --queue celery"]
    assert terminal.json("resume", "--queue", "celery")["changed"]
    assert "is not paused" in terminal.ok("resume", "--queue", "celery")


def test_a_worker_holds_a_saga_that_is_paused_and_lets_it_go(worked: Terminal, asleep: str) -> None:
    worked.ok("pause", "--saga", "nap", "--by", "ann")
    try:
        worked.until(asleep, "paused")
        new = worked.start("nap", "2")
        eventually(lambda: worked.json("show", new)["outstanding"][0]["due_at"] > "3000")
        assert worked.until(new, "pending")
        refused = worked.run("resume", asleep)
        assert refused.exit_code == 1 and "paused with all runs of tests.cli.shop.nap, by ann" in refused.stderr
        findings = json.loads(worked.run("doctor", "--json").stdout)["findings"]  # other tests leave it more to find
        assert "paused-saga" in [found["code"] for found in findings]
    finally:
        worked.ok("resume", "--saga", "nap")
    worked.until(asleep, "running")
    worked.until(new, "running")


@pytest.mark.parametrize("named", [[], ["run", "--saga", "x"], ["--saga", "x", "--queue", "q"]])
def test_what_is_paused_is_one_thing(terminal: Terminal, named: list[str]) -> None:
    assert terminal.run("pause", *named).exit_code == terminal.run("resume", *named).exit_code == 2


def test_a_paused_run_can_be_cancelled(worked: Terminal, asleep: str) -> None:
    worked.ok("pause", asleep)
    worked.until(asleep, "paused")
    worked.ok("cancel", asleep)
    worked.until(asleep, "cancelled")


def test_terminate_undoes_nothing_and_says_what_is_left(worked: Terminal, asleep: str) -> None:
    worked.ok("terminate", asleep, "--by", "ann", "--reason", "wrong tenant")
    left = worked.until(asleep, "terminated")["left_effects"]
    assert [item["key"] for item in left] == [CHARGE]
    assert "not undone" in worked.ok("show", asleep)


@pytest.mark.parametrize("command", ["cancel", "terminate", "pause", "resume", "retry", "skip"])
def test_a_run_that_has_ended_takes_no_orders(worked: Terminal, command: str) -> None:
    run_id = worked.start("checkout", "ok")
    worked.until(run_id, "completed")
    refused = worked.run(command, run_id)
    assert refused.exit_code == 1
    assert f"run {run_id} is completed already" in refused.stderr


def test_retry_tries_the_only_thing_that_is_parked(worked: Terminal, undo_parked: str) -> None:
    said = worked.json("retry", undo_parked, "--by", "ann", "--reason", "the provider is back")
    assert said["key"] == CHARGE
    [retry] = eventually(lambda: _entries(worked, undo_parked, "operator"))
    assert (retry["action"], retry["by"], retry["reason"]) == ("retry", "ann", "the provider is back")


def test_skip_leaves_the_effect(worked: Terminal, undo_parked: str) -> None:
    worked.ok("skip", undo_parked, CHARGE)
    assert [item["key"] for item in worked.until(undo_parked, "failed")["left_effects"]] == [CHARGE]


def test_resolving_an_undo_says_that_it_was_done_by_hand(worked: Terminal, undo_parked: str) -> None:
    worked.ok("resolve", undo_parked, "--reason", "refunded in the shop")
    assert worked.until(undo_parked, "compensated")["left_effects"] == []
    assert "done by hand" in worked.ok("history", undo_parked)


def test_resolving_an_undo_takes_no_result(worked: Terminal, undo_parked: str) -> None:
    assert worked.run("resolve", undo_parked, "--no-effect").exit_code == 2


def test_resolving_a_step_needs_what_became_of_it(worked: Terminal, pivot_parked: str) -> None:
    refused = worked.run("resolve", pivot_parked)
    assert refused.exit_code == 2
    assert "--result JSON or --no-effect" in refused.stderr
    assert worked.run("resolve", pivot_parked, "--no-effect", "--result", "1").exit_code == 2


def test_a_step_is_resolved_with_its_result(worked: Terminal, pivot_parked: str) -> None:
    worked.ok("resolve", pivot_parked, SETTLE, "--result", '"seen in the bank"', "--by", "ann")
    assert worked.until(pivot_parked, "completed")["output"] == "seen in the bank"


def test_a_step_is_resolved_as_not_done(worked: Terminal, pivot_parked: str) -> None:
    worked.ok("resolve", pivot_parked, "--no-effect")
    assert worked.until(pivot_parked, "failed")["left_effects"] == []


def test_a_key_that_is_not_parked_is_refused_with_those_that_are(worked: Terminal, undo_parked: str) -> None:
    refused = worked.run("retry", undo_parked, "nonsense#0")
    assert refused.exit_code == 1
    assert CHARGE in refused.stderr


@pytest.mark.parametrize("command", [["retry"], ["skip"], ["resolve", "--result", "1"], ["retry", "nonsense#0"]])
def test_a_run_that_is_not_parked_is_told_as_that(worked: Terminal, asleep: str, command: list[str]) -> None:
    refused = worked.run(command[0], asleep, *command[1:])
    assert refused.exit_code == 1
    assert f"run {asleep} is not parked, it is running: there is nothing to {command[0]}" in refused.stderr
    assert f"saga explain {asleep}" in refused.stderr


def test_a_run_of_which_a_key_is_parked_is_not_retried_as_a_whole(worked: Terminal, undo_parked: str) -> None:
    refused = worked.run("retry", undo_parked, "")
    assert refused.exit_code == 1
    assert f"run {undo_parked} is not parked as a whole; parked there: '{CHARGE}'" in refused.stderr


def test_a_run_that_parked_as_a_whole_can_be_cancelled(worked: Terminal) -> None:
    run_id = worked.start("buggy", "1")
    worked.until(run_id, "parked")
    worked.ok("cancel", run_id)
    worked.until(run_id, "cancelled")


def test_the_account_at_the_keyboard_is_who_decides(worked: Terminal, asleep: str) -> None:
    worked.ok("cancel", asleep)
    worked.until(asleep, "cancelled")
    [cancel] = _entries(worked, asleep, "cancel")
    assert cancel["by"] == getpass.getuser()
