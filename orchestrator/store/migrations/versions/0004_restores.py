"""Restores: on which timeline of which server this database was last looked at, and how far a sweep has come."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"

_STATEMENTS = """
CREATE TABLE orchestrator.lineage (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    system bigint NOT NULL,
    timeline text NOT NULL
);
INSERT INTO orchestrator.lineage (system, timeline)
SELECT system_identifier, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) FROM pg_control_system();

CREATE TABLE orchestrator.restores (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    by text NOT NULL,
    began_at timestamptz NOT NULL,
    swept_to text NOT NULL DEFAULT '',
    found jsonb NOT NULL DEFAULT '{}',
    finished_at timestamptz
);
-- Whoever sweeps at once works on the same one.
CREATE UNIQUE INDEX restores_open ON orchestrator.restores ((true)) WHERE finished_at IS NULL;
"""


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    for statement in _STATEMENTS.split(";\n"):
        if statement.strip():
            op.execute(statement)
