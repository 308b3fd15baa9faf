"""Decisions that race: cancel, completion and deadline of one run, operators, and what lies in the way of others."""

from __future__ import annotations

import contextlib
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator.errors import OrchestratorError
from tests.acceptance.running import until
from tests.faults import sagas
from tests.faults.load import QUEUE
from tests.faults.scene import BARE, LOADED, Scene
from tests.faults.steps import Stop


def test_cancel_completion_and_deadline_of_one_run_agree_on_one_end(scene: Scene) -> None:
    scene.start_workers(2)
    dice = random.Random(3)
    stops = [Stop(name="a", kind="insist", ms=20), Stop(name="b", kind="move", ms=20), Stop(name="c", kind="look")]
    client = scene.office.client

    def race(number: int) -> None:
        run_id = f"race-{number}"
        deadline = timedelta(seconds=dice.uniform(0.1, 2.0))
        result = client.start(
            sagas.trip, (stops,), {}, {"task_id": run_id, "queue": QUEUE, "deadline": deadline, "countdown": 0.1}
        )
        until(lambda: result.status != "pending" or dice.random() < 0.2, "it moves", 60.0)
        for order in dice.sample([result.cancel, result.cancel, result.terminate], dice.randint(1, 3)):
            with contextlib.suppress(OrchestratorError):
                order("a race", "somebody")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(race, range(40)))
    scene.fault("race", 40)
    scene.judge(replace(BARE, acknowledged=0))
    ends = {row[0] for row in scene.sql("SELECT DISTINCT state FROM orchestrator.runs")}
    assert len(ends) > 1


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


def test_a_thousand_rows_that_nobody_can_take_are_not_in_the_way(scene: Scene) -> None:
    """Runs of a saga that no worker has, all of them longer due than anything else."""
    scene.sql(
        """WITH gone AS (
            INSERT INTO orchestrator.runs (id, saga, version, input, root_id, queue, started_at)
            SELECT 'gone-' || n, 'faults.gone', 1, '{}', 'gone-' || n, %s, orchestrator.now() - interval '1 hour'
            FROM generate_series(1, 1000) AS n RETURNING id, queue, started_at)
        INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at)
        SELECT id, '', 'turn', 'faults.gone@1', queue, started_at FROM gone""",
        QUEUE,
    )
    scene.fault("row that nobody can take", 1000)
    worker, _ = scene.start_workers(2)
    load = scene.load(runs=44)
    load.until_ended(11)
    scene.signal(scene.children(worker)[0], signal.SIGKILL)
    load.until_ended(44)
    assert scene.sql("SELECT count(*) FROM orchestrator.work WHERE run_id LIKE 'gone-%%'") == [(1000,)]
    scene.sql("DELETE FROM orchestrator.work WHERE run_id LIKE 'gone-%%'")
    scene.sql("DELETE FROM orchestrator.runs WHERE id LIKE 'gone-%%'")
    scene.judge(LOADED, load)


@pytest.mark.parametrize("how", [["silent", "reject"], ["die", "reject"]])
def test_what_is_refused_after_an_attempt_in_doubt_is_undone(scene: Scene, how: list[str]) -> None:
    scene.start_workers(1)
    scene.start("doubt", Stop(name="a", how=how))
    scene.fault("an answer that is lost")
    scene.until_state("doubt", "compensated")
    assert scene.effects("doubt") == ["do 1", "undo 1"]
    scene.judge(BARE)
