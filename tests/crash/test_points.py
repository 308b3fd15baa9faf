"""A process dies, or is told that what happened did not, at every boundary; another one finishes what it began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from orchestrator.failpoints import EXIT_CODE
from tests.crash.conftest import Stage
from tests.crash.points import BEAT, CELERY, CORE, MIGRATION, NAMES, NIGHTLY, ORDERS, PRELUDES, RESTORE, calls, name_of
from tests.crash.workload import STORIES

ENGINE = [name for name in NAMES if name not in BEAT | CELERY | MIGRATION | NIGHTLY | ORDERS | RESTORE]
ACTIONS = ("exit", "raise")
FAMILIES = ("commit.before", "commit.after", "commits.after", "effect.after", "take.reserved")


def test_every_failpoint_has_a_literal_name_of_its_own() -> None:
    found = list(calls())
    assert [place for place, call in found if not name_of(call)] == []
    assert [name for name, times in Counter(name_of(call) for _, call in found).items() if times > 1] == []
    assert {*BEAT, *CELERY, *MIGRATION, *NIGHTLY, *ORDERS, *RESTORE, *CORE, *PRELUDES} <= set(NAMES)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", ENGINE)
def test_every_run_ends_right_whatever_happens_at(
    name: str, action: str, stage: Stage, story_of: Callable[[str], str]
) -> None:
    survive(stage, story_of(name), name, action)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("part", [0.3, 0.7])
@pytest.mark.parametrize("name", CORE)
def test_every_run_ends_right_whatever_happens_later_on_at(
    name: str, part: float, action: str, stage: Stage, hits: dict[str, dict[str, int]]
) -> None:
    times = hits["ordinary"][name]
    survive(stage, "ordinary", name, action, at=max(2, int(times * part)))


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("part", [0.25, 0.6, 0.9])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_ends_right_whatever_happens_at(
    name: str, part: float, action: str, stage: Stage, hits: dict[str, dict[str, int]]
) -> None:
    survive(stage, "family", name, action, at=max(1, int(hits["family"][name] * part)))


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", ["start.before", "start.after"])
def test_runs_that_are_started_together_are_all_there_whatever_happens_at(name: str, action: str, stage: Stage) -> None:
    survive(stage, "brief", name, action)


def survive(stage: Stage, story: str, name: str, action: str, at: int = 1) -> None:
    """Play a story with one fault, let another process finish it, and judge what is left."""
    prelude = f"{PRELUDES[name]};" if name in PRELUDES else ""
    ended = stage.play(story, points=f"{prelude}{name}={action}@{at}")
    while not stage.read(f"fired/{name}") and at > 1:  # how often it is come by differs a little from time to time
        at = at // 2
        stage.clear()
        ended = stage.play(story, points=f"{prelude}{name}={action}@{at}")
    assert ended == (EXIT_CODE if action == "exit" else 0), stage.read("log")
    assert stage.read(f"fired/{name}").startswith(action), "the point has acted"
    assert stage.play(story, finish=True) == 0, stage.read("log")
    assert stage.read("unforeseen") == ""
    ends = {run_id: plan.ends.split() for run_id, plan in STORIES[story].items()}
    assert {run_id: state for run_id, state in stage.states().items() if state not in ends.get(run_id, state)} == {}
    report = stage.check(lived=action == "raise")
    assert report.ok, f"{report}\n{stage.read('log')}"
