"""The parts of an experiment: a record, and the drawings, tables and findings rendered from it."""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from matplotlib.figure import Figure

from coterie.lab.study.context import StudyContext

Verdict = Literal["holds", "does not hold", "inconclusive"]
T = TypeVar("T")
Entry = Mapping[str, Any]  # a JSON object in a record
Columns = Mapping[str, str | Callable[[T], str]]  # head -> cell of an item


@dataclass(frozen=True)
class Drawing:
    """One figure. ``draw`` renders it in the colour scheme in force (light or dark)."""

    name: str  # the file's, such as "explosion"
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Table:
    """Rows of text under column heads; ``numbers`` are the right-aligned columns."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Finding:
    """A result in prose. A ``claim`` of the paper that it tests comes with a verdict."""

    text: str
    claim: str = ""
    verdict: Verdict | None = None


@dataclass(frozen=True)
class ExperimentText:
    """The prose of an experiment, from ``texts/NAME.toml``: templates for ``str.format``, by key.

    The code computes the values and the verdict. A sentence with an entry of the same key in
    ``claims`` tests that claim of the paper. A table has a ``caption``, ``columns`` by
    head, and ``left``, the heads of its text columns (default: the first). Texts that several
    experiments share have no title and no question.
    """

    name: str  # of the record's file and the report's anchor: "explosion"
    title: str = ""  # with the place in the paper: "The expert explosion (Fig. 1a)"
    question: str = ""  # in a sentence for readers without knowledge of the paper
    typical_seconds: int = 30  # for the progress bar
    captions: Mapping[str, str] = field(default_factory=dict)
    sentences: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @staticmethod
    def load(name: str) -> ExperimentText:
        file = Path(__file__).with_name("texts") / f"{name}.toml"
        return ExperimentText(name, **tomllib.loads(file.read_text("utf-8")))

    def caption(self, key: str, **values: object) -> str:
        return self.captions[key].format(**values)

    def sentence(self, key: str, **values: object) -> str:
        return self.sentences[key].format(**values)

    def claim(self, key: str, **values: object) -> str:
        return self.claims[key].format(**values)

    def finding(self, key: str, holds: bool | None, **values: object) -> Finding:
        """The sentence with the verdict on its claim; ``holds`` is None if inconclusive."""
        return judge(self.sentence(key, **values), self.claim(key, **values), holds)

    def table(
        self, key: str, rows: Sequence[T], more: Columns[T] | None = None, **values: object
    ) -> Table:
        """The table of this key, one row per item. ``more`` columns follow those of the text.

        A column is a function of the item, or a template that names the keys of a mapping
        (``{experts:.1f}``) or the attributes of an object (``{0.experts:.1f}``).
        """
        entry = self.tables[key]
        columns = {**entry["columns"], **(more or {})}
        left = entry.get("left", list(columns)[:1])
        cells = [[_cell(column, item) for column in columns.values()] for item in rows]
        numbers = [index for index, head in enumerate(columns) if head not in left]
        return Table(list(columns), cells, entry["caption"].format(**values), numbers)


class Experiment(ABC):
    """One question of the study. All methods but ``measure`` work from the record alone.

    ``record`` is the JSON value that ``measure`` returned; each experiment declares its shape.
    """

    text: ExperimentText

    @property
    def name(self) -> str:
        return self.text.name

    @abstractmethod
    def measure(self, context: StudyContext) -> Mapping[str, object]:
        """Run the measurements; ``context.on_progress(share, activity)`` reports progress."""

    def drawings(self, record: Any) -> Sequence[Drawing]:
        del record
        return ()

    def tables(self, record: Any) -> Sequence[Table]:
        del record
        return ()

    @abstractmethod
    def findings(self, record: Any) -> Sequence[Finding | str]:
        """Results in prose; numbers and verdicts are computed from the record."""


def judge(text: str, claim: str, holds: bool | None) -> Finding:
    """A finding on a claim; ``holds`` is None where the evidence is inconclusive."""
    verdicts: Mapping[bool | None, Verdict] = {True: "holds", False: "does not hold"}
    return Finding(text, claim, verdicts.get(holds, "inconclusive"))


def _cell(column: str | Callable[[T], str], item: T) -> str:
    if isinstance(column, str):
        return column.format(item, **(item if isinstance(item, Mapping) else {}))
    return column(item)


def format_p(p: float, *, bare: bool = False) -> str:
    """A p value with three digits: "p 0.042", or "0.042" when ``bare``."""
    if p < 0.001:
        return "< 0.001" if bare else "p < 0.001"
    return f"{p:.3f}" if bare else f"p {p:.3f}"


def decimal_bytes(size: float) -> str:
    """Bytes with a decimal unit: 393216 -> "393 KB"."""
    units, unit = ("B", "KB", "MB", "GB"), 0
    while size >= 1000 and unit < len(units) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.{0 if size >= 100 else 1}f} {units[unit]}"
