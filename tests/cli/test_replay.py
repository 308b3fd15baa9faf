"""saga replay: recorded runs against today's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Rejected, saga, testing
from tests.cli.conftest import Terminal


@pytest.fixture
def histories(shop: Any, tmp_path: Path) -> Path:
    """A folder with a run that completed and one that was undone."""
    for name, stubs in (("done", {}), ("undone", {shop.ship: Rejected("no such address")})):
        run = testing.run(shop.checkout, shop.Order(id=name), stubs=stubs, task_id=name)
        (tmp_path / f"{name}.json").write_text(json.dumps(run.history))
    return tmp_path


def lines_of(terminal: Terminal, *arguments: str) -> list[str]:
    """Run a replay that fails; returns what it printed."""
    failed = terminal.run("replay", *arguments)
    assert failed.exit_code == 1, failed.output
    return [" ".join(line.split()) for line in failed.stdout.splitlines()]


def begins(lines: list[str], text: str) -> bool:
    return any(line.startswith(text) for line in lines)


def test_runs_that_fit_are_told_and_exit_with_0(terminal: Terminal, histories: Path) -> None:
    lines = terminal.ok("replay", "--from", str(histories)).splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == [
        "fits  tests.cli.shop.checkout@1 done",
        "fits  tests.cli.shop.checkout@1 undone",
    ]
    assert lines[2] == "2 of 2 runs fit this code."


def test_a_new_step_is_a_difference(
    terminal: Terminal, histories: Path, shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def checkout(order: Any) -> Any:
        await saga.step(shop.flaky, order)
        await saga.step(shop.charge, order)
        return await saga.step(shop.ship, order)

    monkeypatch.setattr(shop.checkout, "function", checkout)
    lines = lines_of(terminal, "--from", str(histories))
    assert begins(lines, "drift tests.cli.shop.checkout@1 done")
    assert begins(lines, '- tests.cli.shop.charge#0 with {"order":')
    assert begins(lines, '+ tests.cli.shop.flaky#0 with {"order":')
    assert lines[-1] == "0 of 2 runs fit this code."


def test_other_arguments_are_a_difference(
    terminal: Terminal, histories: Path, shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def checkout(order: Any) -> Any:
        await saga.step(shop.charge, order)
        return await saga.step(shop.ship, order.model_copy(update={"amount": 2}))

    monkeypatch.setattr(shop.checkout, "function", checkout)
    lines = lines_of(terminal, "--from", str(histories / "done.json"))
    assert begins(lines, "tests.cli.shop.charge#0")  # what is still the same
    assert begins(lines, '- tests.cli.shop.ship#0 with {"order":{"id":"done","amount":1}}')
    assert begins(lines, '+ tests.cli.shop.ship#0 with {"order":{"id":"done","amount":2}}')


def test_a_step_that_is_gone_is_a_difference(
    terminal: Terminal, histories: Path, shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def checkout(order: Any) -> Any:
        return await saga.step(shop.charge, order)

    monkeypatch.setattr(shop.checkout, "function", checkout)
    lines = lines_of(terminal, "--from", str(histories / "done.json"))
    assert begins(lines, "- tests.cli.shop.ship#0")
    assert begins(lines, "+ (the saga function ends here)")


def test_code_that_raises_is_told(
    terminal: Terminal, histories: Path, shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def checkout(order: Any) -> Any:
        await saga.step(shop.charge, order)
        return order.nothing_like_it

    monkeypatch.setattr(shop.checkout, "function", checkout)
    lines = lines_of(terminal, "--from", str(histories / "undone.json"))
    assert begins(lines, "+ (the saga function raises AttributeError: 'Order' object has no attribute")


def test_programs_get_json(terminal: Terminal, histories: Path) -> None:
    [done, undone] = terminal.json("replay", "--from", str(histories))
    assert (done["id"], done["fits"], done["problem"]) == ("done", True, "")
    assert undone["rows"] == 4


def test_a_saga_that_is_not_here_does_not_pass(terminal: Terminal, histories: Path) -> None:
    file = histories / "done.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 7}))
    assert any("version 7" in line and "is not registered here" in line for line in lines_of(
        terminal, "--from", str(file)))  # fmt: skip


def test_nothing_to_replay_does_not_pass(terminal: Terminal, tmp_path: Path) -> None:
    assert "nothing was proved" in lines_of(terminal, "--from", str(tmp_path))[0]
    assert "nothing was proved" in lines_of(terminal)[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"saga": "s"}'])
def test_a_file_that_is_no_recorded_run_is_one_sentence(terminal: Terminal, tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    refused = terminal.run("replay", "--from", str(file))
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"Error: {file} ")


def test_a_file_that_is_not_there_is_wrong_usage(terminal: Terminal) -> None:
    assert terminal.run("replay", "--from", "/nowhere.json").exit_code == 2


def test_runs_of_the_database_are_replayed_and_saved(worked: Terminal, tmp_path: Path) -> None:
    run_id = worked.start("checkout", "replayed")
    worked.until(run_id, "completed")
    assert "1 of 1 runs fit" in worked.ok("replay", run_id, "--save", str(tmp_path))
    [file] = tmp_path.iterdir()
    assert file.name == f"tests.cli.shop.checkout@1-{run_id}.json"
    assert "1 of 1 runs fit" in worked.ok("replay", "--from", str(tmp_path), "--saga", "checkout")
    found = worked.json("replay", "--saga", "checkout", "--state", "completed", "--limit", "1")
    assert [(each["saga"], each["fits"]) for each in found] == [("tests.cli.shop.checkout", True)]


def test_each_run_is_saved_as_a_file_of_its_own(terminal: Terminal, tmp_path: Path) -> None:
    ids = ["a/b", "a_b", "ü" * 250, "ü" * 249]
    for run_id in ids:
        terminal.start("checkout", "1", "--id", run_id)
    assert "4 of 4 runs fit" in terminal.ok("replay", *ids, "--save", str(tmp_path))
    assert {json.loads(file.read_text())["id"] for file in tmp_path.iterdir()} == {*ids}


def test_a_folder_that_cannot_be_written_is_one_sentence(terminal: Terminal, histories: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = terminal.run("replay", "--from", str(histories / "done.json"), "--save", str(tmp_path / "file" / "folder"))
    assert failed.exit_code == 1
    assert failed.stderr.startswith("Error: nothing can be saved in ") and "Not a directory" in failed.stderr


def test_an_unknown_run_is_one_sentence(terminal: Terminal) -> None:
    refused = terminal.run("replay", "nobody")
    assert refused.exit_code == 1
    assert refused.stderr == "Error: there is no run 'nobody' in this database; look it up with `saga list`\n"
