"""start, list, show, history, diagram: what a person sees of runs."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from tests.cli.conftest import Terminal


def test_start_prints_the_id_and_nothing_else(terminal: Terminal) -> None:
    assert terminal.start("tests.cli.shop.checkout", "1", "--id", "order-1") == "order-1"


def test_a_saga_may_be_named_by_its_last_part(terminal: Terminal) -> None:
    assert terminal.json("start", "checkout", '[{"id": "1"}]')["saga"] == "tests.cli.shop.checkout"


def test_the_same_id_with_other_input_is_refused_in_one_sentence(terminal: Terminal) -> None:
    terminal.start("checkout", "1", "--id", "order-1")
    refused = terminal.run("start", "checkout", '[{"id": "2"}]', "--id", "order-1")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: run order-1") and "conflict" in refused.stderr
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["checkout", "{"], """write for example '["order-42", 3]'"""),
        (["checkout", "order-7"], """write for example '["order-7"]'"""),
        (["checkout", '{"id": 1}'], "not of the form"),
        (["checkout"], "missing a required argument: 'order'"),
        (["checkout", '[{"amount": 3}]'], "parameter 'order'"),
    ],
)
def test_arguments_that_do_not_fit_are_wrong_usage(terminal: Terminal, arguments: list[str], said: str) -> None:
    refused = terminal.run("start", *arguments)
    assert refused.exit_code == 2
    assert said in refused.stderr


def test_a_text_without_its_quotes_is_shown_with_them(terminal: Terminal) -> None:
    refused = terminal.run("signal", "order-7", "approved", "ann")
    assert refused.exit_code == 2
    assert """'ann' is not JSON""" in refused.stderr and """write for example '"ann"'""" in refused.stderr


def test_arguments_that_do_not_fit_come_with_an_example_that_does(terminal: Terminal) -> None:
    said = terminal.run("start", "checkout").stderr
    example = said.partition("saga start tests.cli.shop.checkout '")[2].rpartition("'")[0]
    assert terminal.run("start", "checkout", example).exit_code == 0


def test_an_unknown_saga_is_named_with_those_that_are_known(terminal: Terminal) -> None:
    refused = terminal.run("start", "nothing")
    assert refused.exit_code == 1
    assert "no saga named 'nothing'" in refused.stderr and "tests.cli.shop.checkout" in refused.stderr


def test_waiting_prints_the_result(worked: Terminal) -> None:
    said = worked.ok("start", "checkout", '[{"id": "ok"}]', "--wait", "20")
    assert said.splitlines()[1] == 'completed: "shipped"'


def test_waiting_for_a_run_that_fails_exits_with_1(worked: Terminal) -> None:
    failed = worked.run("start", "checkout", '[{"id": "bad"}]', "--wait", "20", "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["state"] == "compensated"


def test_the_error_inside_of_a_task_group_is_told(worked: Terminal) -> None:
    failed = worked.run("start", "side_by_side", '[{"id": "bad"}]', "--wait", "30")
    run_id, inner = (
        failed.stdout.strip(),
        "ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception): StepFailed",
    )
    assert f"ended failed: {inner}: step 0/tests.cli.shop.ship#0 of run {run_id} ended failed" in failed.stderr
    shown = worked.run("show", run_id, columns=1000).stdout
    assert inner in shown and "ValueError: no such address" in shown
    assert inner in worked.run("history", run_id, columns=1000).stdout


def test_a_negative_time_to_wait_starts_nothing(terminal: Terminal) -> None:
    said = terminal.run("start", "nap", '[{"id": "1"}]', "--id", "hurried", "--wait", "-1")
    assert (said.exit_code, terminal.run("show", "hurried").exit_code) == (2, 1)


def test_waiting_too_long_says_how_to_ask_again(terminal: Terminal) -> None:
    late = terminal.run("start", "nap", '[{"id": "1"}]', "--id", "late", "--wait", "0.01")
    assert late.exit_code == 1
    assert "saga explain late" in late.stderr


def test_list_shows_the_newest_first_within_80_columns(terminal: Terminal) -> None:
    first, second = terminal.start("checkout", "1"), terminal.start("nap", "2")
    lines = terminal.ok("list").splitlines()
    assert lines[0].split() == ["RUN", "SAGA", "STATE", "STARTED", "TOOK"]
    assert [line.split()[:3] for line in lines[1:]] == [[second, "nap", "pending"], [first, "checkout", "pending"]]
    assert max(map(len, lines)) <= 80


def test_what_looks_like_markup_is_shown_as_it_is(terminal: Terminal) -> None:
    run_id = "a[/b] [true] :car:"
    terminal.start("checkout", "[true, false] [/x] :car:", "--id", run_id)
    assert run_id in terminal.ok("list")
    shown = terminal.ok("show", run_id)
    assert run_id in shown and "[true, false] [/x] :car:" in shown


def test_list_filters_by_state_and_saga_and_says_that_there_is_more(terminal: Terminal) -> None:
    for number in range(3):
        terminal.start("checkout", str(number), "--id", f"c{number}")
    terminal.start("nap", "1", "--id", "n")
    assert [run["id"] for run in terminal.json("list", "--saga", "nap")] == ["n"]
    assert terminal.json("list", "--state", "parked", "--state", "completed") == []
    assert len(terminal.json("list", "--limit", "2")) == 2
    assert "--limit 20" in terminal.ok("list", "--limit", "2")
    assert terminal.ok("list", "--state", "parked") == "There are no runs like that.\n"


def test_list_refuses_a_state_that_there_is_not(terminal: Terminal) -> None:
    assert terminal.run("list", "--state", "nonsense").exit_code == 2


def test_show_tells_all_about_a_run_that_ended(worked: Terminal) -> None:
    run_id = worked.start("checkout", "ok")
    worked.until(run_id, "completed")
    said = worked.ok("show", run_id)
    for part in ("tests.cli.shop.checkout, version 1", "completed", 'order={"id": "ok"', '"shipped"', "took"):
        assert part in said
    assert "explain" not in said


def test_history_tells_of_every_step_how_long_it_took(worked: Terminal) -> None:
    run_id = worked.start("checkout", "ok")
    worked.until(run_id, "completed")
    settled = [event for event in worked.json("history", run_id) if event["kind"] == "settled"]
    assert len(settled) > 1
    assert all(event["began"] < event["at"] for event in settled)


def test_show_tells_what_a_run_shows_of_itself_and_its_tags(terminal: Terminal) -> None:
    client = terminal.shop.orchestrator.client
    client.start(terminal.shop.nap, ({"id": "x"},), {}, {"task_id": "shown", "tags": {"tenant": "acme", "size": 7}})
    assert "progress" not in terminal.ok("show", "shown") and "published" not in terminal.ok("show", "shown")
    published = {"progress": {"done": 3, "total": 10, "note": "on the way"}, "last": [1, 2]}
    with psycopg.connect(terminal.database_url) as connection:
        connection.execute("UPDATE orchestrator.runs SET published = %s", [json.dumps(published)])
    said = " ".join(terminal.ok("show", "shown").split())
    for part in ('tags size=7, tenant="acme"', "progress 3 of 10, on the way", "published last=[1, 2]"):
        assert part in said
    with psycopg.connect(terminal.database_url) as connection:
        connection.execute("UPDATE orchestrator.runs SET published = %s", [json.dumps({"progress": "half"})])
    assert 'published progress="half"' in " ".join(terminal.ok("show", "shown").split())


def test_show_lists_what_is_outstanding(terminal: Terminal) -> None:
    run_id = terminal.start("checkout", "1")
    assert "(next turn)" in terminal.ok("show", run_id)
    [work] = terminal.json("show", run_id)["outstanding"]
    assert (work["role"], work["queue"], work["begun"]) == ("turn", "celery", False)


@pytest.mark.parametrize("command", ["show", "history", "explain", "cancel", "terminate", "retry", "diagram"])
def test_a_run_that_is_not_there_is_one_sentence_and_exit_code_1(terminal: Terminal, command: str) -> None:
    missing = terminal.run(command, "nowhere")
    assert missing.exit_code == 1
    assert missing.stderr == "Error: there is no run 'nowhere' in this database; look it up with `saga list`\n"


@pytest.mark.parametrize("command", ["show", "history", "explain", "cancel", "diagram"])
def test_what_is_no_text_is_no_run(terminal: Terminal, command: str) -> None:
    """A shell hands bytes that are not UTF-8 on as lone surrogates."""
    missing = terminal.run(command, "\udcff")
    assert missing.exit_code == 1
    assert missing.stderr.startswith("Error: there is no run '\\udcff' in this database")


@pytest.fixture
def compensated(worked: Terminal) -> str:
    """A run that was undone."""
    run_id = worked.start("checkout", "bad")
    worked.until(run_id, "compensated")
    return run_id


def test_history_tells_input_attempts_output_and_undo_in_order(worked: Terminal, compensated: str) -> None:
    said = worked.ok("history", compensated)
    order = [
        "shop.charge#0 asked with",
        'result "charge of bad"',
        "shop.ship#0 attempt 1 failed",
        "ValueError: no such address",
        "rollback begins",
        "undo of tests.cli.shop.charge#0 asked: refund",
        "undo of tests.cli.shop.charge#0 done",
        "compensated",
    ]
    places = [said.find(part) for part in order]
    assert -1 not in places and places == sorted(places), said
    assert "Traceback" not in said
    assert max(map(len, said.splitlines())) <= 80


def test_a_run_that_is_cancelled_before_its_start_took_no_time(worked: Terminal) -> None:
    run_id = worked.start("nap", "1", "--countdown", "5400")
    worked.ok("cancel", run_id)
    worked.until(run_id, "cancelled")
    lines = worked.ok("show", run_id).splitlines()
    assert [line.split()[0] for line in lines if "(in " in line] == ["starts"]
    assert [line for line in lines if line.startswith("finished") and line.rstrip().endswith(", before its start")]
    assert ", before its start, which was set for " in worked.json("explain", run_id)["reasons"][0]["text"]
    told = worked.ok("history", run_id).splitlines()
    assert told[1].startswith("its start was set for ") and told[3].startswith("-1 h")
    [listed] = [line for line in worked.ok("list", "--state", "cancelled").splitlines() if run_id[:20] in line]
    assert listed.partition("cancelled")[2].split()[:3] == ["in", "1", "h"]
    assert len(listed.partition("cancelled")[2].split()) <= 5, "it took nothing"


def test_history_shows_tracebacks_when_asked(worked: Terminal, compensated: str) -> None:
    assert "Traceback (most recent call last)" in worked.ok("history", compensated, "--traceback")


def test_history_in_json_has_an_object_for_each_entry(worked: Terminal, compensated: str) -> None:
    entries: list[dict[str, Any]] = worked.json("history", compensated)
    kinds = [entry["kind"] for entry in entries]
    assert kinds[:2] == ["asked", "settled"] and kinds[-1] == "ended"
    assert entries[1]["result"] == "charge of bad" and entries[1]["seconds"] >= 0


def test_diagram_draws_what_happened(worked: Terminal, compensated: str) -> None:
    drawing = worked.ok("diagram", compensated).splitlines()
    assert drawing[:2] == ["sequenceDiagram", "    participant saga as checkout"]
    assert "    t1-->>saga: \"charge of bad\"" in drawing  # fmt: skip
    assert "    saga->>t3: undo charge#35;0" in drawing
    assert drawing[-1] == "    Note over saga: compensated"


def test_diagram_of_the_states_has_every_transition(terminal: Terminal) -> None:
    from orchestrator.machine.states import RUN_TRANSITIONS

    drawing = terminal.ok("diagram", "--states")
    assert drawing.startswith("stateDiagram-v2\n    [*] --> pending\n")
    for state, moves in RUN_TRANSITIONS.items():
        assert all(f"    {state} --> {target}: {event}\n" in drawing for event, target in moves.items())


def test_diagram_needs_a_run_or_states(terminal: Terminal) -> None:
    assert terminal.run("diagram").exit_code == 2


def test_nothing_is_coloured_where_there_is_no_terminal(worked: Terminal, compensated: str) -> None:
    for command in (["list"], ["show", compensated], ["history", compensated], ["explain", compensated]):
        assert "\x1b" not in worked.ok(*command)
