"""The schema as SQLAlchemy tables, for reading with filters and for comparing with the migrations.

Owns nothing at run time: hot statements are in `runs`, `turns` and `liveness`.
"""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    Column,
    Computed,
    DateTime,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, OID

SCHEMA = "orchestrator"
metadata = MetaData(schema=SCHEMA)
_instant = DateTime(timezone=True)

runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("saga", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("input", JSONB, nullable=False),
    Column("output", JSONB),
    Column("error", JSONB),
    Column("left_effects", JSONB, nullable=False),
    Column("parked", JSONB, nullable=False),
    Column("published", JSONB),
    Column("tags", JSONB, nullable=False),
    Column("parent_id", Text),
    Column("root_id", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("position", Integer, nullable=False),
    Column("past_pivot", Boolean, nullable=False),
    Column("link", Integer, nullable=False),
    Column("since", Integer, nullable=False),
    Column("started_at", _instant, nullable=False),
    Column("deadline_at", _instant),
    Column("finished_at", _instant),
    Index("runs_by_start", "started_at"),
    Index("runs_by_parent", "parent_id", postgresql_where=text("parent_id IS NOT NULL")),
    Index("runs_by_tag", "tags", postgresql_using="gin", postgresql_where=text("tags <> '{}'")),
)

journal = Table(
    "journal",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", _instant, nullable=False),
    Column("entries", JSON, nullable=False),
)

arrivals = Table(
    "arrivals",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("at", _instant, nullable=False),
    Column("arrival", JSON, nullable=False),
    Index("arrivals_by_run", "run_id", "id"),
)

work = Table(
    "work",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("lane", BigInteger, primary_key=True, autoincrement=False),
    Column("priority", SmallInteger, nullable=False),
    Column("role", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("due_at", _instant, nullable=False),
    Column("reserved_at", _instant),
    Column("gate", Text),
    Column("incarnation", BigInteger),
    Column("child", Integer),
    Column("begun_by", BigInteger, Computed("CASE WHEN fence IS NOT NULL THEN coalesce(incarnation, 0) END", True)),
    Column("target", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("call", JSON),
    Column("attempt", Integer, nullable=False),
    Column("fence", BigInteger),
    Column("begun_at", _instant),
    Column("deadline_at", _instant),
    Column("expires_at", _instant),
    Column("details", JSON),
    Column("stop", Boolean, nullable=False),
    Index("work_due", "queue", text("priority DESC"), "due_at", postgresql_where=text("begun_by IS NULL")),
    Index("work_begun", "begun_by", postgresql_where=text("begun_by IS NOT NULL")),
    Index("work_gate", "gate", "due_at", postgresql_where=text("gate IS NOT NULL")),
)

gates = Table(
    "gates",
    metadata,
    Column("name", Text, primary_key=True),
    Column("next_at", _instant, nullable=False),
)

pauses = Table(
    "pauses",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", _instant, nullable=False),
    Column("lifted", Boolean, nullable=False),
    Column("swept_to", Text, nullable=False),
    Column("sweeps", Integer, nullable=False),
)

paused_runs = Table(
    "paused_runs",
    metadata,
    Column("saga", Text, primary_key=True),
    Column("run_id", Text, primary_key=True),
)

locks = Table(
    "locks",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("handle", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("asked_at", _instant, nullable=False),
    Column("granted_at", _instant),
    UniqueConstraint("run_id", "handle"),
    Index("locks_by_name", "name", "id"),
)

incarnations = Table(
    "incarnations",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("node", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("queues", ARRAY(Text), nullable=False),
    Column("targets", ARRAY(Text), nullable=False),
    Column("slots", Integer, nullable=False),
    Column("beats", BigInteger, nullable=False),
    Column("started_at", _instant, nullable=False),
    Column("seen_at", _instant, nullable=False),
    Column("dead_at", _instant),
    Index("incarnations_alive", "id", postgresql_where=text("dead_at IS NULL")),
)

drainers = Table(
    "drainers",
    metadata,
    Column("incarnation", BigInteger, primary_key=True, autoincrement=False),
    Column("child", Integer, primary_key=True, autoincrement=False),
    Column("queues", ARRAY(Text), nullable=False),
    Column("looking", Boolean, nullable=False),
    prefixes=["UNLOGGED"],
)

leaders = Table(
    "leaders",
    metadata,
    Column("app", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("seen_at", _instant, nullable=False),
    Column("led_until", _instant, nullable=False),
)

schedules = Table(
    "schedules",
    metadata,
    Column("app", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("task", Text, nullable=False),
    Column("reads", Text, nullable=False),
    Column("problem", Text),
    Column("settled_until", _instant, nullable=False),
    Column("paused_at", _instant),
    Column("paused_by", Text),
    Column("paused_because", Text),
    Column("gone_at", _instant),
)

slots = Table(
    "slots",
    metadata,
    Column("app", Text, primary_key=True),
    Column("schedule", Text, primary_key=True),
    Column("slot", _instant, primary_key=True),
    Column("origin", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("because", Text),
    Column("at", _instant, nullable=False),
    Index(
        "slots_open",
        "app",
        "schedule",
        "slot",
        postgresql_where=text("state IN ('waiting', 'running', 'sending')"),
    ),
)

pruned = Table(
    "pruned",
    metadata,
    Column("id", Text, primary_key=True),
    Column("saga", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("pruned_at", _instant, nullable=False),
)

reports = Table(
    "reports",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("wanted", Text, nullable=False),
    Column("started_at", _instant, nullable=False),
    Column("finished_at", _instant),
    Column("given_up", Boolean, nullable=False),
    Index("reports_open", "wanted", unique=True, postgresql_where=text("finished_at IS NULL")),
)

lineage = Table(
    "lineage",
    metadata,
    Column("one", Boolean, primary_key=True),
    Column("system", BigInteger, nullable=False),
    Column("timeline", Text, nullable=False),
    Column("relation", OID, nullable=False),
)

restores = Table(
    "restores",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("by", Text, nullable=False),
    Column("began_at", _instant, nullable=False),
    Column("swept_to", Text, nullable=False),
    Column("found", JSONB, nullable=False),
    Column("finished_at", _instant),
    Index("restores_open", text("(true)"), unique=True, postgresql_where=text("finished_at IS NULL")),
)

report_checks = Table(
    "report_checks",
    metadata,
    Column("report_id", BigInteger, primary_key=True, autoincrement=False),
    Column("name", Text, primary_key=True),
    Column("pages", Integer, nullable=False),
    Column("cursor", Text, nullable=False),
    Column("looked_at", BigInteger, nullable=False),
    Column("breaks", BigInteger, nullable=False),
    Column("sums", JSONB, nullable=False),
    Column("examples", JSONB, nullable=False),
    Column("error", Text),
    Column("done", Boolean, nullable=False),
)
