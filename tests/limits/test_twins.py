"""A name is one step's, or one saga's: of two under one name only the later would ever run."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from orchestrator import DefinitionError, testing
from orchestrator.saga import registry as sagas
from orchestrator.step import registry as steps

HEAD = "from orchestrator import saga, step\n"
REFUND = '@step(name="twins.refund")\ndef refund(n: int) -> str:\n    return __name__\n'
PAY = '@saga.define(name="twins.pay")\nasync def pay(n: int) -> str:\n    return __name__\n'
PROBED = "@step\ndef {step}(n: int) -> int: ...\n@{step}.probe\ndef find(n: int) -> int | None: ...\n"

Import = Callable[[str, str], ModuleType]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Writes a module and imports it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(steps, "steps", dict(steps.steps))
    monkeypatch.setattr(sagas, "sagas", dict(sagas.sagas))
    monkeypatch.setattr(steps, "_listeners", [])
    monkeypatch.setattr(sagas, "_listeners", [])
    names: list[str] = []

    def load(name: str, source: str) -> ModuleType:
        (tmp_path / f"{name.replace('.', '/')}.py").write_text(HEAD + source)
        importlib.invalidate_caches()
        names.append(name)
        return importlib.import_module(name)

    yield load
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("source", "what"), [(REFUND, "step twins.refund"), (PAY, "saga twins.pay version 1")], ids=["step", "saga"]
)
def test_a_module_that_takes_the_name_of_another_ones_is_warned_of(
    imported: Import, caplog: pytest.LogCaptureFixture, source: str, what: str
) -> None:
    imported("twins_first", source)
    imported("twins_second", source)
    (warning,) = caplog.messages
    assert re.fullmatch(
        rf"{what} is declared by twins_first\.(\w+) and by twins_second\.\1: workers run the later one for both",
        warning,
    )


def test_two_versions_of_a_saga_are_not_twins(imported: Import) -> None:
    imported("twins_first", PAY)
    second = imported("twins_second", PAY.replace("(name", "(version=2, name"))
    assert testing.run(second.pay, 1).output == "twins_second"


def test_two_functions_of_a_module_may_not_have_one_name(imported: Import) -> None:
    with pytest.raises(
        DefinitionError, match=r"declared by twins_both\.refund and by twins_both\.other: workers run the later"
    ):
        imported("twins_both", REFUND + REFUND.replace("def refund", "def other"))


def test_two_probes_of_a_module_may_not_have_one_name(imported: Import) -> None:
    """Each step would be asked for with the probe of the other."""
    with pytest.raises(DefinitionError, match=r"^step twins_probes\.find is declared by twins_probes\.find and by"):
        imported("twins_probes", PROBED.format(step="charge") + PROBED.format(step="reserve"))


def test_a_module_that_is_imported_again_declares_its_own_anew(imported: Import) -> None:
    module = imported("twins_again", REFUND + PAY)
    Path(str(module.__file__)).write_text(HEAD + "\n\n" + REFUND + PAY)
    assert importlib.reload(module).refund is steps.steps["twins.refund"]
    del sys.modules["twins_again"]
    assert importlib.import_module("twins_again").refund is steps.steps["twins.refund"]


def test_a_module_that_is_imported_under_two_names_declares_its_own_anew(imported: Import, tmp_path: Path) -> None:
    """As Celery's modules are by mistake, when the folder of an application is on the path as well as its parent."""
    (tmp_path / "twins_package").mkdir()
    imported("twins_package.twins_inner", REFUND)
    sys.path.insert(0, str(tmp_path / "twins_package"))
    try:
        importlib.invalidate_caches()
        assert importlib.import_module("twins_inner").refund is steps.steps["twins.refund"]
    finally:
        sys.path.remove(str(tmp_path / "twins_package"))
        for name in ("twins_inner", "twins_package"):
            sys.modules.pop(name, None)
