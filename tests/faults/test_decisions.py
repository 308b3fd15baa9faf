"""Decisions that race: cancel, completion and deadline of one run, operators, and what lies in the way of others."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest

from orchestrator.errors import OrchestratorError
from tests.acceptance.running import until
from tests.faults import sagas
from tests.faults.load import QUEUE
from tests.faults.scene import BARE, LOADED, Scene
from tests.faults.steps import Stop

# By which of the three each of the runs has ended.
_WINNERS = """
SELECT DISTINCT CASE WHEN state IN ('completed', 'cancelled', 'terminated') THEN state
    WHEN error ->> 'type' = 'DeadlineExceeded' THEN 'expired' ELSE error::text END
FROM orchestrator.runs
"""
_UNENDED = "SELECT count(*) FROM orchestrator.runs WHERE finished_at IS NULL"


def test_cancel_completion_and_deadline_of_one_run_agree_on_one_end(scene: Scene) -> None:
    """Again and again, at moments that the dice choose, until each of them has won."""
    scene.start_workers(2)
    dice = random.Random(3)
    stops = [Stop(name="a", kind="insist", ms=20), Stop(name="b", kind="move", ms=20), Stop(name="c", kind="look")]
    client = scene.office.client

    def race(number: int) -> None:
        run_id = f"race-{number}"
        deadline = timedelta(seconds=dice.uniform(0.15, 0.8))
        result = client.start(
            sagas.trip, (stops,), {}, {"task_id": run_id, "queue": QUEUE, "deadline": deadline, "countdown": 0.1}
        )
        at = time.monotonic() + dice.uniform(0.1, 0.8)
        until(lambda: time.monotonic() > at, "the moment has come")
        for order in dice.sample([result.cancel, result.cancel, result.terminate], dice.randint(1, 3)):
            with contextlib.suppress(OrchestratorError):
                order("a race", "somebody")

    winners: set[str] = set()
    with ThreadPoolExecutor(8) as threads:
        for number in range(0, 400, 40):
            list(threads.map(race, range(number, number + 40)))
            scene.fault("race", 40)
            until(lambda: scene.sql(_UNENDED) == [(0,)], "they have ended")
            winners = {row[0] for row in scene.sql(_WINNERS)}
            if winners == {"completed", "cancelled", "terminated", "expired"}:
                break
    assert winners == {"completed", "cancelled", "terminated", "expired"}
    scene.judge(replace(BARE, acknowledged=0))


def test_operators_that_race_with_each_other_and_with_workers_do_one_thing(scene: Scene) -> None:
    (worker, _) = scene.start_workers(2)
    runs = [f"parked-{number}" for number in range(12)]
    for run in runs:
        scene.start(run, Stop(name="a", undo=["reject"] * 2 + ["ok"]), Stop(name="x", how=["reject"]))
    for run in runs:
        scene.until_state(run, "parked")

    def operate(number: int) -> None:
        result = scene.office.client.handle(None, runs[number % len(runs)])
        with contextlib.suppress(OrchestratorError):
            key = "tests.faults.steps.take#0"
            orders = [lambda: result.retry(key), lambda: result.skip(key), lambda: result.cancel()]
            orders[number % 3]()

    scene.signal(scene.children(worker)[0], signal.SIGKILL)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(operate, range(len(runs) * 9)))
    scene.fault("order in a race", len(runs) * 9)
    for run in runs:  # whoever was told to retry may have been refused once more
        state = scene.until_state(run, "parked", "compensated", "failed", "cancelled")
        while state == "parked":
            with contextlib.suppress(OrchestratorError):
                scene.office.client.handle(None, run).skip("tests.faults.steps.take#0")
            state = scene.until_state(run, "parked", "compensated", "failed", "cancelled")
    scene.judge(BARE)


_GONE = """
INSERT INTO orchestrator.runs (id, saga, version, input, root_id, queue, started_at)
SELECT kind || n, 'faults.gone', 1, '{}', kind || n, %s, orchestrator.now() - interval '1 hour'
FROM generate_series(1, 1000) AS n CROSS JOIN unnest(ARRAY['gone-due-', 'gone-begun-', 'gone-owed-']) AS kind;
INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at)
SELECT id, '', 'turn', 'faults.gone@1', queue, started_at FROM orchestrator.runs WHERE id LIKE 'gone-due-%%';
INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, due_at, attempt, fence, incarnation, child,
    begun_at, deadline_at, expires_at, call)
SELECT id, 1, 'faults.gone#0', 'do', 'faults.gone', queue, started_at, 1, 7, 0, 1,
    started_at, started_at, started_at, '{}'
FROM orchestrator.runs WHERE id LIKE 'gone-begun-%%';
INSERT INTO orchestrator.arrivals (run_id, at, arrival)
SELECT id, started_at, '{"e": "cancel"}' FROM orchestrator.runs WHERE id LIKE 'gone-owed-%%';
"""


def test_a_thousand_rows_that_nobody_can_take_are_not_in_the_way(scene: Scene) -> None:
    """Of a saga that no worker has, all of them longer due than anything else.

    A thousand turns, a thousand attempts that the dead had begun, and a thousand arrivals whose turn was forgotten: of
    each more than a page of a sweep.
    """
    for statement in _GONE.split(";\n")[:-1]:
        scene.sql(statement, *[QUEUE] * statement.count("%s"))
    scene.fault("row that nobody can take", 3000)
    worker, _ = scene.start_workers(2)
    load = scene.load(runs=44)
    load.until_ended(11)
    scene.signal(scene.children(worker)[0], signal.SIGKILL)
    with psycopg.connect(scene.database_url) as forgetful:  # its author is gone before he could make its turn due
        scene.start("forgotten", Stop(name="a"), Stop(name="w", kind="wait"))
        until(lambda: scene.effects("forgotten"), "it waits")
        forgetful.execute(
            """INSERT INTO orchestrator.arrivals (run_id, arrival) VALUES ('forgotten', '{"e": "cancel"}')"""
        )
    load.until_ended(44)
    scene.until_state("forgotten", "cancelled")
    turns = "SELECT count(*) FROM orchestrator.work WHERE run_id LIKE 'gone-%%' AND key = '' AND fence IS NULL"
    until(lambda: scene.sql(turns) == [(3000,)], "all that was begun or owed is a turn that nobody can take")
    for table, column in (("arrivals", "run_id"), ("runs", "id")):
        scene.sql(f"DELETE FROM orchestrator.{table} WHERE {column} LIKE 'gone-%%'")
    left = "DELETE FROM orchestrator.work WHERE run_id LIKE 'gone-%%' RETURNING 1"
    until(lambda: not scene.sql(left), "no pump makes a turn of theirs due any more")
    scene.judge(LOADED, load)


@pytest.mark.parametrize("how", [["silent", "reject"], ["die", "reject"]])
def test_what_is_refused_after_an_attempt_in_doubt_is_undone(scene: Scene, how: list[str]) -> None:
    scene.start_workers(1)
    scene.start("doubt", Stop(name="a", how=how))
    scene.fault("an answer that is lost")
    scene.until_state("doubt", "compensated")
    assert scene.effects("doubt") == ["do 1", "undo 1"]
    scene.judge(BARE)
