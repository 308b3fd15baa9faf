"""Owns what the outside world remembers: every effect, every undo, in a file that outlives its process.

The file has one JSON line for each thing that really happened, written with one system call before anybody is
told of it; a server that starts reads it again. Must never know HTTP.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.outside.rules import RULES, Body, Refusal


@dataclass(slots=True)
class Record:
    """What is known of one key: what was asked, what was answered, and whether it was undone."""

    kind: str
    key: str
    body: Body = field(default_factory=dict)
    answer: Body | None = None
    undone: bool = False

    @property
    def state(self) -> str:
        """Return done, undone (there was something to undo) or refused (undone before it was done)."""
        if not self.undone:
            return "done"
        return "refused" if self.answer is None else "undone"

    def as_json(self) -> Body:
        """Return what a probe is told."""
        return {"key": self.key, "state": self.state, "body": self.body, "answer": self.answer}


class Book:
    """All records, safe to use from many threads."""

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], Record] = {}
        self._forgotten: list[Record] = []
        lines = log.read_text().splitlines() if log.exists() else []
        for line in lines:
            self._apply(json.loads(line))
        self._file = log.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def do(self, kind: str, key: str, body: Body) -> Body:
        """Do it, once for each key, and return the answer. Raises: Refusal; then nothing was done."""
        with self._lock:
            known = self._known.get((kind, key))
            if known is not None and known.undone:
                raise Refusal("undone", f"{key} was undone before.")
            if known is not None and known.body != body:
                raise Refusal("conflict", f"{key} was something else before.")
            if known is not None and known.answer is not None:
                return known.answer
            answer = RULES[kind](key, body, list(self.of(kind)))
            self._note("did", kind, key, body=body, answer=answer)
            return answer

    def undo(self, kind: str, key: str) -> None:
        """Undo it, once; what was never done is remembered, and refused when it comes."""
        with self._lock:
            known = self._known.get((kind, key))
            if known is None or not known.undone:
                self._note("undid" if known else "refused", kind, key)

    def find(self, kind: str, key: str) -> Record | None:
        """Return what is known of a key."""
        return self._known.get((kind, key))

    def of(self, kind: str) -> Iterator[Record]:
        """Return everything of a kind, also what was forgotten."""
        return (record for record in (*self._forgotten, *self._known.values()) if record.kind == kind)

    def forget(self, kind: str, key: str) -> None:
        """Forget the key and keep the effect, as a provider does that keeps its idempotency keys for a day."""
        with self._lock:
            if (kind, key) in self._known:
                self._note("forgot", kind, key)

    def _note(self, event: str, kind: str, key: str, **more: Any) -> None:
        line = {"at": datetime.now(UTC).isoformat(), "event": event, "kind": kind, "key": key, **more}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._apply(line)

    def _apply(self, line: dict[str, Any]) -> None:
        kind, key = line["kind"], line["key"]
        match line["event"]:
            case "did":
                self._known[kind, key] = Record(kind, key, line["body"], line["answer"])
            case "forgot":
                self._forgotten.append(self._known.pop((kind, key)))
            case "undid" | "refused":
                self._known.setdefault((kind, key), Record(kind, key)).undone = True
