"""``coterie study``: every table and figure of the paper, on one model, as one page."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from coterie.cli import options as o
from coterie.cli.request import open_engine
from coterie.cli.tables import bar, console, plain_table, print_text, remark
from coterie.engine.engine import Engine
from coterie.evals.task import Task, Wish
from coterie.evals.tasks import TASKS, open_tasks
from coterie.naming import CoterieError
from coterie.problems import TASKS as EMBEDDED

if TYPE_CHECKING:
    from coterie.study.chapter import Chapter
    from coterie.study.report import Section
    from coterie.study.study import Done

QUICK_ITEMS, QUICK_PROMPTS = 64, 8
FAILED = 1


def study(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder or a hub id. Default: the model in the package."),
    ] = None,
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for report, records, figures and answers.")
    ],
    chapters: Annotated[
        list[str] | None,
        typer.Option("--chapter", help="Only this one; may be repeated. Default: all."),
    ] = None,
    again: Annotated[
        list[str] | None,
        typer.Option("--again", help="Measure this chapter although its record is there."),
    ] = None,
    items: Annotated[
        int | None,
        typer.Option("--items", min=1, help="Questions for each policy, all tasks; default 500."),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            "--prompts", min=1, help="Questions where single forwards are watched; default 32."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", help=f"Of {', '.join(TASKS)}; may be repeated."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="The tasks' file, or the folder they lie in.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the questions drawn.")] = 1,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust-generated-code", help="Run what the model writes even where nothing fences it."
        ),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"A first look: {QUICK_ITEMS} and {QUICK_PROMPTS} questions."),
    ] = False,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
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
    # Here and not above: matplotlib comes with an extra.
    try:
        from coterie.study import study as room
    except ModuleNotFoundError as error:
        raise CoterieError(
            f"the study needs {error.name}, which is not installed: pip install 'coterie[lab]'"
        ) from None
    room.chosen([*(chapters or []), *(again or [])], room.CHAPTERS)
    effort = room.Effort(
        items=items or (QUICK_ITEMS if quick else room.Effort.items),
        prompts=prompts or (QUICK_PROMPTS if quick else room.Effort.prompts),
        seed=seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    known_tasks(model, tasks)
    engine = open_engine(model, dtype=dtype, device=device)
    opened = opened_tasks(engine, model, tasks, effort.items, data=data, seed=seed, trust=trust)
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


def known_tasks(model: str | None, tasks: Sequence[str] | None) -> list[str]:
    """The tasks as typed; the embedded model has its own. Raises before a model is loaded."""
    if not tasks and model is not None:
        raise CoterieError(f"which questions shall {model} answer? give --task: {', '.join(TASKS)}")
    unknown = [task for task in tasks or () if task not in TASKS]
    if unknown:
        raise CoterieError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    return list(dict.fromkeys(tasks or EMBEDDED))


def opened_tasks(
    engine: Engine,
    model: str | None,
    tasks: Sequence[str] | None,
    items: int,
    *,
    data: Path | None,
    seed: int,
    trust: bool,
) -> list[Task]:
    """The tasks, with ``items`` between them."""
    names = known_tasks(model, tasks)
    each = -(-items // len(names))
    family = engine.model.family.name
    return open_tasks(names, Wish(family, data=data, count=each, seed=seed, trust=trust))


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
