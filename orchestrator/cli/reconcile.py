"""``reconcile``: is what is recorded true?

Owns arguments and output.  Must never judge, and mends nothing.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from orchestrator.cli.command import Command, as_json, client_of, console, grid, print_json, reading
from orchestrator.engine.reconcile import Report
from orchestrator.engine.report_page import as_json as report_json
from orchestrator.engine.report_page import sentence

_CODES = "Exit codes: 0 all is well, 1 there are breaks, 2 something could not be checked (or wrong usage)."
_SHOWN = 5


@click.command(cls=Command, exit_codes=_CODES)
@click.argument("checks", nargs=-1, metavar="[CHECK]...")
@click.option("--directory", default="reports", show_default=True, type=click.Path(path_type=Path),
              help="Write the report there, as JSON and HTML.")  # fmt: skip
@as_json
@click.pass_context
def reconcile(ctx: click.Context, /, checks: tuple[str, ...], directory: Path, json_: bool) -> None:
    """Compare the engine's records with themselves, and with all that the application has registered checks for.

    Runs all checks, or those that are named. Harmless at any time; who was interrupted goes on where it was.
    """
    with reading(ctx):
        pass
    report = client_of(ctx).reconcile(checks, directory=directory)
    if json_:
        print_json(report_json(report))
    else:
        _print(ctx, report)
    ctx.exit(report.exit_code)


def _print(ctx: click.Context, report: Report) -> None:
    out = console(ctx)
    table = grid("CHECK", "LOOKED AT", "BREAKS")
    for each in report.checks:
        style = "red" if each.breaks or each.error else "green"
        more = ", not completed" if each.error else ""
        table.add_row(each.name, f"{each.looked_at:,}", Text(f"{each.breaks:,}{more}", style=style))
    out.print(table)
    for each in (each for each in report.checks if each.breaks or each.error):
        out.print(Text(f"\n{each.name}", style="bold"))
        if each.error:
            out.print(Text(f"    could not be completed: {each.error}", style="red"), soft_wrap=True)
        for example in each.examples[:_SHOWN]:
            run = f" (corrected by run {example['run']})" if "run" in example else ""
            out.print(Text(f"    {example['key']}: {example['problem']}{run}"), soft_wrap=True)
        if each.breaks > _SHOWN:
            out.print(Text(f"    and {each.breaks - _SHOWN:,} more; the report has them", style="dim"))
    out.print()
    for problem in report.problems:
        out.print(Text(problem, style="red"), soft_wrap=True)
    out.print(Text(sentence(report), style="red" if report.exit_code else "green"))
    for file in report.files:
        click.echo(f"Written to {file}")
