"""Owns the effect log: one line per external effect that really happened, for those who check the promises.

Off unless EFFECT_LOG names a file. It must never decide anything: no step reads it.
"""

from __future__ import annotations

import json
import os


def record(effect: str, key: str) -> None:
    """Append ``effect`` on ``key`` to the file named by EFFECT_LOG, if any, in one write: lines never mix."""
    path = os.environ.get("EFFECT_LOG")
    if not path:
        return
    line = json.dumps({"effect": effect, "key": key, "pid": os.getpid()}) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)
