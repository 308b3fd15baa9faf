"""``lint``: mistakes in sagas and steps that can be found without running them."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from celery.utils.imports import cwd_in_path, import_from_cwd
from rich.text import Text

from orchestrator.cli import rules
from orchestrator.cli.command import Command, as_json, console, print_json
from orchestrator.cli.rules import RULES, Finding
from orchestrator.errors import DefinitionError
from orchestrator.saga import registry as sagas
from orchestrator.step import registry as steps


def _rules_help() -> str:
    lines = [f"  {code}  {'warning' if rule.warning else 'error  '}  {rule.summary}" for code, rule in RULES.items()]
    return "\b\nRules:\n" + "\n".join(lines)


@click.command(
    cls=Command,
    exit_codes="Exit codes: 0 no errors (warnings do not count without --strict), 1 errors, 2 wrong usage.",
    help="Find mistakes in sagas and steps without running them.\n\n"
    "MODULES are modules or files; without any, all in which the app's sagas and steps are. A line that ends in "
    "`# saga: ignore[SG102]` is left alone.\n\n" + _rules_help(),
)
@click.argument("modules", nargs=-1)
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@as_json
@click.pass_context
def lint(ctx: click.Context, modules: tuple[str, ...], strict: bool, json_: bool) -> None:
    """Find mistakes in sagas and steps without running them."""
    found = check_app(ctx.obj.app, modules)
    failed = any(strict or not finding.warning for finding in found)
    if json_:
        print_json([_json(finding) for finding in found])
    else:
        _print(ctx, found)
    ctx.exit(1 if failed else 0)


def check_app(app: Any, modules: Sequence[str] = ()) -> list[Finding]:
    """Return what is wrong in these modules, or in all that declare sagas and steps of `app`; by file and line.

    Imports them.  Raises: BadParameter for one that there is not.
    """
    found = _import_includes(app)
    loaded = [module for name in modules if (module := _load(name, found)) is not None]
    chosen = {module.__name__ for module in loaded} if modules else None
    registered = frozenset(app.tasks)
    for step in list(steps.steps.values()):
        if chosen is None or step.__module__ in chosen:
            found += rules.check_step(step, registered)
    for saga in sagas.declared:
        if chosen is None or saga.__module__ in chosen:
            found += rules.check_saga(saga, registered)
    return sorted(set(found), key=lambda finding: (finding.path, finding.line, finding.column, finding.code))


def _import_includes(app: Any) -> list[Finding]:
    found: list[Finding] = []
    app.finalize(auto=True)
    for name in dict.fromkeys([*app.loader.builtin_modules, *app.conf.include, *app.conf.imports]):
        _guarded(functools.partial(import_from_cwd, name), found)
    if not found:
        app.loader.import_default_modules()
    return found


def _load(name: str, found: list[Finding]) -> ModuleType | None:
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise click.BadParameter(f"there is no file {name!r}")
        known = next((m for m in list(sys.modules.values()) if _is_file(m, path)), None)
        if known is not None:
            return known
        name = _import_name(path.resolve())
    elif name not in sys.modules and not _exists(name):
        raise click.BadParameter(f"there is no module {name!r}")
    loaded: list[ModuleType] = []
    _guarded(lambda: loaded.append(import_from_cwd(name)), found)
    return loaded[0] if loaded else None


def _exists(name: str) -> bool:
    try:
        with cwd_in_path():
            return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _import_name(path: Path) -> str:
    """Return the name to import a file by: from here, or by itself if it lies elsewhere."""
    if path.is_relative_to(Path.cwd()):
        return ".".join(path.relative_to(Path.cwd()).with_suffix("").parts)
    sys.path.insert(0, str(path.parent))
    return path.stem


def _is_file(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return bool(file) and os.path.exists(str(file)) and os.path.samefile(str(file), path)


def _guarded(load: Any, found: list[Finding]) -> None:
    """Import, and turn a declaration that is refused into a finding where it stands."""
    try:
        load()
    except DefinitionError as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = str(Path(__file__).parent.parent)
        frame = next((f for f in reversed(frames) if not f.filename.startswith((ours, "<"))), frames[-1])
        found.append(Finding(rules.shown_path(frame.filename), frame.lineno or 1, 1, "SG001", str(error)))


def _print(ctx: click.Context, found: list[Finding]) -> None:
    out = console(ctx)
    for finding in found:
        style = "yellow" if finding.warning else "red"
        place = f"{finding.path}:{finding.line}:{finding.column}:"
        out.print(Text.assemble((place, "bold"), " ", (finding.code, style), " ", finding.message), soft_wrap=True)
    warnings = sum(finding.warning for finding in found)
    errors = len(found) - warnings
    if not found:
        click.echo(f"All checks passed: {_count(len(sagas.declared), 'saga')}, {_count(len(steps.steps), 'step')}.")
    else:
        click.echo(f"Found {_count(errors, 'error')} and {_count(warnings, 'warning')}.")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _json(finding: Finding) -> dict[str, Any]:
    return {
        "path": finding.path, "line": finding.line, "column": finding.column, "code": finding.code,
        "severity": "warning" if finding.warning else "error", "message": finding.message,
    }  # fmt: skip
