"""The acts of the demo, in the order in which they are told."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sagas.demo.acts import onboarding, order, payment, reconciliation, sync, training, transfer
from sagas.demo.story import Act, Job

_TOLD = (transfer, order, payment, onboarding, training, sync, reconciliation)
ACTS: dict[str, Act] = {act.ACT.name: act.ACT for act in _TOLD}


def jobs_of(acts: Sequence[Act], seed: int) -> list[Job]:
    """Return the jobs of these acts, shuffled, the same for the same seed."""
    chance = random.Random(seed)
    jobs = [job for act in acts for job in _jobs(act, chance)]
    chance.shuffle(jobs)
    return sorted(jobs, key=lambda job: not job.act.first)


def _jobs(act: Act, chance: random.Random) -> list[Job]:
    told = [story for story in act.stories for _ in range(story.share)]
    ids = [f"{act.name}-{number:03}" for number in range(1, len(told) + 1)]
    return [Job(name, act, act.make(name, story.twist, chance), story) for name, story in zip(ids, told, strict=True)]
