"""A report as JSON, as a page that needs nothing else, and as numbers for Prometheus.

Owns how a report looks.  Whatever comes from data is escaped; the page loads nothing and runs nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.engine.reconcile import Report
    from orchestrator.store.reports import Progress


def write(report: Report, latest: Iterable[tuple[datetime, Progress]], directory: Path) -> None:
    """Write the files, each whole or not at all; a directory that cannot be written is a problem of the report."""
    files = {
        f"reconciliation-{report.id}.json": json.dumps(as_json(report), indent=2),
        f"reconciliation-{report.id}.html": page(report),
        "reconciliation.prom": metrics(latest),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            file = directory / name
            part = file.with_name(f".{name}.{os.getpid()}.part")
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
h1 { margin-bottom: 0 } h2 { margin: 2.5rem 0 0 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0 }
th { border-bottom: 2px solid; white-space: nowrap } td { border-bottom: 1px solid #8884; overflow-wrap: anywhere }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.verdict { font-size: 1.2rem; border-left: .4rem solid; padding: .4rem 1rem }
.good { color: #187a3c } .bad { color: #c0262d } .dim { opacity: .7 }
@media (prefers-color-scheme: dark) {
  body { background: #111; color: #ddd } .good { color: #4cc07a } .bad { color: #ff7b81 }
}
"""
_NUMBERS = {"looked at", "breaks", "errors", "amount", "sums", "report"}


def page(report: Report) -> str:
    """Return a report as HTML."""
    title = f"Reconciliation {report.id}"
    trend = [(each.id, _moment(each.started_at), each.looked_at, each.breaks, each.errors) for each in report.earlier]
    parts = [
        f"<h1>{title}</h1><p class='dim'>Begun {_moment(report.started_at)}. A break is one thing that is not as it "
        "must be. Nothing has been changed.</p>",
        f"<p class='verdict {'bad' if report.exit_code else 'good'}'>{escape(sentence(report))}</p>",
        _table(("check", "result", "looked at", "breaks", "sums"), [_check(each) for each in _worst_first(report)]),
        *(_breaks(each) for each in _worst_first(report) if each.breaks),
        "<h2>Earlier reports on the same checks</h2>"
        + _table(("report", "when", "looked at", "breaks", "errors"), trend)
        if trend
        else "",
    ]
    head = f"<meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def sentence(report: Report) -> str:
    """Return what a report came to."""
    errors = sum(each.error is not None for each in report.checks)
    looked = sum(each.looked_at for each in report.checks)
    checks = _many(len(report.checks), "check")
    found = f"{_many(report.breaks, 'break')} in {checks} of {_many(looked, 'thing')}."
    return found + (f" {_many(errors, 'check')} could not be completed." if errors else "")


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _worst_first(report: Report) -> list[Progress]:
    return sorted(report.checks, key=lambda each: (each.error is None, each.breaks == 0, each.name))


def _check(each: Progress) -> tuple[Any, ...]:
    result = f"could not be completed: {each.error}" if each.error else "breaks" if each.breaks else "all is well"
    return each.name, _Marked(result, bool(each.error or each.breaks)), each.looked_at, each.breaks, _sums(each.sums)


class _Marked(str):
    """A text that is good or bad."""

    def __new__(cls, text: str, bad: bool) -> _Marked:
        made = super().__new__(cls, text)
        made.kind = "bad" if bad else "good"
        return made

    kind: str


def _breaks(each: Progress) -> str:
    names = ("key", "what is wrong", "amount", "corrected by run")
    rows = [(e["key"], e["problem"], f"{e.get('amount', '')} {e.get('currency') or ''}".strip(), e.get("run", ""))
            for e in each.examples]  # fmt: skip
    shown = [n for n in range(len(names)) if n < 2 or any(row[n] for row in rows)]
    more = f", the first {len(rows):,} of them" if each.breaks > len(rows) else ""
    title = f"<h2>{escape(each.name)}: {_many(each.breaks, 'break')}{more}</h2>"
    return title + _table(tuple(names[n] for n in shown), [tuple(row[n] for n in shown) for row in rows])


def _table(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    head = "".join(f"<th{_class(name)}>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td{_class(name, cell)}>{_cell(cell)}</td>" for name, cell in zip(names, row, strict=True))
        + "</tr>" for row in rows
    )  # fmt: skip
    return f"<table><tr>{head}</tr>{body}</table>"


def _class(name: str, cell: Any = "") -> str:
    kind = cell.kind if isinstance(cell, _Marked) else "number" if name in _NUMBERS else ""
    return f" class='{kind}'" if kind else ""


def _cell(cell: Any) -> str:
    return f"{cell:,}" if isinstance(cell, int) else escape(str(cell)).replace("\n", "<br>")


def _sums(sums: dict[str, str]) -> str:
    return "\n".join(f"{Decimal(amount):,f} {currency}".strip() for currency, amount in sorted(sums.items()))


def _moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


# -- numbers for Prometheus --------------------------------------------------------------------------------------------
_METRICS = {
    "breaks": "Breaks that a check found when it last ran.",
    "looked_at": "Things that it looked at.",
    "failed": "1 if it could not be completed.",
    "started_timestamp_seconds": "When the report began that it last ran for.",
    "sum": "Money that it looked at, by currency.",
}


def metrics(latest: Iterable[tuple[datetime, Progress]]) -> str:
    """Return what is known of each check in the text format of Prometheus."""
    lines: dict[str, list[str]] = {name: [] for name in _METRICS}
    for started_at, check in latest:
        label = f'check="{_label(check.name)}"'
        numbers = {
            "breaks": check.breaks, "looked_at": check.looked_at, "failed": int(check.error is not None),
            "started_timestamp_seconds": round(started_at.timestamp()),
        }  # fmt: skip
        for name, number in numbers.items():
            lines[name].append(f"{{{label}}} {number}")
        for currency, amount in sorted(check.sums.items()):
            lines["sum"].append(f'{{{label},currency="{_label(currency)}"}} {amount}')
    return "".join(
        f"# HELP orchestrator_reconcile_{name} {_METRICS[name]}\n# TYPE orchestrator_reconcile_{name} gauge\n"
        + "".join(f"orchestrator_reconcile_{name}{line}\n" for line in found)
        for name, found in lines.items()
    )


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
