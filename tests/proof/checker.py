"""The checker: one program that is run after every test of the promise, and that cannot pass empty.

Owns how the rules are put to work, as a function and as a command:

    python -m tests.proof.checker --database-url ... --effect-log ... --acknowledged ids.txt --faults 12 ...

It only reads.  A report without violations says: something was done to this system, and every promise was kept.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psycopg

from tests.proof import attempts, coverage, runs, secrecy, undo
from tests.proof.coverage import NOTHING, STRICT, Demand
from tests.proof.levels import ALLOWANCE, Baseline, Levels
from tests.proof.report import Report, Seen, Violation
from tests.proof.rules import RULES, judge
from tests.proof.secrecy import Place
from tests.proof.world import Attempt, look

__all__ = [
    "ALLOWANCE", "NOTHING", "RULES", "STRICT", "Baseline", "Demand", "Levels", "Report", "Seen", "Violation", "check",
    "refused_in", "wait_until_settled",
]  # fmt: skip
_REGISTERED = (attempts, runs, secrecy, undo)
_REFUSED = re.compile(r"run (\S+) step (\S+): attempt (\d+) to do has lost its fence")


def check(
    database_url: str,
    *,
    effect_log: Path | None,
    acknowledged: Iterable[str] = (),
    may_park: Container[str] = (),
    refused: Iterable[Attempt] = (),
    unlogged: Container[str] = (),
    conserved: Mapping[str, tuple[str, Any]] | None = None,
    places: Mapping[str, Place] | None = None,
    canaries: Sequence[str] = (),
    baseline: Baseline | None = None,
    pids: Collection[int] = (),
    allowance: Levels = ALLOWANCE,
    before: Report | None = None,
    seen: Seen | None = None,
    demand: Demand = STRICT,
    while_running: bool = False,
) -> Report:
    """Judge a database and what others told about it; see the modules `runs`, `attempts`, `undo` for the rules.

    Without an `effect_log` only the engine's own tables are judged, and the default demand is not met.
    `acknowledged` are the ids of runs whose start returned; `may_park` those that may stay parked.  `refused` are
    attempts whose outcome the engine said it refused (`refused_in` finds them in logs).  `unlogged` names tasks that
    write no effects.  `conserved` maps a name to an SQL query and the value that it must have.  `places` are searched
    for `canaries`.  `baseline` was taken before; `pids` are the processes whose memory is compared with it.  `before`
    is the report of an earlier check.  `seen` is what the test did, `demand` what must have been seen.
    `while_running` leaves out what holds only once everything has settled.
    """
    totals = {name: sql for name, (sql, _) in (conserved or {}).items()}
    world, found = look(database_url, effect_log, totals)
    world = replace(
        world,
        acknowledged=list(acknowledged),
        may_park=may_park,
        refused=list(refused),
        unlogged=unlogged,
        conserved=[(name, value, found[name]) for name, (_, value) in (conserved or {}).items()],
        places=secrecy.contents(places or {}),
        canaries=list(canaries),
        before=before.ended if before else {},
        while_running=while_running,
    )
    report = Report(list(judge(world)), coverage.count(world, seen or Seen()))
    report.ended = {run.id: runs.end_of(run) for run in world.runs.values() if run.ended}
    report.violations += coverage.missing(report.seen, demand)
    if baseline is not None:
        report.violations += baseline.compare(pids, allowance)
    return report


def refused_in(*logs: str) -> Iterator[Attempt]:
    """Yield the attempts to do something of which logs of workers say that their outcome was refused."""
    for log in logs:
        for run_id, key, attempt in _REFUSED.findall(log):
            yield run_id, key, int(attempt)


_UNSETTLED = """
SELECT id, state FROM orchestrator.runs WHERE finished_at IS NULL
UNION SELECT run_id, 'has arrivals' FROM orchestrator.arrivals
UNION SELECT run_id, 'has work after its end' FROM orchestrator.work w
    WHERE EXISTS (SELECT FROM orchestrator.runs r WHERE r.id = w.run_id AND r.finished_at IS NOT NULL)
"""


def wait_until_settled(
    database_url: str,
    within_s: float,
    *,
    may_park: Container[str] = (),
    meanwhile: Callable[[], object] = lambda: time.sleep(0.05),
) -> float:
    """Wait after the last fault until nothing moves any more; returns the seconds that it took.

    Gives up after `within_s`; `check` then says which runs have not ended.
    """
    began = time.monotonic()
    with psycopg.connect(database_url, autocommit=True) as connection:
        while (taken := time.monotonic() - began) < within_s:
            rows = connection.execute(_UNSETTLED).fetchall()
            if all(state == "parked" and run_id in may_park for run_id, state in rows):
                break
            meanwhile()
    return taken


# -- as a command ------------------------------------------------------------------------------------------------------
def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.checker", description=__doc__.partition("\n")[0])
    parser.add_argument("--database-url", required=True)
    parser.add_argument("--effect-log", type=Path)
    parser.add_argument("--acknowledged", type=Path, help="a file with the id of a run on each line")
    parser.add_argument("--may-park", action="append", default=[], metavar="RUN")
    parser.add_argument("--unlogged", action="append", default=[], metavar="TASK")
    parser.add_argument("--log", type=Path, action="append", default=[], help="of a worker; searched for canaries too")
    parser.add_argument("--canary", action="append", default=[])
    parser.add_argument("--total", action="append", default=[], metavar="SQL=VALUE", help="a sum that never changes")
    parser.add_argument("--states", help="terminal states that must have been seen, with commas between")
    for field in fields(Demand):
        if field.name != "states":
            parser.add_argument(f"--want-{field.name}", type=int, default=getattr(STRICT, field.name), metavar="N")
    for field in fields(Seen):
        parser.add_argument(f"--{field.name}", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print the report, return 1 if a promise was broken."""
    given = _arguments().parse_args(arguments)
    wanted = {f.name: getattr(given, f"want_{f.name}") for f in fields(Demand) if f.name != "states"}
    states = STRICT.states if given.states is None else frozenset(filter(None, given.states.split(",")))
    totals = [total.rpartition("=") for total in given.total]
    report = check(
        given.database_url,
        effect_log=given.effect_log,
        acknowledged=given.acknowledged.read_text().split() if given.acknowledged else (),
        may_park=given.may_park,
        unlogged=given.unlogged,
        refused=refused_in(*(log.read_text(errors="replace") for log in given.log)),
        conserved={sql: (f"SELECT ({sql})::text", value) for sql, _, value in totals},
        places={str(log): log for log in given.log},
        canaries=given.canary,
        seen=Seen(**{f.name: getattr(given, f.name) for f in fields(Seen)}),
        demand=Demand(**wanted, states=states),
    )
    print(report.as_json() if given.json else report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
