"""Owns the training of a model: what is not good enough, or fails where it serves, leaves the one before in place."""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel

from orchestrator import saga
from tasks import models
from tasks.models import TrainingJob


class TrainingReport(BaseModel):
    """Say how good the model is, and which model it took the place of."""

    job_id: str
    accuracy: float
    loss: float
    model: str
    previous: str | None


class NotGoodEnough(Exception):
    """Say that the model did not pass the gate; its files are thrown away."""


@saga.define(version=1, deadline=timedelta(days=1))
async def training(job: TrainingJob) -> TrainingReport:
    """Prepare the data, train, judge at the gate, deploy, and look whether it does where it serves."""
    dataset = await saga.step(models.preprocess, job)
    trained = await saga.step(models.train, job, dataset)
    accuracy = await saga.step(models.evaluate, trained, dataset)
    if accuracy < job.gate:
        raise NotGoodEnough(f"{accuracy:.0%} right, and the gate is {job.gate:.0%}")
    deployed = await saga.step(models.deploy, job, trained)
    await saga.step(models.verify, job)
    return TrainingReport(
        job_id=job.id, accuracy=accuracy, loss=trained.loss, model=deployed.path, previous=deployed.previous
    )
