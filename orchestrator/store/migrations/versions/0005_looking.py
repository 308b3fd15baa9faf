"""Marks of drainers tell who is only looking for work: what is added is taken by those, and nobody rings for it."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"

_RINGS = """
CREATE OR REPLACE FUNCTION orchestrator.rings_1(p_queue text, p_rows integer) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    -- A doorbell for each new row that no looker is about to take, as long as there are slots that do not drain (index
    -- incarnations_alive).
    RETURN (
        SELECT greatest(0, least(p_rows - coalesce(sum(m.looking), 0), coalesce(sum(i.slots - m.draining), 0)))
        FROM orchestrator.incarnations i CROSS JOIN LATERAL (
            SELECT count(*) AS draining, count(*) FILTER (WHERE d.looking) AS looking
            FROM orchestrator.drainers d WHERE d.incarnation = i.id AND p_queue = ANY (d.queues)
        ) AS m
        WHERE i.dead_at IS NULL AND p_queue = ANY (i.queues)
    );
END $$
"""


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER TABLE orchestrator.drainers ADD COLUMN looking boolean NOT NULL DEFAULT false")
    op.execute(_RINGS)
