"""The first schema: runs, journal, work, arrivals, incarnations, drainers."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

_STATEMENTS = """
CREATE FUNCTION orchestrator.now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT statement_timestamp()';

CREATE TABLE orchestrator.runs (
    id text PRIMARY KEY,
    saga text NOT NULL,
    version integer NOT NULL,
    state text NOT NULL DEFAULT 'pending' CHECK (state IN (
        'pending', 'running', 'paused', 'compensating', 'parked',
        'completed', 'failed', 'compensated', 'cancelled', 'terminated', 'continued')),
    input jsonb NOT NULL,
    output jsonb,
    error jsonb,
    left_effects jsonb NOT NULL DEFAULT '[]',
    parked jsonb NOT NULL DEFAULT '[]',
    published jsonb,
    tags jsonb NOT NULL DEFAULT '{}',
    parent_id text,
    root_id text NOT NULL,
    queue text NOT NULL,
    priority smallint NOT NULL DEFAULT 0 CHECK (priority BETWEEN 0 AND 9),
    position integer NOT NULL DEFAULT 0,
    past_pivot boolean NOT NULL DEFAULT false,
    started_at timestamptz NOT NULL,
    deadline_at timestamptz,
    finished_at timestamptz,
    CONSTRAINT runs_finished CHECK ((finished_at IS NOT NULL) = (state IN (
        'completed', 'failed', 'compensated', 'cancelled', 'terminated', 'continued')))
) WITH (fillfactor = 70);
CREATE INDEX runs_by_start ON orchestrator.runs (started_at);

CREATE TABLE orchestrator.journal (
    run_id text NOT NULL,
    seq integer NOT NULL,
    at timestamptz NOT NULL,
    entries json NOT NULL,
    PRIMARY KEY (run_id, seq)
);

CREATE TABLE orchestrator.arrivals (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id text NOT NULL,
    at timestamptz NOT NULL DEFAULT orchestrator.now(),
    arrival json NOT NULL
);
CREATE INDEX arrivals_by_run ON orchestrator.arrivals (run_id, id);

CREATE TABLE orchestrator.work (
    run_id text NOT NULL,
    key text NOT NULL,
    role text NOT NULL CHECK (role IN ('turn', 'do', 'once', 'probe', 'undo')),
    target text NOT NULL,
    queue text NOT NULL,
    task text NOT NULL DEFAULT '',
    priority smallint NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL,
    attempt integer NOT NULL DEFAULT 0,
    call json,
    reserved_at timestamptz,
    fence bigint,
    incarnation bigint,
    child integer,
    begun_at timestamptz,
    deadline_at timestamptz,
    expires_at timestamptz,
    details json,
    stop boolean NOT NULL DEFAULT false,
    PRIMARY KEY (run_id, key)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
CREATE INDEX work_due ON orchestrator.work (queue, priority DESC, due_at) WHERE fence IS NULL;
CREATE INDEX work_begun ON orchestrator.work (incarnation) WHERE fence IS NOT NULL;

CREATE TABLE orchestrator.incarnations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    node text NOT NULL,
    host text NOT NULL,
    pid integer NOT NULL,
    queues text[] NOT NULL,
    targets text[] NOT NULL,
    slots integer NOT NULL,
    beats bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT orchestrator.now(),
    seen_at timestamptz NOT NULL DEFAULT orchestrator.now(),
    dead_at timestamptz
) WITH (fillfactor = 50);
CREATE INDEX incarnations_alive ON orchestrator.incarnations (id) WHERE dead_at IS NULL;

CREATE UNLOGGED TABLE orchestrator.drainers (
    incarnation bigint NOT NULL,
    child integer NOT NULL,
    queues text[] NOT NULL,
    PRIMARY KEY (incarnation, child)
);

CREATE VIEW orchestrator.history AS
SELECT j.run_id, j.seq, e.n, j.at, e.entry ->> 'e' AS kind, e.entry ->> 'key' AS key, e.entry
FROM orchestrator.journal j CROSS JOIN LATERAL json_array_elements(j.entries) WITH ORDINALITY AS e (entry, n);
"""


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    for statement in _STATEMENTS.split(";\n"):
        if statement.strip():
            op.execute(statement)
