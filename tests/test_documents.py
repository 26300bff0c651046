"""Documents point at symbols, files, commands and scripts that exist."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from coterie.cli.entry import root_command

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SYMBOL = re.compile(r"`(coterie(?:\.\w+)+):(\w+(?:\.\w+)*)`")
COMMAND = re.compile(r"`(?:\.venv/bin/)?coterie ([a-z][a-z-]*)")
PLACE = re.compile(r"`((?:src|scripts|tests|docs|requirements|results)/[\w./-]+)`")


def pointers(pattern: re.Pattern[str]) -> list[tuple[str, ...]]:
    found = set()
    for document in DOCUMENTS:
        found |= {match.groups() for match in pattern.finditer(document.read_text("utf-8"))}
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), pointers(SYMBOL))
def test_symbols_exist(module: str, name: str) -> None:
    found = import_module(module)
    for part in name.split("."):
        fields = getattr(found, "__dataclass_fields__", {})
        assert hasattr(found, part) or part in fields, f"{module}:{name}"
        found = getattr(found, part, None)


def test_commands_exist() -> None:
    assert {command for (command,) in pointers(COMMAND)} <= set(root_command().commands)


@pytest.mark.parametrize("place", [place for (place,) in pointers(PLACE)])
def test_places_exist(place: str) -> None:
    assert (ROOT / place).exists(), place


def test_the_map_names_every_figure_table_and_equation_of_the_paper() -> None:
    text = (ROOT / "docs" / "paper-map.md").read_text(encoding="utf-8")
    figures = ("1a", "1b", "1c", "1d", "2", "3", "4", "5", "6", "7a", "7b", "8", "9")
    expected = [f"Figure {n}" for n in figures] + ["Table 1", "Algorithm 1", "Algorithm 2"]
    expected += [f"Equation {n}" for n in range(1, 7)]
    assert [name for name in expected if name not in text] == []
    assert "planned" not in text
    assert len(pointers(SYMBOL)) > 20
