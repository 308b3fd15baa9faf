"""Rules about secrets: what goes into a run shows up in no log, broker, event or metric.

Owns the search, in the forms in which bytes hide: as they are, as base64 at any offset, as hex, percent-encoded.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from tests.proof.rules import rule
from tests.proof.world import World

Place = Path | bytes | str


def contents(places: Mapping[str, Place]) -> dict[str, bytes]:
    """Return what is in each place: a file, every file of a folder, or the bytes that are given.

    Raises: OSError for a file that is not there, ValueError for an empty folder; nothing was looked at then.
    """
    return dict(_contents(places))


def _contents(places: Mapping[str, Place]) -> Iterator[tuple[str, bytes]]:
    for name, place in places.items():
        if isinstance(place, str):
            yield name, place.encode()
        elif isinstance(place, bytes):
            yield name, place
        elif place.is_dir():
            files = [file for file in sorted(place.rglob("*")) if file.is_file()]
            if not files:
                raise ValueError(f"{place} is empty, so that nothing can be found in it")
            yield from ((f"{name}/{file.relative_to(place)}", file.read_bytes()) for file in files)
        else:
            yield name, place.read_bytes()


def disguises(secret: str) -> Iterable[bytes]:
    """Return the forms of a secret that are looked for."""
    raw = secret.encode()
    yield raw
    yield raw.hex().encode()
    yield quote(secret, safe="").encode()
    yield json.dumps(secret)[1:-1].encode()
    for offset in range(3):  # base64 of a longer text shows it in one of three ways
        encoded = base64.b64encode(b"\0" * offset + raw)
        yield encoded[(0, 2, 3)[offset] : len(encoded) - 4 if (offset + len(raw)) % 3 else len(encoded)]


@rule("a secret is in the open")
def secrets_stay_in_the_database(world: World) -> Iterator[tuple[str, str]]:
    for secret in world.canaries:
        forms = list(disguises(secret))
        for name, data in world.places.items():
            if any(form in data for form in forms):
                yield name, "it holds a secret of a run's arguments, results or errors"


@rule("a secret was never used")
def secrets_are_in_the_database(world: World) -> Iterator[tuple[str, str]]:
    """A search for what was never put in finds nothing, and proves nothing."""
    kept = json.dumps([[run.row["input"], run.journal] for run in world.runs.values()], default=str)
    for secret in world.canaries:
        if json.dumps(secret)[1:-1] not in kept:
            yield "the database", f"the canary {secret[:4]}... is in no run"
