"""``coterie eval`` and ``coterie train``: the model in the package, examined and made again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from coterie.cli import options as o
from coterie.cli.document import print_document
from coterie.cli.request import check_effect, generation_options, open_engine
from coterie.cli.tables import bar, console, plain_table, print_text, readable, remark
from coterie.engine.engine import Engine
from coterie.evals.exam import Answer, items, sit
from coterie.evals.report import Line, lines, share
from coterie.naming import CoterieError
from coterie.problems import TASKS
from coterie.results import record, write_record
from coterie.routing import parse_policy, spell
from coterie.training import embedded

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
    block: o.BlockWidth = None,
    plan: o.Plan = None,
    unmask: o.UnmaskRule = None,
    threshold: o.Threshold = None,
    commit: o.Commit = None,
    prefill: o.Prefill = None,
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
    chosen = known_tasks(tasks)
    wanted = generation_options(
        block=block, plan=plan, unmask=unmask, threshold=threshold, temperature=None,
        commit=commit, prefill=prefill,
    )  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # or fail now, before hours of measuring
    asked = items(chosen, count, seed)
    engine = open_engine(model, dtype=dtype, device=device)
    check_effect(engine, wanted)
    engine.generation = engine.generation.but(**wanted)
    with _steps() as shown:
        told = _live(shown, len(asked) * len(named))
        sheets = [sit(engine, asked, policy, rows=rows, told=told) for policy in named]
    lined = lines(sheets, chosen)
    found = exam_document(engine, lined, seed)
    if out is not None:
        where = str(engine.model.transformer.device)
        content = record(TITLE, ["coterie", *sys.argv[1:]], [], facts=found, device=where)
        remark(str(write_record(out, content)))
    if json:
        print_document(found)
    else:
        console().print(exam_table(lined, chosen))


def known_tasks(tasks: Sequence[str] | None) -> list[str]:
    """The tasks as typed, each once; all where none was."""
    chosen = list(dict.fromkeys(tasks or TASKS))
    unknown = [task for task in chosen if task not in TASKS]
    if unknown:
        raise CoterieError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    return chosen


def exam_document(engine: Engine, found: Sequence[Line], seed: int) -> dict[str, object]:
    """What was asked of which model, and what came of it, as JSON values."""
    return {
        "model": engine.model.name,
        "seed": seed,
        "generation": asdict(engine.generation),
        "policies": [line.document() for line in found],
    }


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


def train(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the run and the checkpoint.")
    ] = Path("runs/embedded"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")] = embedded.STEPS,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of data and weights.")] = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes.")] = 2,
) -> None:
    """Train the model in the package again, from a seed; a stopped run resumes where it was.

    Takes about an hour on two cores. `coterie generate --model OUT/model` runs the result.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = embedded.configure(steps=steps, seed=seed, workers=workers)
    remark(f"the log is {out / 'run' / 'log.jsonl'}")
    with _steps() as shown:
        task = shown.add_task("training", total=steps)

        def told(line: Mapping[str, object]) -> None:
            said = f"loss {line['loss']:.3f}, {line['speed']:,} positions/s"
            shown.update(task, completed=cast("int", line["step"]), description=said)

        folder = embedded.make(out, config, told=told)
    print_text(str(folder))


def _live(shown: Progress, total: int) -> Callable[[Answer], None]:
    """Moves the bar at every answer, and keeps each policy's accuracy so far beside it."""
    task = shown.add_task("", total=total)
    right: dict[str, list[bool]] = {}

    def told(answer: Answer) -> None:
        so_far = right.setdefault(answer.policy, [])
        so_far.append(answer.right)
        said = f"{answer.policy} {share(so_far).value:.1%}"
        shown.update(task, advance=1, description=said)

    return told


def _steps() -> Progress:
    return bar(MofNCompleteColumn(), TimeRemainingColumn())
