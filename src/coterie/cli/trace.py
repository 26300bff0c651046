"""``coterie trace``: what gates thought in real runs, in a small file for `coterie replay`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from coterie.calibration import Questions
from coterie.cli import eval_options as e
from coterie.cli import options as o
from coterie.cli.calibrate import Drawn, Items, Prompts, check_place, questions
from coterie.cli.document import print_document
from coterie.cli.grouping import takes
from coterie.cli.keeping import memory_of, rows_of
from coterie.cli.request import (
    Options,
    check_effect,
    check_kept,
    drifting,
    greedy_of,
    open_engine,
    policy_of,
)
from coterie.cli.tables import bar, console, readable
from coterie.engine.engine import Engine
from coterie.engine.facts import inspect
from coterie.engine.load import Model
from coterie.engine.memory import Memory as Asked
from coterie.engine.source import EMBEDDED
from coterie.engine.warm import SavedVotes, routers_of, write_votes
from coterie.evals.task import Wish
from coterie.planning.booking import Memory
from coterie.planning.recording import about, bias_of, record_trace
from coterie.planning.replay import steps_per_block
from coterie.planning.trace import KINDS, Trace, Writer, read
from coterie.results import commit

ITEMS = 20  # of each task

Out = Annotated[
    Path, typer.Option("--out", "-o", help="The trace, one file.", rich_help_panel=o.SHOWING)
]
Saved = Annotated[
    Path | None,
    typer.Option(
        "--votes",
        help="Save the votes too, on average: a small file for --warm.",
        rich_help_panel=o.SHOWING,
        show_default=False,
    ),
]
Forwards = Annotated[
    int | None,
    typer.Option(
        "--forwards",
        min=1,
        help="Give each prompt up after so many denoising forwards.",
        rich_help_panel=o.DECODING,
    ),
]
Rows = Annotated[
    int | None,
    typer.Option(
        "--rows", min=1, help="Rows decoded together, 1 by default.", rich_help_panel=o.RUNNING
    ),
]


@takes(memory=memory_of, wanted=greedy_of)
def trace(
    *,
    out: Out,
    task: e.Tasks = None,
    prompts: Prompts = None,
    items: Items = ITEMS,
    seed: Drawn = 1,
    data: e.Data = None,
    shots: e.Shots = None,
    policy: o.OnePolicy = "vanilla",
    forwards: Forwards = None,
    wanted: Options,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    experts: o.Experts = None,
    memory: Asked | None = None,
    drift: o.Drift = None,
    rows: Rows = None,
    votes: Saved = None,
    json: o.Json = False,
) -> None:
    """Record votes, routing and steps of real runs, for `coterie replay`.

    At most 8 KiB for a forward of 32 tokens in 19 layers of 256 experts. What a run was killed in
    the middle of is a trace of all forwards before.

    \b
    coterie trace -o vanilla.trace
    coterie trace -m inclusionAI/LLaDA2.0-mini --task gsm8k -o mini.trace
    coterie replay vanilla.trace -p des-vote:beta=0.3 --cache lru --capacity 35%
    """
    named = policy_of(policy)
    wanted |= drifting([named], drift)[named]
    check_place(out)
    check_place(votes)
    drawn = Wish(inspect(model).family.name, data, shots, items, seed)
    asked = questions(task, prompts, drawn, own=model in (None, EMBEDDED))
    together = rows_of(rows, memory, 1)
    engine = open_engine(model, dtype=dtype, device=device, experts=experts, memory=memory)
    check_effect(engine, wanted)
    check_kept(engine, [policy], wanted)
    run = Run(engine, asked, named, together, forwards, wanted)
    write(out, run)
    made = read(out)
    if votes is not None:
        save_votes(votes, made, engine.model)
    found = document(out, made)
    if json:
        print_document(found)
    else:
        console().print(told(found))


@dataclass(frozen=True)
class Run:
    """What is run for a trace; ``wanted`` are options of the generation."""

    engine: Engine
    asked: Questions
    policy: str
    rows: int
    forwards: int | None
    wanted: Options


def write(out: Path, run: Run) -> None:
    """The run, each forward in the file as soon as it is done."""
    engine = run.engine
    said = about(
        engine,
        policy=run.policy,
        generation=engine.generation.but(**run.wanted),
        prompts=run.asked.document(),
        made={"command": ["coterie", *sys.argv[1:]], "commit": commit(), "rows": run.rows},
    )
    prompts = [question.prompt for question in run.asked.asked]
    with bar(MofNCompleteColumn(), TimeElapsedColumn()) as shown:
        done = shown.add_task("tracing", total=len(prompts))
        with Writer(out, said, bias_of(engine.model)) as writer:
            record_trace(
                engine, prompts, writer, policy=run.policy, rows=run.rows, forwards=run.forwards,
                heard=lambda _: shown.advance(done), **run.wanted,
            )  # fmt: skip


def save_votes(path: Path, made: Trace, model: Model) -> None:
    """Of every forward of the trace, on average."""
    routers = "" if model.folder is None else routers_of(model.folder)
    mean = Memory.of(made).mean_votes
    write_votes(path, SavedVotes.of(model.name, made.about.layers, mean, routers))


def document(path: Path, made: Trace) -> dict[str, object]:
    """What is in a trace, in short."""
    count = len(made.forwards)
    return {
        "trace": str(path),
        "model": made.about.model,
        "policy": made.about.policy,
        "forwards": count,
        "rows": len({forward.row for forward in made.forwards}),
        "kinds": {kind: sum(one.kind == kind for one in made.forwards) for kind in KINDS},
        "steps_per_block": steps_per_block(made) if count else None,
        "bytes": path.stat().st_size,
        "bytes_a_forward": path.stat().st_size / count if count else None,
    }


def told(found: dict[str, object]) -> str:
    """The same in a line."""
    each, size = found["bytes_a_forward"], found["bytes"]
    weight = readable(float(each)) if isinstance(each, float) else "nothing"
    whole = readable(float(size)) if isinstance(size, int) else ""
    rows = "row" if found["rows"] == 1 else "rows"
    return (
        f"{found['trace']}: {found['forwards']} forwards of {found['rows']} {rows} under "
        f"{found['policy']}, {weight} each, {whole} in all"
    )
