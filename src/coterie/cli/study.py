"""``coterie study``: every table and figure of the paper, on one model, as one page."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from coterie.cli import options as o
from coterie.cli.eval_options import Data, Seed, Tasks, Trust
from coterie.cli.lab import task_names
from coterie.cli.request import open_engine
from coterie.cli.tables import bar, console, plain_table, print_text, remark
from coterie.engine.facts import inspect
from coterie.engine.source import EMBEDDED
from coterie.evals.task import Wish
from coterie.evals.tasks import TASKS, open_tasks
from coterie.naming import CoterieError

if TYPE_CHECKING:
    from coterie.study.chapter import Chapter
    from coterie.study.report import Section
    from coterie.study.study import Done

QUICK_ITEMS, QUICK_PROMPTS = 64, 8
FAILED = 1

Studied = Annotated[
    str | None,
    typer.Argument(help="A folder or a hub id. Default: the model in the package."),
]
Folder = Annotated[
    Path, typer.Option("--out", "-o", help="Folder for report, records, figures and answers.")
]
Chapters = Annotated[
    list[str] | None,
    typer.Option("--chapter", help="Only this one; may be repeated. Default: all."),
]
Again = Annotated[
    list[str] | None,
    typer.Option("--again", help="Measure this chapter although its record is there."),
]
Items = Annotated[
    int | None,
    typer.Option("--items", min=1, help="Questions for each policy, of all tasks; default 500."),
]
Prompts = Annotated[
    int | None,
    typer.Option(
        "--prompts", min=1, help="Questions where single forwards are watched; default 32."
    ),
]
Quick = Annotated[
    bool,
    typer.Option("--quick", help=f"A first look: {QUICK_ITEMS} and {QUICK_PROMPTS} questions."),
]


def study(
    model: Studied = None,
    *,
    out: Folder,
    chapters: Chapters = None,
    again: Again = None,
    items: Items = None,
    prompts: Prompts = None,
    tasks: Tasks = None,
    data: Data = None,
    seed: Seed = 1,
    trust: Trust = False,
    quick: Quick = False,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    experts: o.Experts = None,
) -> int:
    """Measure every table and figure of the paper on a model, and report what holds.

    Writes OUT/report.html, which needs nothing else, and the figures and records beside it. What
    is measured is kept: called again, only what is missing is measured, and everything is drawn
    anew. Ends in 1 where a chapter failed; the others stand.

    \b
    coterie study -o runs/study
    coterie study inclusionAI/LLaDA2.0-mini --task gsm8k --items 200 -o runs/mini
    coterie study -o runs/study --chapter explosion --again explosion
    """
    room = studying()
    room.chosen([*(chapters or []), *(again or [])], room.CHAPTERS)
    effort = room.Effort(
        items=items or (QUICK_ITEMS if quick else room.Effort.items),
        prompts=prompts or (QUICK_PROMPTS if quick else room.Effort.prompts),
        seed=seed,
    )
    names = known_tasks(model, tasks, data)
    each = -(-effort.items // len(names))
    wish = Wish(inspect(model).family.name, data, count=each, seed=seed, trust=trust)
    opened = open_tasks(names, wish)  # fails here, before weights are loaded
    out.mkdir(parents=True, exist_ok=True)
    engine = open_engine(model, dtype=dtype, device=device, experts=experts)
    with bar(TimeElapsedColumn(), TimeRemainingColumn()) as shown:
        sections = room.study(
            engine,
            opened,
            out,
            effort=effort,
            watch=Bar(shown, room.USUAL_SECONDS),
            names=chapters or (),
            again=again or (),
            command=["coterie", *sys.argv[1:]],
        )
    console().print(findings_table(sections))
    print_text(str(out / room.REPORT))
    return FAILED if any(section.failure for section in sections) else 0


def studying() -> ModuleType:
    """The module ``coterie.study.study``; here and not above, for matplotlib is of an extra."""
    try:
        return import_module("coterie.study.study")
    except ModuleNotFoundError as error:
        raise CoterieError(
            f"the study needs {error.name}, which is not installed: pip install 'coterie[lab]'"
        ) from None


def known_tasks(model: str | None, tasks: Sequence[str] | None, data: Path | None) -> list[str]:
    """The tasks as typed; the model in the package has its own."""
    own = model in (None, EMBEDDED)
    if not tasks and not own:
        raise CoterieError(f"which questions shall {model} answer? Give --task: {', '.join(TASKS)}")
    return task_names(tasks, own=own, items=None, data=data)


def findings_table(sections: Sequence[Section]) -> Table:
    """One finding a line, with its verdict on the paper's claim."""
    table = plain_table("chapter", "claim", "found")
    for section in sections:
        for finding in section.findings:
            table.add_row(section.name, finding.verdict or "", finding.text)
        if section.failure:
            table.add_row(section.name, "failed", section.failure)
    return table


class Bar:
    """Moves one bar over all chapters, each as long as it usually takes; where there is none, a
    line for each chapter's end."""

    def __init__(self, shown: Progress, usual: Mapping[str, int]) -> None:
        self._shown, self._usual = shown, usual
        self._line: TaskID | None = None
        self._before, self._whole, self._began = 0.0, 0.0, 0.0
        self._said = ""

    def began(self, chapter: Chapter, wanted: Sequence[Chapter]) -> None:
        place, sizes = wanted.index(chapter), [self._size(one) for one in wanted]
        if self._line is None:
            self._line = self._shown.add_task("", total=sum(sizes))
        self._before, self._whole = sum(sizes[:place]), sizes[place]
        self._said = f"{place + 1} of {len(wanted)}, {chapter.name}"
        self._began = time.perf_counter()
        self._shown.update(self._line, completed=self._before, description=self._said)

    def moved(self, share: float, doing: str) -> None:
        if self._line is not None:
            done = self._before + share * self._whole
            self._shown.update(self._line, completed=done, description=f"{self._said}: {doing}")

    def ended(self, done: Done) -> None:
        if self._line is not None:
            self._shown.update(self._line, completed=self._before + self._whole)
        seconds = time.perf_counter() - self._began
        how = "measured" if done.measured else "kept"
        outcome = f"{how}, {seconds:.0f} s" if done.failure is None else f"failed: {done.failure}"
        remark(f"{self._said}: {outcome}")

    def _size(self, chapter: Chapter) -> int:
        return self._usual.get(chapter.name, 30)
