"""Retention and reconciliation: ids that stay taken after their runs are gone; reports and how far they have come."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"

_STATEMENTS = """
CREATE INDEX runs_by_parent ON orchestrator.runs (parent_id) WHERE parent_id IS NOT NULL;

CREATE TABLE orchestrator.pruned (
    id text PRIMARY KEY,
    saga text NOT NULL,
    state text NOT NULL,
    pruned_at timestamptz NOT NULL
);

CREATE TABLE orchestrator.reports (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    wanted text NOT NULL,
    started_at timestamptz NOT NULL,
    finished_at timestamptz,
    given_up boolean NOT NULL DEFAULT false
);
-- Who reconciles the same at once works on the same report.
CREATE UNIQUE INDEX reports_open ON orchestrator.reports (wanted) WHERE finished_at IS NULL;

CREATE TABLE orchestrator.report_checks (
    report_id bigint NOT NULL,
    name text NOT NULL,
    pages integer NOT NULL DEFAULT 0,
    cursor text NOT NULL DEFAULT '',
    looked_at bigint NOT NULL DEFAULT 0,
    breaks bigint NOT NULL DEFAULT 0,
    sums jsonb NOT NULL DEFAULT '{}',
    examples jsonb NOT NULL DEFAULT '[]',
    error text,
    done boolean NOT NULL DEFAULT false,
    PRIMARY KEY (report_id, name)
) WITH (fillfactor = 50);
"""

_START = """
CREATE OR REPLACE FUNCTION orchestrator.start_runs_1(p_runs json, p_now timestamptz)
RETURNS TABLE (run_id text, started_at timestamptz) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := coalesce(p_now, orchestrator.now());
BEGIN
    -- One row for the run and one for its first turn, or nothing at all if the id is taken (primary key of runs), or
    -- was taken by a run that is pruned.
    RETURN QUERY
    WITH run AS (
        INSERT INTO orchestrator.runs (
            id, saga, version, input, queue, priority, root_id, parent_id, tags, started_at, deadline_at)
        SELECT r.id, r.saga, r.version, r.input, r.queue, r.priority, coalesce(r.root, r.id), r.parent,
            coalesce(r.tags, '{}'), t.start, t.start + make_interval(secs => r.deadline)
        FROM json_to_recordset(p_runs) AS r (
            id text, saga text, version integer, input jsonb, queue text, priority smallint, parent text,
            root text, tags jsonb, delay float8, eta timestamptz, deadline float8)
        CROSS JOIN LATERAL (SELECT greatest(v_now + make_interval(secs => r.delay), r.eta) AS start) AS t
        WHERE NOT EXISTS (SELECT FROM orchestrator.pruned p WHERE p.id = r.id)
        ORDER BY r.id
        ON CONFLICT (id) DO NOTHING RETURNING id, saga, version, queue, priority, started_at
    ), turn AS (
        INSERT INTO orchestrator.work (run_id, key, role, target, queue, priority, due_at)
        SELECT id, '', 'turn', saga || '@' || version, queue, priority, started_at FROM run
    )
    SELECT id, started_at FROM run;
END $$
"""


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    for statement in _STATEMENTS.split(";\n"):
        if statement.strip():
            op.execute(statement)
    op.execute(_START)
