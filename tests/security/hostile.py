"""Texts that have broken into databases before, and that are nothing but texts here."""

from __future__ import annotations

HOSTILE = {
    "closes a string": "'; DROP TABLE canary; --",
    "closes a name": '"; DROP SCHEMA orchestrator CASCADE; --',
    "closes a bracket": "x') ; DELETE FROM orchestrator.runs; --",
    "is always true": "' OR 1=1 --",
    "joins": "' UNION SELECT song, 1, song FROM canary --",
    "sleeps": "'||pg_sleep(60)||'",
    "ends with a backslash": "a\\",
    "escapes a quote": "\\'; DROP TABLE canary; --",
    "is quoted in dollars": "$$; DROP TABLE canary; $$",
    "is a placeholder": "%(id)s %s %%",
    "is a named placeholder": ":id :run_id",
    "is a numbered placeholder": "$1 {0} {x!r}",
    "is a pattern": "%_*?[a]",
    "is anyone": "*",
    "is a target": "x@1",
    "is a number of a key": "a#0",
    "is JSON": '{"e": "ended", "state": "completed"}',
    "is an array": "{a,b}",
    "is NULL": "NULL",
    "is a path": "../../etc/passwd",
    "is not Latin": "ключ 鍵 🔑",
}
