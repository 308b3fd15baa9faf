"""bulk: what will be done is said first; nobody who cannot be asked is taken to agree."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from tests.cli.conftest import ROOT, Terminal


@pytest.fixture
def three(terminal: Terminal) -> list[str]:
    """Runs that nobody works on."""
    return [terminal.start("checkout", f"{number}", "--id", f"run-{number}") for number in range(3)]


def test_a_dry_run_lists_runs_by_saga_and_state_with_examples(terminal: Terminal, three: list[str]) -> None:
    said = terminal.ok("bulk", "cancel", "--saga", "checkout", "--dry-run")
    assert "tests.cli.shop.checkout" in said and "pending" in said
    assert "3 of 3 runs can be told to stop and to undo what they did (run-0, run-1, run-2)." in said
    found = terminal.json("bulk", "cancel", "--state", "pending", "--dry-run")
    assert (found["told"], found["total"], found["dry_run"]) == (3, 3, True)


def test_with_yes_it_is_done_and_counted(terminal: Terminal, three: list[str]) -> None:
    assert "2 runs were paused." in terminal.ok("bulk", "pause", "--all", "--limit", "2", "--yes")
    refused = terminal.ok("bulk", "resume", "--all", "--yes")
    assert "0 of 3 runs can be told to go on." in refused and "3 cannot: not paused." in refused


def test_where_there_is_nobody_to_ask_nothing_is_done(terminal: Terminal, three: list[str]) -> None:
    refused = terminal.run("bulk", "cancel", "--all")
    assert refused.exit_code == 2 and "say --yes" in refused.stderr


@pytest.mark.parametrize(("answer", "code", "told"), [(b"y\n", 0, True), (b"n\n", 1, False)])
def test_on_a_terminal_it_asks(terminal: Terminal, three: list[str], answer: bytes, code: int, told: bool) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "celery", "-A", "tests.cli.shop", "saga", "bulk", "terminate", "--all"]
    environment = {**os.environ, **terminal.environment, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
                          env=environment) as asked:  # fmt: skip
        os.write(ours, answer)
        said = asked.communicate(timeout=60)[0].decode()
    os.close(ours)
    os.close(theirs)
    assert asked.returncode == code, said
    assert "Shall 3 runs be told to stop without undoing anything?" in said
    assert ("3 runs were told" in said) is told


@pytest.mark.parametrize(
    "wrong", [["cancel"], ["cancel", "--where", "x"], ["cancel", "--started-after", "soon"], ["resolve", "--all"]]
)
def test_what_cannot_be_meant_is_refused(terminal: Terminal, wrong: list[str]) -> None:
    assert terminal.run("bulk", *wrong, "--yes").exit_code in (1, 2)


def test_there_may_be_no_such_runs(terminal: Terminal) -> None:
    assert terminal.ok("bulk", "cancel", "--saga", "nobody", "--yes") == "There are no such runs.\n"


def test_an_order_for_nobody_is_no_dry_run(terminal: Terminal) -> None:
    told = terminal.json("bulk", "cancel", "--all", "--yes")
    assert (told["told"], told["dry_run"]) == (0, False)
    assert "say --all" in terminal.run("bulk", "cancel", "--yes").stderr


def test_runs_are_listed_by_their_tags(terminal: Terminal, three: list[str]) -> None:
    client = terminal.shop.orchestrator.client
    client.start(terminal.shop.nap, ({"id": "x"},), {}, {"task_id": "tagged", "tags": {"tenant": "acme", "size": 7}})
    for where in (["tenant=acme"], ["size=7"], ["tenant=acme", "size=7"]):
        options = [option for each in where for option in ("--where", each)]
        assert [run["id"] for run in terminal.json("list", *options)] == ["tagged"]
    assert terminal.json("list", "--where", "tenant=other") == []


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_a_tag_may_look_like_what_json_does_not_have(terminal: Terminal, text: str) -> None:
    client = terminal.shop.orchestrator.client
    client.start(terminal.shop.nap, ({"id": "x"},), {}, {"task_id": "tagged", "tags": {"name": text}})
    assert [run["id"] for run in terminal.json("list", "--where", f"name={text}")] == ["tagged"]


@pytest.mark.parametrize("command", [("list",), ("bulk", "cancel", "--yes")])
def test_two_values_for_one_tag_are_refused(terminal: Terminal, command: tuple[str, ...]) -> None:
    """The first would be forgotten, and an order go to runs that were not meant."""
    refused = terminal.run(*command, "--where", "tenant=acme", "--where", "tenant=other")
    assert refused.exit_code == 2 and "cannot be both 'acme' and 'other'" in refused.stderr
    assert terminal.run(*command, "--where", "tenant=acme", "--where", "tenant=acme").exit_code == 0
