"""``coterie eval``: what a policy costs, on fresh problems of the model in the package."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from coterie.cli import options as o
from coterie.cli.document import print_document
from coterie.cli.request import open_engine
from coterie.cli.tables import console, plain_table, readable
from coterie.evals.exam import Answer, items, sit
from coterie.evals.report import Line, lines
from coterie.naming import CoterieError
from coterie.problems import TASKS
from coterie.results import record, write_record
from coterie.routing import parse_policy, spell

TITLE = "Embedded tasks by policy"


def evaluate(
    *,
    policies: o.Policies = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", help=f"Of {', '.join(TASKS)}; may be repeated. Default: all."),
    ] = None,
    count: Annotated[int, typer.Option("--items", min=1, help="Problems of each task.")] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the problems drawn.")] = 1,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows decoded together.")] = 8,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for a record of the measurement.")
    ] = None,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Answer held-out problems under several policies: accuracy, paired, beside the traffic.

    The problems are combinations that training never saw. vanilla always runs, first; the others
    are compared with it item by item. Generated code runs in a fenced child process.

    \b
    coterie eval --items 50 --seed 7 -p des-vote:beta=0.3 -p random:beta=0.3
    """
    named = list(dict.fromkeys(["vanilla", *(spell(parse_policy(p)) for p in policies or [])]))
    chosen = list(dict.fromkeys(tasks or TASKS))
    unknown = [task for task in chosen if task not in TASKS]
    if unknown:
        raise CoterieError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    asked = items(chosen, count, seed)
    engine = open_engine(model, dtype=dtype, device=device)
    with _bar(len(asked) * len(named)) as told:
        sheets = [sit(engine, asked, policy, rows=rows, told=told) for policy in named]
    lined = lines(sheets, chosen)
    policies_found = [line.document() for line in lined]
    found = {"model": engine.model.name, "seed": seed, "policies": policies_found}
    if out is not None:
        where = str(engine.model.transformer.device)
        content = record(TITLE, ["coterie", *sys.argv[1:]], [], facts=found, device=where)
        print(f"coterie: {write_record(out, content)}", file=sys.stderr)
    if json:
        print_document(found)
    else:
        console().print(exam_table(lined, chosen))


def exam_table(found: Sequence[Line], tasks: Sequence[str]) -> Table:
    """One policy a line; the change is against the first, on the same items."""
    traffic = ("experts", "bytes", "votes kept", "forwards/block")
    numbers = ("right", "95 %", *tasks, "change", "p", *traffic)
    table = plain_table("policy", *numbers, numbers=numbers)
    for line in found:
        low, high = line.whole.interval
        change, sheet = line.change, line.sheet
        table.add_row(
            sheet.policy,
            f"{line.whole.value:.1%} of {line.whole.n}",
            f"{low:.1%} - {high:.1%}",
            *(f"{line.by_task[task].value:.1%}" for task in tasks),
            "" if change is None else f"{change.difference:+.1%}",
            "" if change is None else f"{change.p:.2g}",
            f"{sheet.experts:.1f}",
            readable(sheet.expert_bytes),
            f"{sheet.vote_mass_kept:.3f}",
            f"{sheet.forwards_per_block:.1f}",
        )
    return table


class _Told:
    """Moves the bar and keeps the live accuracy of each policy beside it."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)
        self._right: dict[str, list[bool]] = {}

    def __call__(self, answer: Answer) -> None:
        right = self._right.setdefault(answer.policy, [])
        right.append(answer.right)
        text = f"{answer.policy} {sum(right) / len(right):.1%}"
        self._progress.update(self._task, advance=1, description=text)


@contextmanager
def _bar(total: int) -> Iterator[_Told]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    to = console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=to, transient=True, disable=not to.is_terminal
    ) as progress:
        yield _Told(progress, total)
