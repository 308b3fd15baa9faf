"""The statements of the hot path set up less: no CHECKs on hot tables, a wave in parts, a start without a second look.

What the CHECKs said is audited (`orchestrator.engine.audits`): only the engine writes these columns.
"""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    statements = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    op.get_bind().exec_driver_sql(statements, execution_options={"no_parameters": True})
