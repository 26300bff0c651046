"""``coterie eval`` and ``coterie train``: models examined, the one in the package made again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from coterie.cli import eval_options as e
from coterie.cli import options as o
from coterie.cli.accuracy import accuracy_csv, accuracy_document, accuracy_tables
from coterie.cli.document import print_document
from coterie.cli.grouping import takes
from coterie.cli.keeping import memory_of, rows_of
from coterie.cli.request import (
    VANILLA,
    Options,
    check_effect,
    check_kept,
    drifting,
    generation_options,
    open_engine,
    policy_of,
)
from coterie.cli.standing import Standing, shown
from coterie.cli.tables import bar, console, print_text, remark
from coterie.engine.engine import Engine
from coterie.engine.facts import inspect
from coterie.engine.memory import Memory
from coterie.engine.source import EMBEDDED
from coterie.evals.report import Line, lines
from coterie.evals.run import Answer, Arm, Told, about, run
from coterie.evals.task import Task, Wish
from coterie.evals.tasks import TASKS, check_name, open_tasks
from coterie.naming import CoterieError
from coterie.problems import TASKS as OWN
from coterie.results import record, write_record
from coterie.training import embedded

TITLE, OWN_TITLE = "Accuracy by policy", "Embedded tasks by policy"


@dataclass(frozen=True)
class Examination:
    """What was asked for; ``wanted`` are options of the generation."""

    tasks: Sequence[Task]
    arms: Sequence[Arm]
    wanted: Options
    limit: int | None
    shuffle_seed: int | None
    rows: int
    lasts: int  # questions, until a memory that is short is emptied
    out: Path | None

    @property
    def total(self) -> int:
        return len(self.arms) * sum(len(task.items()[: self.limit]) for task in self.tasks)


def decoding_of(
    *,
    max_new_tokens: e.MaxNewTokens = None,
    block: o.BlockWidth = None,
    plan: o.Plan = None,
    unmask: o.UnmaskRule = None,
    threshold: o.Threshold = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    early_stop: o.EarlyStop = None,
    commit: o.Commit = None,
    prefill: o.Prefill = None,
) -> Options:
    """Options of the generation; the seed is the problems' too."""
    return generation_options(
        max_new_tokens=max_new_tokens, block=block, plan=plan, unmask=unmask,
        threshold=threshold, temperature=temperature, top_k=top_k, top_p=top_p,
        early_stop=early_stop, commit=commit, prefill=prefill,
    )  # fmt: skip


@takes(memory=memory_of, wanted=decoding_of)
def evaluate(
    *,
    task: e.Tasks = None,
    data: e.Data = None,
    shots: e.Shots = None,
    items: e.Items = None,
    seed: e.Seed = 1,
    limit: e.Limit = None,
    shuffle_seed: e.Shuffle = None,
    policies: o.Policies = None,
    wanted: Options,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    experts: o.Experts = None,
    memory: Memory | None = None,
    lasts: e.Lasts = None,
    drift: o.Drift = None,
    rows: e.Rows = None,
    trust: e.Trust = False,
    out: e.Out = None,
    json: o.Json = False,
    csv: e.Csv = False,
) -> None:
    """Answer a benchmark's items under several policies: accuracy, paired, beside the traffic.

    vanilla always runs, first; the others are compared with it item by item.

    With -o every answer is kept, and the same command goes on where a run was stopped.

    Where not all experts are in memory (--expert-memory, --imagine-memory), questions are asked one
    by one, and what was moved for them is told beside.

    \b
    coterie eval --items 50 -p des-vote:beta=0.3 -p random:beta=0.3
    coterie eval --items 50 -p resident-vote:beta=0.3 --imagine-memory 35% --commit policy
    coterie eval -m inclusionAI/LLaDA2.0-mini --task gsm8k -p des-vote:beta=0.15 -o runs/gsm8k
    """
    if json and csv:
        raise CoterieError("--json and --csv both want standard output; give one of them")
    if wanted.get("temperature"):
        wanted |= {"seed": seed}
    if lasts is not None and memory is None:
        raise CoterieError("--memory-lasts has no effect where all experts are in memory")
    names = task_names(task, own=model in (None, EMBEDDED), items=items, data=data)
    wish = Wish(inspect(model).family.name, data, shots, items or e.COUNT, seed, trust)
    tasks = open_tasks(names, wish)  # fails here, before weights are loaded
    arms, together = arms_of(policies, drift), rows_of(rows, memory, e.ROWS)
    asked = Examination(tasks, arms, wanted, limit, shuffle_seed, together, lasts or 1, out)
    engine = open_engine(
        model, dtype=dtype, device=device, experts=experts, memory=memory, compared=True
    )
    check_effect(engine, wanted)
    check_kept(engine, policies or (), wanted)
    tell(engine, asked, examine(engine, asked), json=json, csv=csv)


def arms_of(policies: Sequence[str] | None, drift: float | None = None) -> list[Arm]:
    """vanilla, then the policies as typed, each once; with ``drift`` these keep their coresets."""
    named = list(dict.fromkeys([VANILLA, *map(policy_of, policies or [])]))
    return [Arm(policy, own) for policy, own in drifting(named, drift).items()]


def task_names(
    typed: Sequence[str] | None, *, own: bool, items: int | None, data: Path | None
) -> list[str]:
    """The tasks as typed, each once; the package's own where none was, for its own model.

    Raises for an option that none of them has a use for.
    """
    if not typed and not own:
        raise CoterieError(f"--task is needed with --model; of {', '.join(TASKS)}")
    names = list(dict.fromkeys(typed or OWN))
    for name in names:
        check_name(name)
    drawn = [name for name in names if name in OWN]
    if items is not None and not drawn:
        raise CoterieError(f"--items has no effect on {', '.join(names)}; --limit asks fewer")
    if data is not None and len(drawn) == len(names):
        raise CoterieError(f"--data has no effect on {', '.join(names)}: their problems are drawn")
    return names


def examine(engine: Engine, asked: Examination) -> list[Line]:
    """The run, with its standing shown meanwhile; where it ends early, says what is left of it."""
    standing = Standing([arm.name for arm in asked.arms], asked.total)
    with _told_how_to_go_on(standing, asked.out), shown(standing):
        sheets = run(
            engine, asked.tasks, asked.arms, asked.out, limit=asked.limit,
            shuffle_seed=asked.shuffle_seed, rows=asked.rows, lasts=asked.lasts,
            told=_hearing(standing), asked=asked.wanted,
        )  # fmt: skip
    if standing.found == standing.total:
        remark(f"all {standing.total} answers were there already")
    if standing.failed:
        remark(f"{standing.failed} items failed and count as wrong; their error says why")
    return lines(sheets, [task.name for task in asked.tasks])


def document_of(engine: Engine, asked: Examination, found: Sequence[Line]) -> dict[str, object]:
    """With what makes this run this run: the model's fingerprint, every choice of the tasks."""
    apart = about(
        engine, asked.tasks, limit=asked.limit, shuffle_seed=asked.shuffle_seed, lasts=asked.lasts,
        asked=asked.wanted,
    )  # fmt: skip
    return accuracy_document(engine.model.name, {**apart, "rows": asked.rows}, found)


def keep(out: Path, engine: Engine, document: Mapping[str, object], found: Sequence[Line]) -> None:
    """The record and the CSV beside the answers."""
    title = OWN_TITLE if set(found[0].by_task) <= set(OWN) else TITLE
    where = str(engine.model.transformer.device)
    content = record(title, ["coterie", *sys.argv[1:]], [], facts=document, device=where)
    path = write_record(out, content)
    table = path.with_suffix(".csv")
    table.write_text(accuracy_csv(found), encoding="utf-8")
    remark(f"{path}, {table.name}")


def tell(
    engine: Engine, asked: Examination, found: Sequence[Line], *, json: bool, csv: bool
) -> None:
    """On standard output, for people or for programs; in the folder, where there is one."""
    document = document_of(engine, asked, found)
    if asked.out is not None:
        keep(asked.out, engine, document, found)
    if json:
        print_document(document)
    elif csv:
        sys.stdout.write(accuracy_csv(found))
    else:
        to = console()
        for number, table in enumerate(accuracy_tables(found, to)):
            to.print(*([""] if number else []), table, sep="\n")


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
    with bar(MofNCompleteColumn(), TimeRemainingColumn()) as seen:
        task = seen.add_task("training", total=steps)

        def told(line: Mapping[str, object]) -> None:
            said = f"loss {line['loss']:.3f}, {line['speed']:,} positions/s"
            seen.update(task, completed=cast("int", line["step"]), description=said)

        folder = embedded.make(out, config, told=told)
    print_text(str(folder))


def _hearing(standing: Standing) -> Told:
    """Takes every answer; once, how many were found before the first new one is said."""

    def told(answer: Answer) -> None:
        if not answer.found and standing.count == standing.found > 0:
            remark(f"{standing.found} of {standing.total} answers were there already")
        standing.take(answer)

    return told


@contextmanager
def _told_how_to_go_on(standing: Standing, out: Path | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if standing.count and out is None:
            remark(f"{standing.count} of {standing.total} answers are lost; -o DIR keeps them")
        elif standing.count:
            remark(
                f"{standing.count} of {standing.total} answers are in {out}; "
                "the same command goes on from there"
            )
        raise
