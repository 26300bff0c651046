"""``coterie calibrate``: the parameter of a policy family that meets a target on given prompts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from coterie.calibration import (
    Bench,
    Calibration,
    Questions,
    Target,
    calibrate,
    document,
    from_file,
    from_tasks,
    keep,
)
from coterie.calibration.bench import Run, Told
from coterie.calibration.calibration import check
from coterie.calibration.ladder import Family
from coterie.calibration.target import Reading
from coterie.cli import eval_options as e
from coterie.cli import options as o
from coterie.cli.document import print_document
from coterie.cli.grouping import takes
from coterie.cli.keeping import memory_of, rows_of
from coterie.cli.request import Options, check_effect, greedy_of, open_engine
from coterie.cli.tables import bar, console, plain_table, remark
from coterie.engine.facts import inspect
from coterie.engine.memory import Memory
from coterie.engine.source import EMBEDDED
from coterie.evals.task import Wish
from coterie.evals.tasks import TASKS
from coterie.naming import CoterieError
from coterie.problems import TASKS as OWN

ITEMS = 40  # of each task

FamilyName = Annotated[
    str,
    typer.Argument(
        metavar="FAMILY",
        help="A policy without the option that is searched for: des-vote:voters=before-eos; "
        "or with ? in its place: coreset:m=?,vote=weight.",
    ),
]
Meets = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="KIND=VALUE",
        help="experts=38 (a layer, at most), mass=0.9 (of the votes, at least), loss=0.05 "
        "(of a layer's output, squared, at most) or drop=0.01 (of accuracy, at most).",
    ),
]
Sure = Annotated[
    bool, typer.Option("--sure", help="The far end of the 95 % interval must meet it too.")
]
PerLayer = Annotated[
    bool, typer.Option("--per-layer", help="A budget for each layer, by marginal votes.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help='A file of prompts, one a line, or JSONL with "prompt"; in place of --task.',
        rich_help_panel=e.ASKING,
        show_default=False,
    ),
]
Items = Annotated[
    int, typer.Option("--items", min=1, help="Prompts of each task.", rich_help_panel=e.ASKING)
]
Drawn = Annotated[
    int, typer.Option("--seed", min=0, help="Of the prompts drawn.", rich_help_panel=e.ASKING)
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="A JSON file, which --policy @FILE takes.",
        rich_help_panel=o.SHOWING,
        show_default=False,
    ),
]


@takes(memory=memory_of, wanted=greedy_of)
def calibrate_command(
    family: FamilyName,
    *,
    target: Meets,
    sure: Sure = False,
    per_layer: PerLayer = False,
    task: e.Tasks = None,
    prompts: Prompts = None,
    items: Items = ITEMS,
    seed: Drawn = 1,
    data: e.Data = None,
    shots: e.Shots = None,
    wanted: Options,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    experts: o.Experts = None,
    memory: Memory | None = None,
    rows: e.Rows = None,
    trust: e.Trust = False,
    out: Out = None,
    json: o.Json = False,
) -> None:
    """Find the parameter of a policy family that meets a target and saves as much as it can.

    The prompts are problems that no exam draws, a benchmark's items, or your own. Where not all
    experts are in memory, the memory is emptied before each.

    \b
    coterie calibrate des-vote:voters=before-eos,protect=top1 --target drop=0.01 -o found.json
    coterie generate "..." --policy @found.json
    """
    sought, wish = Family.of(family), Target.of(target, sure=sure)
    check_place(out)
    drawn = Wish(inspect(model).family.name, data, shots, items, seed, trust)
    asked = questions(task, prompts, drawn, own=model in (None, EMBEDDED))
    together = rows_of(rows, memory, e.ROWS)
    engine = open_engine(model, dtype=dtype, device=device, experts=experts, memory=memory)
    check_effect(engine, wanted)
    with bar(MofNCompleteColumn(), TimeElapsedColumn()) as shown:
        bench = Bench(engine, asked, wanted, together, _live(shown))
        check(bench, sought, wish)
        found = calibrate(bench, sought, wish, per_layer=per_layer)
    content = document(bench, found, ["coterie", *sys.argv[1:]])
    if out is not None:
        keep(out, content)
        remark(f"{out}; --policy @{out} takes it")
    if json:
        print_document(content)
    else:
        console().print(calibration_table(found), *conclusions(found), sep="\n")


def check_place(out: Path | None) -> None:
    """Raises for a file that could not be written, now and not after the search."""
    if out is None:
        return
    if out.is_dir():
        raise CoterieError(f"{out}: is a folder; give a file in it, such as {out / 'found.json'}")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise CoterieError(f"{out}: its folder is not there")
    if not os.access(folder, os.W_OK):
        raise CoterieError(f"{out}: its folder cannot be written to")


def questions(
    tasks: Sequence[str] | None, prompts: Path | None, wish: Wish, *, own: bool
) -> Questions:
    """What is asked; says so where an exam would ask the same."""
    if tasks and prompts:
        raise CoterieError("--prompts stands in place of --task; give one of them")
    if prompts is not None:
        return from_file(prompts)
    if not tasks and not own:
        raise CoterieError(f"--task or --prompts is needed with --model; of {', '.join(TASKS)}")
    found = from_tasks(list(dict.fromkeys(tasks or OWN)), wish.count, wish)
    if found.exams:
        remark(
            "these are a benchmark's own items: an exam on them is not held out any more; "
            "--data or --prompts takes others"
        )
    return found


def calibration_table(found: Calibration) -> Table:
    """What was measured, in the ladder's order of traffic; then vanilla and the policy found."""
    meaning = found.target.meaning
    columns = (meaning.noun, "95 %", "meets it")
    table = plain_table("policy", *columns, numbers=columns[:2])
    for step in found.steps:
        table.add_row(
            step.policy, *told(step.reading), "yes" if found.target.met(step.reading) else "no"
        )
    return table


def told(reading: Reading) -> tuple[str, str]:
    low, high = reading.interval
    return f"{reading.value:.4g}", f"{low:.4g} to {high:.4g}"


def conclusions(found: Calibration) -> list[str]:
    """The policy, what it costs, and what is doubtful, in lines."""
    value, interval = told(found.achieved)
    noun = found.target.meaning.noun
    lines = [
        "",
        f"{found.policy} meets {found.target}: {noun} {value} ({interval}) "
        f"on {found.achieved.n} prompts",
        f"decoding them takes {cost(found.run)}; vanilla, {cost(found.vanilla)}",
    ]
    if not found.ordered:
        lines.append(
            f"{noun} does not move one way along this ladder: another policy on it may do as well"
        )
    return lines


def cost(run: Run) -> str:
    right = f", {sum(run.right)} of {len(run.right)} right" if run.right else ""
    experts = run.experts_reading().value
    return f"{experts:.1f} experts a layer, {run.forwards_per_block:.2f} forwards a block{right}"


def _live(shown: Progress) -> Told:
    """One bar, which begins anew with every measurement."""
    task = shown.add_task("", total=None)
    count = 0

    def hear(doing: str, done: int, whole: int) -> None:
        nonlocal count
        count += done == 0
        shown.update(task, completed=done, total=whole, description=f"{count}. {doing}")

    return hear
