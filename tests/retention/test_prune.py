"""Retention: what goes, what stays, and that an id is never free again."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from orchestrator import ConflictError, Effect, UnknownRunError, UsageError, saga, step
from orchestrator.client import Client
from orchestrator.retention import Chosen, age, prune
from orchestrator.settings import Settings
from orchestrator.store import pruning
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, start

NOTHING = timedelta(0)
OLD = timedelta(days=90)


@step(effect=Effect.NONE)
def note(text: str) -> str:
    if text == "bad":
        raise ValueError(text)
    return text


@saga.define(name="retention.plain")
async def plain(text: str) -> str:
    said: str = await saga.step(note.with_options(retry=None), text)
    return said


@saga.define(name="retention.waiting")
async def waiting() -> None:
    await saga.wait_signal("go")


@saga.define(name="retention.family")
async def family(wait: bool) -> None:
    await saga.child(plain, "child")
    if wait:
        await saga.wait_signal("go")


@saga.define(name="retention.linked")
async def linked(left: int) -> int:
    if left:
        saga.continue_as_new(left - 1)
    return left


def count(connection: Connection, table: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM orchestrator.{table}").fetchone()  # type: ignore[arg-type]
    assert row
    return int(row[0])


def ids(connection: Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT id FROM orchestrator.runs ORDER BY id").fetchall()]


def grow_old(connection: Connection, *run_ids: str) -> None:
    connection.execute(
        "UPDATE orchestrator.runs SET started_at = started_at - interval '100 days', "
        "finished_at = finished_at - interval '100 days' WHERE id = ANY (%s)",
        [list(run_ids)],
    )


@pytest.fixture
def client(database_url: str) -> Client:
    return Client(Settings.from_environment({}, database_url=database_url), lambda queue, times: None, lambda: "celery")


def test_what_has_ended_long_ago_goes_with_its_journal_and_nothing_else(connection: Connection, child: Child) -> None:
    for run_id in ("old", "young"):
        start(connection, plain, "x", run_id=run_id)
    start(connection, waiting, run_id="alive")
    child.drain()
    grow_old(connection, "old", "alive")
    told = prune(connection, Chosen(OLD))
    assert (dict(told.gone), told.kept) == ({("retention.plain", "completed"): 1}, 0)
    assert ids(connection) == ["alive", "young"]
    assert connection.execute("SELECT DISTINCT run_id FROM orchestrator.journal ORDER BY 1").fetchall() == [
        ("alive",), ("young",),
    ]  # fmt: skip


def test_filters_choose_by_state_and_saga_and_a_dry_run_leaves_all(connection: Connection, child: Child) -> None:
    for number in range(4):
        start(connection, plain, "x", run_id=f"good-{number}")
    start(connection, linked, 0, run_id="other")
    child.drain()
    assert prune(connection, Chosen(NOTHING), dry_run=True).total == 5
    assert len(ids(connection)) == 5 and count(connection, "pruned") == 0
    assert prune(connection, Chosen(NOTHING, states=("failed",))).total == 0
    assert prune(connection, Chosen(NOTHING, saga="retention.linked")).total == 1
    assert prune(connection, Chosen(NOTHING, limit=3)).total == 3
    assert ids(connection) == ["good-3"]


def test_children_and_links_stay_while_their_run_lives_and_go_with_it(connection: Connection, child: Child) -> None:
    start(connection, family, True, run_id="parent")
    start(connection, linked, 3, run_id="linked")
    child.drain()
    whole = ids(connection)
    assert whole == ["linked", "linked~1", "linked~2", "linked~3", "parent", *whole[5:]] and len(whole) == 6
    assert prune(connection, Chosen(NOTHING, saga="retention.plain")).total == 0
    assert prune(connection, Chosen(NOTHING)).total == 4
    assert ids(connection) == whole[4:]
    connection.execute("DELETE FROM orchestrator.runs WHERE id = 'parent'")  # nobody's children are not chosen either
    assert prune(connection, Chosen(NOTHING)).total == 0


def test_nothing_goes_of_a_run_of_which_something_is_outstanding(connection: Connection, child: Child) -> None:
    start(connection, family, False, run_id="parent")
    child.drain()
    connection.execute(
        "INSERT INTO orchestrator.arrivals (run_id, arrival) SELECT max(id), '{}' FROM orchestrator.runs"
    )
    told = prune(connection, Chosen(NOTHING))
    assert (told.total, told.kept, len(ids(connection))) == (0, 2, 2)


def test_an_id_is_never_free_again(connection: Connection, child: Child, client: Client) -> None:
    client.start(plain, ("x",), {}, {"task_id": "mine"})
    child.drain()
    client.prune(NOTHING)
    for text in ("x", "y"):
        with pytest.raises(ConflictError, match=r"mine belonged to a run of retention.plain that ended completed"):
            client.start(plain, (text,), {}, {"task_id": "mine"})
    with connection.transaction(), pytest.raises(ConflictError, match="was pruned"):
        client.start(plain, ("x",), {}, {"task_id": "mine", "transaction": connection})
    with pytest.raises(ConflictError, match="was pruned"):
        client.start_many(plain, [("x",)], {"task_ids": ["mine"]})
    assert (ids(connection), count(connection, "work"), count(connection, "journal")) == ([], 0, 0)
    for ask in (lambda: client.handle(plain, "mine").status, lambda: client.handle(plain, "mine").get(timeout=30)):
        with pytest.raises(UnknownRunError, match=r"'mine' of retention.plain ended completed and was pruned on 20"):
            ask()
    with pytest.raises(UnknownRunError, match="there is no run 'never' in this database"):
        client.handle(plain, "never").get(timeout=30)
    client.pool.close()


def test_the_archive_holds_what_goes_before_it_goes(connection: Connection, child: Child, tmp_path: Path) -> None:
    for number in range(3):
        start(connection, plain, "x", run_id=f"r{number}")
    child.drain()
    told = prune(connection, Chosen(NOTHING), archive=tmp_path / "new" / "folder")
    assert told.archive
    lines = [json.loads(line) for line in Path(told.archive).read_text().splitlines()]
    assert [line["id"] for line in lines] == ["r0", "r1", "r2"]
    assert all(line["row"]["state"] == "completed" and line["journal"] for line in lines)


def test_without_an_archive_that_can_be_written_nothing_goes(
    connection: Connection, child: Child, tmp_path: Path
) -> None:
    start(connection, plain, "x")
    child.drain()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write to the archive"):
        prune(connection, Chosen(NOTHING), archive=tmp_path / "file")
    assert (ids(connection), count(connection, "pruned")) == (["run"], 0)


def test_an_archive_that_gets_full_keeps_what_it_was_to_hold(
    connection: Connection, child: Child, tmp_path: Path
) -> None:
    start(connection, plain, "x")
    child.drain()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # as a disk that is full
    try:
        with pytest.raises(UsageError, match=r"cannot write to the archive: .*; what it was to hold stays"):
            prune(connection, Chosen(NOTHING), archive=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (ids(connection), count(connection, "pruned")) == (["run"], 0)


def test_many_runs_go_in_transactions_of_a_few_hundred(
    connection: Connection, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.execute(
        "INSERT INTO orchestrator.runs (id, saga, version, state, input, root_id, queue, started_at, finished_at) "
        "SELECT 'r' || n, 's', 1, 'failed', '{}', 'r' || n, 'q', now(), now() FROM generate_series(1, 1000) n"
    )
    connection.execute(  # one family that is larger than a page
        "INSERT INTO orchestrator.runs (id, saga, version, state, input, root_id, parent_id, queue, started_at, "
        "finished_at) SELECT 'r1/' || n, 's', 1, 'failed', '{}', 'r1', 'r1', 'q', now(), now() "
        "FROM generate_series(1, 700) n"
    )
    seen: list[tuple[int, bool]] = []
    whole: Callable[..., bool] = pruning.delete

    def watched(connection: Connection, members: list[pruning.Member]) -> bool:
        seen.append((len(members), "r1" in [each.id for each in members]))
        return whole(connection, members)

    monkeypatch.setattr(pruning, "delete", watched)
    assert prune(connection, Chosen(NOTHING)).total == 1700
    assert (count(connection, "runs"), count(connection, "pruned")) == (0, 1700)
    assert max(size for size, _ in seen) <= 300
    assert [has for size, has in seen].index(True) >= 2  # the head goes after the 700


def test_a_late_effect_that_is_noted_meanwhile_keeps_its_run(
    connection: Connection, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(connection, plain, "x")
    child.drain()
    bury = pruning.bury

    def late(connection: Connection, *args: object) -> None:
        bury(connection, *args)  # type: ignore[arg-type]
        connection.execute("UPDATE orchestrator.runs SET position = position + 1")

    monkeypatch.setattr(pruning, "bury", late)
    told = prune(connection, Chosen(NOTHING))
    assert (told.total, told.kept, ids(connection)) == (0, 1, ["run"])


def test_ages_are_text() -> None:
    assert (age("90d"), age("12h"), age("2w")) == (timedelta(90), timedelta(hours=12), timedelta(14))
    for wrong in ("", "90", "d", "-1d", "1y", "999999999w", "1d 2h"):
        with pytest.raises(UsageError, match="is no age"):
            age(wrong)
    with pytest.raises(UsageError, match="running"):
        Chosen(NOTHING, states=("running",))


def test_one_state_is_given_in_a_list(client: Client) -> None:
    with pytest.raises(UsageError, match=r"list of states, such as \['failed'\]"):
        client.prune(NOTHING, states="failed")
