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

from coterie.checkpoints.model_info import inspect
from coterie.checkpoints.source import EMBEDDED
from coterie.cli import eval_options as e
from coterie.cli import options as o
from coterie.cli.engine_options import (
    VANILLA,
    GenerationOptions,
    canonical_policy,
    check_options,
    check_policy_files,
    generation_options,
    open_engine,
    reuse_options,
)
from coterie.cli.eval_output import accuracy_csv, accuracy_document, accuracy_tables
from coterie.cli.eval_progress import EvalProgress, live_progress
from coterie.cli.json_output import print_document
from coterie.cli.memory_options import expert_memory_config, resolve_batch_size
from coterie.cli.option_groups import option_group
from coterie.cli.tables import console, print_note, print_text, progress_bar
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.lab.evals.report import PolicySummary, summarize
from coterie.lab.evals.run import Answer, AnswerCallback, Variant, run_eval, run_identity
from coterie.lab.evals.task import Task, TaskOptions
from coterie.lab.evals.tasks import TASKS, check_task_name, open_tasks
from coterie.lab.problems import PROBLEM_MAKERS as OWN
from coterie.lab.records import make_record, write_record
from coterie.lab.training import embedded
from coterie.loading.expert_memory import ExpertMemoryConfig

RECORD_TITLE, EMBEDDED_TITLE = "Accuracy by policy", "Embedded tasks by policy"


@dataclass(frozen=True)
class EvalConfig:
    """What was asked for; ``wanted`` are options of the generation."""

    tasks: Sequence[Task]
    variants: Sequence[Variant]
    options: GenerationOptions
    limit: int | None
    shuffle_seed: int | None
    batch_size: int
    reset_every: int  # questions, until a memory that is short is emptied
    output: Path | None

    @property
    def total(self) -> int:
        return len(self.variants) * sum(len(task.items()[: self.limit]) for task in self.tasks)


def eval_decode_options(
    *,
    max_new_tokens: e.MaxNewTokens = None,
    block: o.BlockLength = None,
    plan: o.KVCacheScheme = None,
    unmask: o.UnmaskRule = None,
    threshold: o.Threshold = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    early_stop: o.EarlyStop = None,
    commit_routing: o.CommitRouting = None,
    prefill_routing: o.PrefillRouting = None,
) -> GenerationOptions:
    """Options of the generation; the seed is the problems' too."""
    return generation_options(
        max_new_tokens=max_new_tokens, block=block, plan=plan, unmask=unmask,
        threshold=threshold, temperature=temperature, top_k=top_k, top_p=top_p,
        early_stop=early_stop, commit=commit_routing, prefill=prefill_routing,
    )  # fmt: skip


@option_group(memory=expert_memory_config, options=eval_decode_options)
def evaluate(
    *,
    task: e.Tasks = None,
    data: e.DataPath = None,
    shots: e.NumShots = None,
    num_problems: e.NumProblems = None,
    seed: e.Seed = 1,
    limit: e.Limit = None,
    shuffle_seed: e.ShuffleSeed = None,
    policies: o.PolicySpecs = None,
    options: GenerationOptions,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    expert_dtype: o.ExpertDtype = None,
    memory: ExpertMemoryConfig | None = None,
    reset_every: e.ResetEvery = None,
    reuse_tolerance: o.ReuseTolerance = None,
    batch_size: e.BatchSize = None,
    trust_code: e.TrustCode = False,
    out: e.OutputFolder = None,
    json: o.JsonOutput = False,
    csv: e.CsvOutput = False,
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
    if options.get("temperature"):
        options |= {"seed": seed}
    if reset_every is not None and memory is None:
        raise CoterieError("--memory-lasts has no effect where all experts are in memory")
    names = task_names(
        task, is_embedded=model in (None, EMBEDDED), num_problems=num_problems, data=data
    )
    task_options = TaskOptions(
        inspect(model).family.name,
        data,
        shots,
        num_problems or e.DEFAULT_PROBLEMS,
        seed,
        trust_code,
    )
    tasks = open_tasks(names, task_options)  # fails here, before weights are loaded
    variants, effective_batch_size = (
        make_variants(policies, reuse_tolerance),
        resolve_batch_size(batch_size, memory, e.DEFAULT_BATCH_SIZE),
    )
    config = EvalConfig(
        tasks, variants, options, limit, shuffle_seed, effective_batch_size, reset_every or 1, out
    )
    engine = open_engine(
        model,
        dtype=dtype,
        device=device,
        expert_dtype=expert_dtype,
        memory=memory,
        count_vanilla=True,
    )
    check_options(engine, options)
    check_policy_files(engine, policies or (), options)
    print_results(engine, config, run_with_progress(engine, config), json=json, csv=csv)


def make_variants(
    policies: Sequence[str] | None, reuse_tolerance: float | None = None
) -> list[Variant]:
    """vanilla, then the policies as typed, each once; with ``drift`` these keep their coresets."""
    policy_specs = list(dict.fromkeys([VANILLA, *map(canonical_policy, policies or [])]))
    return [
        Variant(policy, overrides)
        for policy, overrides in reuse_options(policy_specs, reuse_tolerance).items()
    ]


def task_names(
    requested: Sequence[str] | None,
    *,
    is_embedded: bool,
    num_problems: int | None,
    data: Path | None,
) -> list[str]:
    """The tasks as typed, each once; the package's own where none was, for its own model.

    Raises for an option that none of them has a use for.
    """
    if not requested and not is_embedded:
        raise CoterieError(f"--task is needed with --model; of {', '.join(TASKS)}")
    names = list(dict.fromkeys(requested or OWN))
    for name in names:
        check_task_name(name)
    generated = [name for name in names if name in OWN]
    if num_problems is not None and not generated:
        raise CoterieError(f"--items has no effect on {', '.join(names)}; --limit asks fewer")
    if data is not None and len(generated) == len(names):
        raise CoterieError(f"--data has no effect on {', '.join(names)}: their problems are drawn")
    return names


def run_with_progress(engine: Engine, config: EvalConfig) -> list[PolicySummary]:
    """The run, with its standing shown meanwhile; where it ends early, says what is left of it."""
    progress = EvalProgress([variant.name for variant in config.variants], config.total)
    with _resume_hint(progress, config.output), live_progress(progress):
        eval_results = run_eval(
            engine, config.tasks, config.variants, config.output, limit=config.limit,
            shuffle_seed=config.shuffle_seed, batch_size=config.batch_size, reset_every=config.reset_every,
            on_answer=_answer_callback(progress), options=config.options,
        )  # fmt: skip
    if progress.resumed == progress.total:
        print_note(f"all {progress.total} answers were there already")
    if progress.failed:
        print_note(f"{progress.failed} items failed and count as wrong; their error says why")
    return summarize(eval_results, [task.name for task in config.tasks])


def eval_document(
    engine: Engine, config: EvalConfig, summaries: Sequence[PolicySummary]
) -> dict[str, object]:
    """With what makes this run this run: the model's fingerprint, every choice of the tasks."""
    identity = run_identity(
        engine, config.tasks, limit=config.limit, shuffle_seed=config.shuffle_seed, reset_every=config.reset_every,
        options=config.options,
    )  # fmt: skip
    return accuracy_document(engine.model.name, {**identity, "rows": config.batch_size}, summaries)


def save_record(
    out: Path, engine: Engine, document: Mapping[str, object], summaries: Sequence[PolicySummary]
) -> None:
    """The record and the CSV beside the answers."""
    title = EMBEDDED_TITLE if set(summaries[0].by_task) <= set(OWN) else RECORD_TITLE
    device = str(engine.model.transformer.device)
    content = make_record(title, ["coterie", *sys.argv[1:]], [], facts=document, device=device)
    path = write_record(out, content)
    table = path.with_suffix(".csv")
    table.write_text(accuracy_csv(summaries), encoding="utf-8")
    print_note(f"{path}, {table.name}")


def print_results(
    engine: Engine, config: EvalConfig, summaries: Sequence[PolicySummary], *, json: bool, csv: bool
) -> None:
    """On standard output, for people or for programs; in the folder, where there is one."""
    document = eval_document(engine, config, summaries)
    if config.output is not None:
        save_record(config.output, engine, document, summaries)
    if json:
        print_document(document)
    elif csv:
        sys.stdout.write(accuracy_csv(summaries))
    else:
        terminal = console()
        for number, table in enumerate(accuracy_tables(summaries, terminal)):
            terminal.print(*([""] if number else []), table, sep="\n")


def train(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the run and the checkpoint.")
    ] = Path("runs/embedded"),
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Optimiser steps.")
    ] = embedded.DEFAULT_STEPS,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of data and weights.")] = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes.")] = 2,
) -> None:
    """Train the model in the package again, from a seed; a stopped run resumes where it was.

    Takes about an hour on two cores. `coterie generate --model OUT/model` runs the result.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = embedded.make_config(steps=steps, seed=seed, workers=workers)
    print_note(f"the log is {out / 'run' / 'log.jsonl'}")
    with progress_bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=steps)

        def on_step(log_entry: Mapping[str, object]) -> None:
            description = f"loss {log_entry['loss']:.3f}, {log_entry['speed']:,} positions/s"
            progress.update(task, completed=cast("int", log_entry["step"]), description=description)

        folder = embedded.train_embedded(out, config, on_log=on_step)
    print_text(str(folder))


def _answer_callback(progress: EvalProgress) -> AnswerCallback:
    """Takes every answer; once, how many were found before the first new one is said."""

    def on_answer(answer: Answer) -> None:
        if not answer.from_disk and progress.count == progress.resumed > 0:
            print_note(f"{progress.resumed} of {progress.total} answers were there already")
        progress.add(answer)

    return on_answer


@contextmanager
def _resume_hint(progress: EvalProgress, out: Path | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if progress.count and out is None:
            print_note(f"{progress.count} of {progress.total} answers are lost; -o DIR keeps them")
        elif progress.count:
            print_note(
                f"{progress.count} of {progress.total} answers are in {out}; "
                "the same command goes on from there"
            )
        raise
