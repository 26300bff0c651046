"""The parts of an experiment: a record, and the drawings, tables and findings rendered from it."""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar

from matplotlib.figure import Figure

from coterie.engine.engine import Engine
from coterie.errors import CoterieError, TaskError
from coterie.lab.evals.run import Answer, Variant, run_eval
from coterie.lab.evals.task import Task
from coterie.lab.records import is_record
from coterie.lab.study.results import VariantResult
from coterie.routing import update_policies_in_json
from coterie.strict_json import LISTING_FILE, read_object

BATCH_SIZE = 64  # decoded together in accuracy runs
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


Part = Drawing | Table | Finding | str


@dataclass(frozen=True)
class ExperimentText:
    """The prose of an experiment, from ``texts/NAME.toml``: templates for ``str.format``, by key.

    The code computes the values and the verdict. A sentence with an entry of the same key in
    ``claims`` tests that claim of the paper. A table has a ``caption``, ``columns`` by
    head, and ``left``, the heads of its text columns (default: the first). Texts that several
    experiments share have no title and no question.
    """

    name: str  # of the record's file, its page and the report's anchor: "explosion"
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

    def drawing(
        self, key: str, draw: Callable[[], Figure], figure: str = "", **values: object
    ) -> Drawing:
        """The figure of this name (default: the experiment's) with the caption of this key."""
        return Drawing(figure or self.name, self.caption(key, **values), draw)

    def sentence(self, key: str, **values: object) -> str:
        return self.sentences[key].format(**values)

    def claim(self, key: str, **values: object) -> str:
        return self.claims[key].format(**values)

    def finding(
        self, key: str, holds: bool | None, *, claim: str = "", **values: object
    ) -> Finding:
        """The sentence with the verdict on a claim (default: of the same key)."""
        return judge(self.sentence(key, **values), self.claim(claim or key, **values), holds)

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
    """One question of the study.

    ``record`` is the JSON value that ``measure`` returned; each experiment declares its shape.
    """

    text: ExperimentText

    def __init_subclass__(cls, name: str = "") -> None:
        """``name`` is that of the experiment's text."""
        if name:
            cls.text = ExperimentText.load(name)

    @property
    def name(self) -> str:
        return self.text.name

    @abstractmethod
    def measure(self, context: StudyContext) -> Entry:
        """Run the measurements; ``context.on_progress(share, activity)`` reports progress."""

    @abstractmethod
    def report(self, record: Entry) -> Iterator[Part]:
        """Figures, tables, and results in prose; numbers and verdicts come from the record."""


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


def interleave(lists: Iterable[Sequence[T]]) -> list[T]:
    """The items of all lists, alternating between the lists."""
    return [item for item in chain.from_iterable(zip_longest(*lists)) if item is not None]


def read_record(folder: Path, experiment: str) -> dict[str, Any] | None:
    """An experiment's record with its policies in the current spelling; None where none is whole.

    Its command and settings are unchanged.
    """
    try:
        content = read_object(folder / f"{experiment}.json", LISTING_FILE)
    except CoterieError:
        return None
    if not is_record(content):
        return None
    return update_policies_in_json(content, skip_keys=("command", "settings"))


@dataclass(frozen=True)
class StudyContext:
    """One study of one model.

    ``num_problems`` counts the problems per policy over all tasks; ``num_prompts`` counts the
    prompts of experiments that observe single forwards. ``answers`` is the folder of the answers
    (default: below ``folder``). ``used_records`` collects the records that the experiment has
    read; its own record is measured again when one of them changes.
    """

    engine: Engine
    tasks: Sequence[Task]
    folder: Path
    num_problems: int
    num_prompts: int
    on_progress: Callable[[float, str], None]  # share of the experiment done (0 .. 1), activity
    answers: Path | None = None
    used_records: dict[str, str] = field(default_factory=dict)  # experiment -> record's time

    def questions(self) -> list[str]:
        """The first ``num_prompts`` prompts, alternating between tasks."""
        n = self.num_prompts
        return interleave([[task.prompt(i) for i in task.items()[:n]] for task in self.tasks])[:n]

    def record(self, experiment: str) -> Any:
        """The facts of another experiment's record as JSON, None where it has not run."""
        content = read_record(self.folder / "records", experiment)
        if content is None:
            return None
        self.used_records[experiment] = content["when"]
        return content["facts"]

    def evaluate(
        self, variants: Sequence[Variant], progress_span: tuple[float, float] = (0.0, 1.0)
    ) -> list[VariantResult]:
        """The result of every variant on ``num_problems`` problems, equally many of each task.

        All experiments share the stored answers, so a variant is run once. ``progress_span`` are
        the shares of the experiment done before and after this call.
        """
        per_task = -(-self.num_problems // len(self.tasks))
        total = len(variants) * sum(min(per_task, len(task.items())) for task in self.tasks)
        num_answered = 0

        def on_answer(answer: Answer) -> None:
            nonlocal num_answered
            num_answered += 1
            first, last = progress_span
            share = min(1.0, num_answered / total)
            self.on_progress(first + (last - first) * share, answer.variant)

        eval_results = run_eval(
            self.engine,
            self.tasks,
            variants,
            self.answers or self.folder / "items",
            limit=per_task,
            batch_size=BATCH_SIZE,
            on_answer=on_answer,
        )
        for eval_result in eval_results:
            if eval_result.num_failed == len(eval_result.answers):
                reason = eval_result.answers[0].error
                raise TaskError(f"{eval_result.policy}: every item failed: {reason}")
        return [VariantResult.from_eval_result(eval_result) for eval_result in eval_results]
