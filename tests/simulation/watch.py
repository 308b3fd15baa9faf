"""Laws that hold at every moment, whoever is about to do what; each is a question to the database.

Owns the questions.  What a seed leaves behind is the verdict's, and the checker's, to judge.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.simulation.network import Network

# Of those who hold a lock one is above all others: a family does not keep itself out, and keeps out everybody else.
_LOCKS = """
WITH RECURSIVE held AS (
    SELECT DISTINCT name, run_id FROM orchestrator.locks WHERE granted_at IS NOT NULL
), up (name, run_id, above) AS (
    SELECT name, run_id, run_id FROM held
    UNION SELECT up.name, up.run_id, r.parent_id FROM up JOIN orchestrator.runs r ON r.id = up.above
    WHERE r.root_id <> r.id
), many AS (
    SELECT name, count(*) AS holders FROM held GROUP BY name HAVING count(*) > 1
)
SELECT name, array(SELECT run_id FROM held WHERE held.name = many.name ORDER BY 1) FROM many
WHERE NOT EXISTS (
    SELECT FROM held h WHERE h.name = many.name AND many.holders = (
        SELECT count(*) FROM up WHERE up.name = h.name AND up.above = h.run_id))
"""
_LINES = """
SELECT name, array_agg(run_id ORDER BY id) FROM orchestrator.locks GROUP BY name HAVING bool_and(granted_at IS NULL)
"""
_GATES = """
SELECT gate, array_agg(run_id || ' ' || key ORDER BY run_id, key) FROM orchestrator.work WHERE fence IS NOT NULL
AND call -> 'g' ->> 'most' IS NOT NULL GROUP BY gate HAVING count(*) > min((call -> 'g' ->> 'most')::integer)
"""
_BEGUN_LATER = """
SELECT w.run_id, w.key FROM orchestrator.work w JOIN orchestrator.runs r ON r.id = w.run_id
WHERE w.fence IS NOT NULL AND r.finished_at IS NOT NULL
"""
_LAWS = {
    "two runs of different families hold a lock": _LOCKS,
    "nobody holds a lock that is waited for": _LINES,
    "more are under way than a gate lets in": _GATES,
    "an attempt of a run that has ended has its fence": _BEGUN_LATER,
}


def broken(network: Network) -> Iterator[str]:
    """Yield what is not as it must be at this moment."""
    for law, question in _LAWS.items():
        for where, found in network.rows(question):
            yield f"{law}: {where}: {found}"
