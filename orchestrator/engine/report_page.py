"""A report as JSON and as a page that needs nothing else.

Owns how a report looks.  Whatever comes from data is escaped; the page loads nothing and runs nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.engine.reconcile import Report


def write(report: Report, directory: Path) -> None:
    """Write both files, each whole or not at all; a directory that cannot be written is a problem of the report."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for ending, text in (("json", json.dumps(as_json(report), indent=2)), ("html", page(report))):
            file = directory / f"reconciliation-{report.id}.{ending}"
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(file)
            report.files.append(file)
    except OSError as error:
        report.problems.append(f"the report could not be written to {directory}: {error.strerror}")


def as_json(report: Report) -> dict[str, Any]:
    """Return a report in a form for programs."""
    return {
        "id": report.id,
        "started_at": report.started_at.isoformat(),
        "breaks": report.breaks,
        "exit_code": report.exit_code,
        "problems": report.problems,
        "checks": [
            {
                "name": each.name, "looked_at": each.looked_at, "breaks": each.breaks, "sums": each.sums,
                "error": each.error, "examples": each.examples,
            }
            for each in report.checks
        ],
        "earlier": [{**asdict(each), "started_at": each.started_at.isoformat()} for each in report.earlier],
    }  # fmt: skip


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .8rem .3rem 0 }
th { border-bottom: 2px solid } td { border-bottom: 1px solid #8884; overflow-wrap: anywhere }
.good { color: #187a3c } .bad { color: #c0262d }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd } }
"""


def page(report: Report) -> str:
    """Return a report as HTML."""
    title = f"Reconciliation {report.id}, {_moment(report.started_at)}"
    rows = [(each.name, each.looked_at, each.breaks, _sums(each.sums), each.error or "") for each in report.checks]
    trend = [(each.id, _moment(each.started_at), each.looked_at, each.breaks, each.errors) for each in report.earlier]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='{'bad' if report.exit_code else 'good'}'>{escape(sentence(report))}</p>",
        _table(("check", "looked at", "breaks", "sums", "could not be checked"), rows),
        *(_breaks(each.name, each.breaks, each.examples) for each in report.checks if each.breaks),
        "<h2>Earlier</h2>" + _table(("report", "when", "looked at", "breaks", "errors"), trend) if trend else "",
    ]
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def sentence(report: Report) -> str:
    """Return what a report came to."""
    errors = sum(each.error is not None for each in report.checks)
    looked = sum(each.looked_at for each in report.checks)
    found = f"{report.breaks} breaks in {len(report.checks)} checks of {looked} things."
    return found + (f" {errors} checks could not be completed." if errors else "")


def _breaks(name: str, many: int, examples: list[dict[str, Any]]) -> str:
    rows = [(e["key"], e["problem"], f"{e.get('amount', '')} {e.get('currency') or ''}".strip()) for e in examples]
    more = f", the first {len(examples)}" if many > len(examples) else ""
    return f"<h2>{escape(name)}: {many} breaks{more}</h2>" + _table(("key", "problem", "amount"), rows)


def _table(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _sums(sums: dict[str, str]) -> str:
    return ", ".join(f"{amount} {currency}".strip() for currency, amount in sorted(sums.items()))


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"
