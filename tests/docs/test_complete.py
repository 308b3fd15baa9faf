"""What the documentation must mention, read from the code; and that its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from celery import Task

import orchestrator
from orchestrator import cli, errors, saga, testing
from orchestrator.cli.rules import RULES
from orchestrator.declaration import REFUSED_OPTIONS, StepOptions
from orchestrator.machine.policy import Effect
from orchestrator.machine.states import RunState
from orchestrator.settings import PREFIX, Settings
from orchestrator.step import StepContext

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def _missing(page: str, names: set[str]) -> set[str]:
    text = (DOCS / page).read_text()
    return {name for name in names if not re.search(rf"`[^`\n]*\b{re.escape(name)}\b[^`\n]*`", text)}


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path}"
        assert not anchor or anchor in _anchors(target), f"{page.name}: {path}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    assert [p.name for p in sorted(DOCS.rglob("*.md")) if p.name != "index.md" and f"{p.name})" not in index] == []


def test_every_setting_has_its_row_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(ORCHESTRATOR_\w+)` \| ([^|]+) \|", (DOCS / "operating.md").read_text(), re.M))
    assert rows.keys() == {PREFIX + name.upper() for name in Settings.model_fields}
    settings = Settings.from_environment({PREFIX + "DATABASE_URL": "postgresql://host/db"})
    for name in Settings.model_fields.keys() - {"database_url"}:
        default = getattr(settings, name)
        seconds = f"{default.total_seconds():g} s" if hasattr(default, "total_seconds") else None
        plain = f"{default:g}" if isinstance(default, float) else str(default).lower()
        assert rows[PREFIX + name.upper()].strip("` ") == (seconds or plain), name


def test_every_option_of_a_celery_task_is_in_the_table() -> None:
    options = {
        name
        for name, value in vars(Task).items()
        if not name.startswith("_") and not name.endswith("Error") and not callable(value) and name != "app"
        and not isinstance(value, (property, classmethod))
    }  # fmt: skip
    decorator = {"base", "bind", "autoretry_for", "retry_kwargs", "retry_backoff", "retry_jitter", "pydantic"}
    assert _missing("celery-options.md", options | decorator | set(REFUSED_OPTIONS)) == set()


def test_every_refused_option_is_said_to_be_refused() -> None:
    rows = re.findall(r"^\| (.+?) \| \*\*refused\*\*", (DOCS / "celery-options.md").read_text(), re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(REFUSED_OPTIONS)


def test_every_option_of_a_step_is_in_the_table() -> None:
    context = {"run_id", "key", "attempt", "idempotency_key", "deadline", "heartbeat", "heartbeat_details"}
    assert context <= set(dir(StepContext))
    options = set(StepOptions.__dataclass_fields__) - {"celery"}
    assert _missing("steps.md", options | context | {effect.name for effect in Effect}) == set()


def test_every_function_of_the_saga_module_is_documented() -> None:
    assert _missing("sagas.md", set(saga.__all__) - {"Saga", "registry"}) == set()


def test_every_error_is_documented() -> None:
    public = {name for name in errors.__all__ if name in orchestrator.__all__} | {"StepStopped"}
    assert _missing("errors.md", public) == set()


def test_everything_of_the_testing_module_is_documented() -> None:
    assert _missing("testing.md", set(testing.__all__) - {"Call"}) == set()


def test_every_state_of_a_run_is_documented() -> None:
    text = (DOCS / "concepts.md").read_text()
    assert [state.value for state in RunState if state.value not in text] == []


def test_every_command_and_option_is_documented() -> None:
    commands = dict(cli.saga.commands)
    rows = set(re.findall(r"^\| `(\w+)[^`]*` \|", (DOCS / "operating.md").read_text(), re.M))
    assert commands.keys() <= rows
    missing = set()
    for command in commands.values():
        flags = {
            flag for o in command.params if isinstance(o, click.Option) for flag in o.opts if flag.startswith("--")
        }
        missing |= _missing("operating.md", {flag.lstrip("-") for flag in flags})
    assert missing == set()


def test_every_rule_of_lint_is_documented_with_its_severity() -> None:
    rows = re.findall(r"^\| (SG\d+) \| (.+?) \| (error|warning) \|$", (DOCS / "operating.md").read_text(), re.M)
    assert rows == [(code, rule.summary, "warning" if rule.warning else "error") for code, rule in RULES.items()]


def test_only_one_page_speaks_of_workflows_and_activities() -> None:
    speaking = {
        page.name for page in PAGES if re.search(r"\b(workflow|activity|activities)s?\b", page.read_text(), re.I)
    }
    assert speaking == {"coming-from-temporal.md"}
