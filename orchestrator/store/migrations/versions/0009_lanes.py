"""Work has lanes: a child that goes on with the next step of a run changes no index.

What held work before held it by the key of its step: workers of the releases before are to be stopped.
"""

from __future__ import annotations

from pathlib import Path

from alembic import op

from orchestrator.errors import SchemaError

revision = "0009"
down_revision = "0008"

# A worker says within a second that it lives, and that it is gone when it stops; one that was killed is taken for alive
# a little longer.
_LIVING = """
SELECT string_agg(DISTINCT node, ', ' ORDER BY node) FROM orchestrator.incarnations
WHERE dead_at IS NULL AND seen_at > orchestrator.now() - interval '10 s'
"""


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    if workers := op.get_bind().exec_driver_sql(_LIVING).scalar():
        raise SchemaError(
            f"nothing was migrated: workers of an earlier release are alive ({workers}), which cannot work with this "
            "schema; stop them (a warm shutdown ends what they have begun), migrate, then start those of this release"
        )
    statements = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    op.get_bind().exec_driver_sql(statements, execution_options={"no_parameters": True})
