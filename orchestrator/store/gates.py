"""The limits on how often and how many at once: who stands in line at a gate, who is let in, and when.

A step with a limit is never begun on the spot.  Its row of work names its gate and is written due in a thousand years:
out of the way of all who look for what is due, and in order.  `admit` gives the first of the line a time at which it is
really due, and from there on it is work like any other, so that taking work knows nothing of gates.  It is called by
who has put somebody in line or has seen somebody leave, and by every pump, which is what makes up for any of them that
died.  One gate is locked at a time, and never while a row of work is waited for.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta

from orchestrator.failpoints import failpoint
from orchestrator.store.connection import CLOCK, Connection

LINE = timedelta(hours=8_766_000)  # a thousand years
_PAGE = 200  # gates that one round of a pump looks at

# The body is the function admit_1 of 0009_lanes.sql (index work_gate, primary key of gates).
_ADMIT = f"SELECT queue, due_at <= {CLOCK} FROM orchestrator.admit_1(%(gate)s, %(now)s)"


def admit(connection: Connection, gate: str, now: datetime | None = None) -> Counter[str]:
    """Let in whom the limits of a gate have room for; returns how many of them are due now, by queue.

    A transaction of its own: the gate is locked until its end.
    """
    failpoint("admit.before", connection)
    rows = connection.execute(_ADMIT, {"gate": gate, "now": now}).fetchall()
    failpoint("admit.after", connection)
    return Counter(queue for queue, due in rows if due)


# From gate to gate over index work_gate, whatever the number of rows at each.
_LINES = """
WITH RECURSIVE known AS (
    (SELECT gate FROM orchestrator.work WHERE gate > %(after)s ORDER BY gate LIMIT 1)
    UNION ALL
    SELECT (SELECT w.gate FROM orchestrator.work w WHERE w.gate > known.gate ORDER BY w.gate LIMIT 1)
    FROM known WHERE known.gate IS NOT NULL
)
SELECT gate FROM known
WHERE EXISTS (SELECT FROM orchestrator.work w WHERE w.gate = known.gate AND w.due_at > orchestrator.now() + %(far)s)
LIMIT %(limit)s
"""


def lines(connection: Connection, after: str = "", limit: int = _PAGE) -> list[str]:
    """Return gates at which somebody stands in line, in the order of their names, from after one of them."""
    values = {"after": after, "far": LINE / 2, "limit": limit}
    return [gate for (gate,) in connection.execute(_LINES, values).fetchall()]


_SWEEP = """
DELETE FROM orchestrator.gates g WHERE next_at < orchestrator.now() - interval '1 hour'
  AND NOT EXISTS (SELECT FROM orchestrator.work w WHERE w.gate = g.name)
"""


def sweep(connection: Connection) -> None:
    """Forget gates that nobody has come by for an hour."""
    failpoint("sweep_gates.before", connection)
    connection.execute(_SWEEP)
    failpoint("sweep_gates.after", connection)
