"""Schedules: which beat leads, up to where each schedule is settled, what became of each slot."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"

_STATEMENTS = """
CREATE TABLE orchestrator.leaders (
    app text PRIMARY KEY,
    holder text NOT NULL,
    seen_at timestamptz NOT NULL,
    led_until timestamptz NOT NULL
) WITH (fillfactor = 50);

CREATE TABLE orchestrator.schedules (
    app text NOT NULL,
    name text NOT NULL,
    task text NOT NULL,
    reads text NOT NULL,
    problem text,
    settled_until timestamptz NOT NULL,
    paused_at timestamptz,
    paused_by text,
    paused_because text,
    gone_at timestamptz,
    PRIMARY KEY (app, name)
) WITH (fillfactor = 50);

CREATE TABLE orchestrator.slots (
    app text NOT NULL,
    schedule text NOT NULL,
    slot timestamptz NOT NULL,
    origin text NOT NULL CHECK (origin ~ '^(schedule|trigger|backfill)$'),
    state text NOT NULL CHECK (state ~ '^(waiting|running|started|sending|sent|skipped)$'),
    run_id text NOT NULL,
    because text,
    at timestamptz NOT NULL,
    PRIMARY KEY (app, schedule, slot)
);
CREATE INDEX slots_open ON orchestrator.slots (app, schedule, slot) WHERE state IN ('waiting', 'running', 'sending');
"""


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    for statement in _STATEMENTS.split(";\n"):
        if statement.strip():
            op.execute(statement)
