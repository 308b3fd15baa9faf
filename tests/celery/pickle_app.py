"""An app whose workers take pickled messages alone, as those of long ago do."""

from __future__ import annotations

from celery import Celery

from orchestrator import Orchestrator

app = Celery("pickled")
app.conf.update(task_serializer="pickle", accept_content=["pickle"])
orchestrator = Orchestrator(app, database_url="postgresql://nowhere.invalid/db")
