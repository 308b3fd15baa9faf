"""What holds for every command: help with exit codes, errors as one sentence, migrate."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import psycopg
import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from orchestrator.cli import saga
from orchestrator.cli.command import Command, console, print_json
from tests.cli.conftest import ROOT, Terminal

COMMANDS = ["dev", "migrate", "start", "list", "show", "history", "explain", "signal", "cancel", "terminate", "pause",
            "resume", "retry", "skip", "resolve", "bulk", "schedules", "doctor", "reconcile", "prune", "diagram",
            "lint", "replay"]  # fmt: skip


def test_these_are_the_commands() -> None:
    assert saga.list_commands(click.Context(saga)) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_states_the_exit_codes_within_80_columns(command: str) -> None:
    said = CliRunner(env={"COLUMNS": "80"}).invoke(saga, [command, "--help"])
    assert said.exit_code == 0
    assert "Exit codes: 0" in " ".join(said.stdout.split())
    assert max(map(len, said.stdout.splitlines())) <= 80


def test_an_app_without_an_orchestrator_is_told_what_to_do() -> None:
    context = CLIContext(Celery("bare", set_as_current=False), no_color=False, workdir=None)
    refused = CliRunner().invoke(saga, ["list"], obj=context)
    assert refused.exit_code == 1
    assert "create one with `Orchestrator(app)`" in refused.stderr


def test_a_database_without_schema_names_migrate_and_migrate_makes_it(
    on: object, empty_database_url: str, broker_url: str
) -> None:
    terminal: Terminal = on(empty_database_url, broker_url)  # type: ignore[operator]
    refused = terminal.run("list")
    assert refused.exit_code == 1
    assert "saga migrate" in refused.stderr
    assert "0001" in terminal.ok("migrate")
    assert terminal.ok("migrate") == "The orchestrator schema is up to date.\n"
    assert terminal.json("migrate") == {"applied": []}
    assert terminal.json("list") == []


def test_a_database_that_refuses_is_one_sentence(on: object, empty_database_url: str, broker_url: str) -> None:
    """Such as for a role that may not read."""
    terminal: Terminal = on(empty_database_url, broker_url)  # type: ignore[operator]
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA orchestrator")
        connection.execute(
            "CREATE VIEW orchestrator.alembic_version AS SELECT 1 / (now() = 'epoch')::int AS version_num"
        )
    for command, code in (("list", 1), ("doctor", 2)):
        refused = terminal.run(command)
        assert refused.exit_code == code, refused.output
        assert "Postgres refuses: division by zero" in refused.output and "Traceback" not in refused.output


def test_a_database_that_does_not_answer_is_one_sentence(on: object, broker_url: str) -> None:
    terminal: Terminal = on("postgresql://nobody@127.0.0.1:1/nothing", broker_url)  # type: ignore[operator]
    refused = terminal.run("list")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: Postgres cannot be reached") and "Traceback" not in refused.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "--saga"), ("list", "--where", "tenant="), ("bulk", "cancel", "--saga"), ("bulk", "retry", "--step"),
        ("bulk", "cancel", "--where", "tenant="), ("prune", "--older-than", "1d", "--saga"), ("replay", "--saga"),
        ("start",), ("start", "checkout", '[{"id": "1"}]', "--id"), ("pause", "--saga"), ("resume", "--queue"),
        ("pause", "--queue", "celery", "--reason"), ("schedules", "pause"), ("schedules", "trigger"),
        ("schedules", "pause", "orchestrator.reconcile", "--reason"), ("reconcile",), ("doctor", "--by"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_words_that_are_not_utf_8_are_no_traceback(terminal: Terminal, arguments: tuple[str, ...]) -> None:
    """A shell hands bytes that are not UTF-8 on as lone surrogates."""
    *given, last = arguments
    words = [*given, f"{last}\udcff"] if last.endswith("=") else [*arguments, "\udcff"]
    said = terminal.run(*words)
    assert said.exception is None or isinstance(said.exception, SystemExit), said.exception
    assert "Traceback" not in said.output


@click.command(cls=Command)
@click.option("--json", "json_", is_flag=True)
@click.pass_context
def speak(ctx: click.Context, json_: bool) -> None:
    if json_:
        print_json({"id": "späte → 1"})
    else:
        console(ctx).print("späte → 1")


def test_what_a_terminal_cannot_show_is_left_out_and_json_stays_whole() -> None:
    """In a locale that is not UTF-8; the error was that what the user had said was not UTF-8."""
    assert CliRunner(charset="latin-1").invoke(speak).output == "späte ? 1\n"
    assert json.loads(CliRunner(charset="latin-1").invoke(speak, ["--json"]).output) == {"id": "späte → 1"}


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["--help"], ["list", "--help"]], ids=" ".join)
def test_output_that_cannot_be_written_is_one_sentence(terminal: Terminal, arguments: list[str]) -> None:
    """Such as to a disk that is full."""
    terminal.start("checkout", "1")
    command = [sys.executable, "-m", "celery", "-A", "tests.cli.shop", "saga", *arguments]
    environment = {**os.environ, **terminal.environment, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        refused = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (refused.returncode, refused.stderr) == (1, "Error: nothing can be written: No space left on device\n")


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["--help"]], ids=" ".join)
def test_an_output_that_is_closed_is_no_error(terminal: Terminal, arguments: list[str]) -> None:
    """``>&-`` says that nobody wants to know; an order that is given so is to be given."""
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "celery", "-A", "tests.cli.shop", "saga"]
    environment = {**os.environ, **terminal.environment, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert (said.returncode, said.stderr) == (0, "")
