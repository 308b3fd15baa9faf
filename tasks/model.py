"""Owns a small model that tells a transaction's category from its text: softmax regression over hashed words.

Pure numpy over arrays and files that the caller names; must never know sagas, databases or the network. The same
dataset, epochs and seed give the same weights, bit for bit, however often training was interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

FEATURES = 256
BATCH = 50
RATE = 0.5


@dataclass(frozen=True, slots=True)
class Dataset:
    """Hold examples, one a row, and the number of the category of each."""

    features: Floats
    labels: Numbers


@dataclass(frozen=True, slots=True)
class Weights:
    """Hold the model after so many epochs; one column for each category."""

    values: Floats
    categories: tuple[str, ...]
    epoch: int = 0


def featurise(texts: Sequence[str]) -> Floats:
    """Return a row for each text that counts its words by their hash; digits tell nothing."""
    rows = np.zeros((len(texts), FEATURES))
    for row, text in zip(rows, texts, strict=True):
        for word in text.split():
            if not word.isdigit():
                row[crc32(word.encode()) % FEATURES] += 1.0
    return rows


def untrained(categories: Sequence[str]) -> Weights:
    """Return a model that knows nothing yet."""
    return Weights(np.zeros((FEATURES, len(categories))), tuple(categories))


def train_epoch(weights: Weights, data: Dataset, seed: int) -> tuple[Weights, float]:
    """Go once through the data in an order that seed and epoch give; return the better model and its mean loss."""
    order = np.random.default_rng([seed, weights.epoch]).permutation(len(data.labels))
    values, losses = weights.values.copy(), []
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        rows, labels = data.features[batch], data.labels[batch]
        chances = _softmax(rows @ values)
        losses.append(-np.log(chances[np.arange(len(batch)), labels]).mean())
        chances[np.arange(len(batch)), labels] -= 1.0
        values -= RATE * rows.T @ chances / len(batch)
    return replace(weights, values=values, epoch=weights.epoch + 1), float(np.mean(losses))


def accuracy(weights: Weights, data: Dataset) -> float:
    """Return the share of examples whose category is found."""
    return float((np.argmax(data.features @ weights.values, axis=1) == data.labels).mean())


def categorise(weights: Weights, texts: Sequence[str]) -> list[str]:
    """Return the likeliest category of each text."""
    return [weights.categories[best] for best in np.argmax(featurise(texts) @ weights.values, axis=1)]


def save(path: Path, **arrays: Any) -> None:
    """Write arrays to a file that is whole or not there, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


def save_weights(path: Path, weights: Weights) -> None:
    """Write a model; see `save`."""
    save(path, values=weights.values, categories=np.array(weights.categories), epoch=np.array(weights.epoch))


def load_weights(path: Path) -> Weights:
    """Read a model."""
    with np.load(path) as file:
        return Weights(file["values"], tuple(str(name) for name in file["categories"]), int(file["epoch"]))


def load_dataset(path: Path) -> tuple[Floats, Numbers, tuple[str, ...]]:
    """Read examples: features, labels, and the categories that the labels number."""
    with np.load(path) as file:
        return file["features"], file["labels"], tuple(str(name) for name in file["categories"])


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float64)
