"""Shows the training of a model; the pauses between its epochs stand for the hours that they take elsewhere."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from pathlib import Path

from sagas.demo.story import COMPLETED, UNDONE, Act, Promise, Shown, Story
from sagas.training import training
from tasks.models import TrainingJob

EPOCHS = 10
NOISY = "noisy-1000"


def make(job_id: str, twist: str, chance: random.Random) -> TrainingJob:
    """Return a request."""
    return TrainingJob(
        id=job_id,
        account=twist or "labelled-1000",
        epochs=EPOCHS,
        rest=timedelta(seconds=0.1) if twist else timedelta(seconds=0.6),
    )


def how_far() -> float:
    """Return the share of the epochs that the long training has behind it."""
    log = Path(os.environ["MODELS_DIR"]) / "training-001" / "training.log"
    return len(log.read_text().splitlines()) / EPOCHS if log.exists() else 0.0


ACT = Act(
    name="training",
    saga=training,
    does="fetches data, trains a model, judges it at a gate, lets it serve",
    trap="training is long: killed in the middle, it goes on at its last checkpoint and not at the beginning",
    stories=(
        Story(1, "everything in order", COMPLETED),
        Story(1, "the model is not good enough: its files go, the one before serves", UNDONE, NOISY),
    ),
    make=make,
    promises=(
        Promise(
            "What serves is a model that passed the gate",
            """select a.name || ' serves ' || a.model from models.aliases a
               left join models.deployments d on d.model = a.model left join orchestrator.runs r on r.id = d.job
               where r.state is distinct from 'completed'
               union all select d.job from models.deployments d join orchestrator.runs r on r.id = d.job
                         where r.state <> 'completed'""",
            "select count(*) from models.aliases",
        ),
        Promise(
            "No epoch was trained twice, though the training was killed",
            f"""select job from demo.epochs group by job having count(*) <> count(distinct epoch)
                union all select r.id from orchestrator.runs r
                          where r.saga like '%training' and r.state = 'completed'
                          and (select max(epoch) from demo.epochs e where e.job = r.id) <> {EPOCHS}""",
            "select count(*) from demo.epochs where attempt > 1",
        ),
    ),
    shown=(Shown("A training that was killed, and went on", "history", "", "completed"),),
    first=True,
    has_effects_outside=False,
    middle=how_far,
)
