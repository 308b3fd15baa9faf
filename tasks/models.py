"""Owns the life of a model: data, training with checkpoints, judgement, and the alias under which it serves.

What is large lies in files below MODELS_DIR, one folder for each job; the journal holds their names. The alias is
a row, so that switching it, and switching it back, are transactional.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Column, Connection, Table, Text, delete, select, update
from sqlalchemy.dialects.postgresql import insert

from orchestrator import Effect, Rejected, RetryPolicy, step
from tasks import model
from tasks.database import metadata
from tasks.model import Dataset, Weights
from tasks.outside import client

RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=5)
PAGE = 500
KEPT_FOR_JUDGEMENT = 0.2
CERTAIN = {"TOWN PHARMACY": "health", "CITY METRO": "transport", "CINEMA PALACE": "leisure"}

aliases = Table(
    "aliases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("model", Text, nullable=False),
    schema="models",
)

deployments = Table(
    "deployments",
    metadata,
    Column("job", Text, primary_key=True),
    Column("alias", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("previous", Text),
    schema="models",
)


class TrainingJob(BaseModel):
    """Ask for a model that tells categories, learned from an account's transactions, and deployed if it is good.

    `rest` is a pause after each epoch, for a machine that has other work too.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    account: str
    alias: str = "categoriser"
    epochs: int = Field(default=10, ge=1)
    gate: float = 0.9
    seed: int = 7
    rest: timedelta = timedelta(0)


class Trained(BaseModel):
    """Name the file of a trained model."""

    path: str
    epochs: int
    loss: float


class Deployed(BaseModel):
    """Say which model serves under an alias, and which did before."""

    alias: str
    path: str
    previous: str | None


class Discarded(Rejected):
    """Say that the files of this job were thrown away; nothing was written."""


class NotWhatWasTrained(Rejected):
    """Say that what serves under the alias does not know what it must."""


# Files ----------------------------------------------------------------------------------------------------


def folder(job: TrainingJob) -> Path:
    """Return the folder of a job's files. Raises: Discarded."""
    found = Path(os.environ.get("MODELS_DIR", ".dev/models")) / job.id
    if _tombstone(found).exists():
        raise Discarded(f"The files of {job.id} were thrown away.")
    return found


@step
def discard(job: TrainingJob) -> None:
    """Throw the job's files away, and let none come later."""
    try:
        found = folder(job)
    except Discarded:
        return
    found.parent.mkdir(parents=True, exist_ok=True)
    _tombstone(found).touch()
    shutil.rmtree(found, ignore_errors=True)


@step(compensate=discard, retry=RETRY, start_to_close_timeout=timedelta(minutes=2))
def preprocess(job: TrainingJob) -> str:
    """Fetch the account's transactions, make numbers of them, and return the file. Raises: httpx.HTTPError."""
    texts, labels = zip(*_examples(job.account), strict=True)
    path = folder(job) / "dataset.npz"
    categories = sorted(set(labels))
    numbers = np.array([categories.index(label) for label in labels])
    model.save(path, features=model.featurise(texts), labels=numbers, categories=np.array(categories))
    return str(path)


def _examples(account: str) -> Iterator[tuple[str, str]]:
    cursor: int | None = 0
    while cursor is not None:
        page = client.page(account, cursor, PAGE)
        cursor = page["next"]
        yield from ((each["text"], each["category"]) for each in page["transactions"])


@step(
    effect=Effect.NONE, retry=RETRY, start_to_close_timeout=timedelta(hours=6), heartbeat_timeout=timedelta(minutes=1)
)
def train(job: TrainingJob, dataset: str) -> Trained:
    """Train epoch by epoch; an attempt goes on from the checkpoint that the one before it has told of.

    There is nothing to undo but files, which go with the job's folder.
    """
    current = step.current()
    told: Any = current.heartbeat_details
    data, categories = _training_part(dataset)
    weights = model.load_weights(Path(told["checkpoint"])) if told else model.untrained(categories)
    loss = float(told["loss"]) if told else 0.0
    while weights.epoch < job.epochs:
        weights, loss = model.train_epoch(weights, data, job.seed)
        checkpoint = folder(job) / f"epoch-{weights.epoch:03}.npz"
        model.save_weights(checkpoint, weights)
        current.heartbeat({"checkpoint": str(checkpoint), "loss": loss})
        _note(job, weights, loss)
        time.sleep(job.rest.total_seconds())
    path = folder(job) / "model.npz"
    model.save_weights(path, weights)
    return Trained(path=str(path), epochs=weights.epoch, loss=loss)


def _note(job: TrainingJob, weights: Weights, loss: float) -> None:
    """Write the epoch down, with the process that it was trained in."""
    line = {"epoch": weights.epoch, "loss": loss, "attempt": step.current().attempt, "pid": os.getpid()}
    with (folder(job) / "training.log").open("a") as log:
        log.write(json.dumps(line) + "\n")


@step(effect=Effect.NONE, retry=RETRY)
def evaluate(trained: Trained, dataset: str) -> float:
    """Return the share of examples that the model gets right, of those that it was not trained with."""
    return model.accuracy(model.load_weights(Path(trained.path)), _judgement_part(dataset))


def _training_part(dataset: str) -> tuple[Dataset, tuple[str, ...]]:
    features, labels, categories = model.load_dataset(Path(dataset))
    kept = int(len(labels) * KEPT_FOR_JUDGEMENT)
    return Dataset(features[kept:], labels[kept:]), categories


def _judgement_part(dataset: str) -> Dataset:
    features, labels, _ = model.load_dataset(Path(dataset))
    kept = int(len(labels) * KEPT_FOR_JUDGEMENT)
    return Dataset(features[:kept], labels[:kept])


# The alias ------------------------------------------------------------------------------------------------


@step(transactional=True)
def withdraw(conn: Connection, job: TrainingJob) -> None:
    """Let the model before this one serve again; if another was deployed on top of it, that one stays."""
    undone = delete(deployments).where(deployments.c.job == job.id).returning(deployments)
    mine = conn.execute(undone).one_or_none()
    if mine is None:
        return
    serving = (aliases.c.name == mine.alias) & (aliases.c.model == mine.model)
    if mine.previous is None:
        conn.execute(delete(aliases).where(serving))
    else:
        conn.execute(update(aliases).values(model=mine.previous).where(serving))
    above = (deployments.c.alias == mine.alias) & (deployments.c.previous == mine.model)
    conn.execute(update(deployments).values(previous=mine.previous).where(above))


@step(transactional=True, compensate=withdraw, retry=RETRY)
def deploy(conn: Connection, job: TrainingJob, trained: Trained) -> Deployed:
    """Let the model serve under the alias, and remember which one did."""
    previous = conn.scalar(select(aliases.c.model).where(aliases.c.name == job.alias).with_for_update())
    row = insert(aliases).values(name=job.alias, model=trained.path)
    conn.execute(row.on_conflict_do_update(index_elements=["name"], set_={"model": trained.path}))
    done = {"job": job.id, "alias": job.alias, "model": trained.path, "previous": previous}
    conn.execute(insert(deployments).values(done))
    return Deployed(alias=job.alias, path=trained.path, previous=previous)


@step(transactional=True, effect=Effect.NONE, retry=RETRY)
def verify(conn: Connection, job: TrainingJob) -> None:
    """Ask what serves under the alias for what it must know. Raises: NotWhatWasTrained, a rejection."""
    weights = serving(conn, job.alias)
    found = model.categorise(weights, list(CERTAIN)) if weights else []
    right = [text for text, category in zip(CERTAIN, found, strict=False) if category == CERTAIN[text]]
    if len(right) < len(CERTAIN):
        raise NotWhatWasTrained(f"The model under {job.alias} knows {len(right)} of {len(CERTAIN)} that are certain.")


def serving(conn: Connection, alias: str) -> Weights | None:
    """Return the model that serves under an alias, if one does."""
    path = conn.scalar(select(aliases.c.model).where(aliases.c.name == alias))
    return None if path is None else model.load_weights(Path(path))


def _tombstone(found: Path) -> Path:
    return found.with_suffix(".discarded")
