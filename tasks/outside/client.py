"""Owns how steps speak to the outside world: over HTTP, with a timeout, and honest about what is not known.

A refusal is a rejection: certainly nothing happened. Everything else that goes wrong, a status 500, a lost
connection, no answer in time, is an error of httpx, and leaves open what happened.
"""

from __future__ import annotations

import logging
import os
from typing import Any
from urllib.parse import quote

import httpx

from orchestrator import Rejected

DEFAULT_TIMEOUT_SECONDS = 5.0

_clients: dict[tuple[str, float], httpx.Client] = {}

logging.getLogger("httpx").setLevel(logging.WARNING)  # not a line for every request


class Refused(Rejected):
    """Say that the other party refused, and did nothing; the message begins with its reason."""


def do(kind: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    """Have it done, once for each key. Raises: Refused; httpx.HTTPError if nobody knows."""
    return _request("PUT", kind, key, json=body)


def undo(kind: str, key: str) -> None:
    """Have it undone, or refused if it comes later. Raises: httpx.HTTPError."""
    _request("DELETE", kind, key)


def find(kind: str, key: str) -> dict[str, Any] | None:
    """Return the answer to what was done under a key; None if it was not, or was undone. Raises: httpx.HTTPError."""
    found = _request("GET", kind, key)
    return found["answer"] if found["state"] == "done" else None


def find_for_good(kind: str, key: str) -> dict[str, Any] | None:
    """Return the answer to what was done under a key; what was not is refused from now on. Raises: httpx.HTTPError."""
    found = find(kind, key)
    if found is None:
        undo(kind, key)
    return found


def page(account: str, cursor: int, limit: int) -> dict[str, Any]:
    """Return a page of the bank's transactions: transactions, next, total. Raises: httpx.HTTPError."""
    return _request("GET", "feeds", account, params={"cursor": cursor, "limit": limit})


def _request(method: str, kind: str, key: str, **options: Any) -> dict[str, Any]:
    answer = http().request(method, f"/{kind}/{quote(key, safe='')}", **options)
    if answer.status_code in (409, 422):
        no = answer.json()
        raise Refused(f"{no['reason']}: {no['sentence']}")
    return dict(answer.raise_for_status().json())


def http() -> httpx.Client:
    """Return this process's client for the server at OUTSIDE_URL."""
    url = os.environ.get("OUTSIDE_URL")
    if not url:
        raise RuntimeError("No outside world: set OUTSIDE_URL to where `python -m tasks.outside LOG` listens.")
    wanted = url, float(os.environ.get("OUTSIDE_TIMEOUT_SECONDS", DEFAULT_TIMEOUT_SECONDS))
    if wanted not in _clients:  # built on first use, hence after the worker's fork; it keeps its connections open
        _clients[wanted] = httpx.Client(base_url=url, timeout=wanted[1], trust_env=False)
    return _clients[wanted]


def close() -> None:
    """Close the connections of this process."""
    while _clients:
        _clients.popitem()[1].close()
