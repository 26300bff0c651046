"""``coterie trace``: what gates thought in real runs, in a small file for `coterie replay`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from coterie.checkpoints.model_info import inspect
from coterie.checkpoints.source import EMBEDDED
from coterie.cli import eval_options as e
from coterie.cli import options as o
from coterie.cli.calibrate import (
    NumProblems,
    ProblemSeed,
    PromptFile,
    check_output_file,
    load_questions,
)
from coterie.cli.engine_options import (
    GenerationOptions,
    canonical_policy,
    check_options,
    check_policy_files,
    greedy_options,
    open_engine,
    reuse_options,
)
from coterie.cli.json_output import print_document
from coterie.cli.memory_options import expert_memory_config, resolve_batch_size
from coterie.cli.option_groups import option_group
from coterie.cli.tables import console, format_bytes, progress_bar
from coterie.engine.engine import Engine
from coterie.lab.calibration import PromptSet
from coterie.lab.evals.task import TaskOptions
from coterie.lab.records import git_commit
from coterie.lab.replay.cache_simulation import TraceVotes
from coterie.lab.replay.recorder import bias_of, record_trace, trace_header
from coterie.lab.replay.replay import steps_per_block
from coterie.lab.replay.trace import KINDS, Trace, TraceWriter, read_trace
from coterie.loading.expert_memory import ExpertMemoryConfig as Asked
from coterie.loading.load import Model
from coterie.loading.saved_votes import SavedVotes, router_checksum, write_votes

DEFAULT_PROBLEMS = 20  # of each task

TraceOutput = Annotated[
    Path, typer.Option("--out", "-o", help="The trace, one file.", rich_help_panel=o.OUTPUT_PANEL)
]
VotesOutput = Annotated[
    Path | None,
    typer.Option(
        "--votes",
        help="Save the votes too, on average: a small file for --warm.",
        rich_help_panel=o.OUTPUT_PANEL,
        show_default=False,
    ),
]
MaxForwards = Annotated[
    int | None,
    typer.Option(
        "--forwards",
        min=1,
        help="Give each prompt up after so many denoising forwards.",
        rich_help_panel=o.DECODING_PANEL,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--rows",
        min=1,
        help="Rows decoded together, 1 by default.",
        rich_help_panel=o.RUNTIME_PANEL,
    ),
]


@option_group(memory=expert_memory_config, options=greedy_options)
def trace(
    *,
    out: TraceOutput,
    task: e.Tasks = None,
    prompt_file: PromptFile = None,
    num_problems: NumProblems = DEFAULT_PROBLEMS,
    seed: ProblemSeed = 1,
    data: e.DataPath = None,
    shots: e.NumShots = None,
    policy: o.PolicySpec = "vanilla",
    max_forwards: MaxForwards = None,
    options: GenerationOptions,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    expert_dtype: o.ExpertDtype = None,
    memory: Asked | None = None,
    reuse_tolerance: o.ReuseTolerance = None,
    batch_size: BatchSize = None,
    votes_out: VotesOutput = None,
    json: o.JsonOutput = False,
) -> None:
    """Record votes, routing and steps of real runs, for `coterie replay`.

    At most 8 KiB for a forward of 32 tokens in 19 layers of 256 experts. What a run was killed in
    the middle of is a trace of all forwards before.

    \b
    coterie trace -o vanilla.trace
    coterie trace -m inclusionAI/LLaDA2.0-mini --task gsm8k -o mini.trace
    coterie replay vanilla.trace -p des-vote:beta=0.3 --cache lru --capacity 35%
    """
    policy_spec = canonical_policy(policy)
    options |= reuse_options([policy_spec], reuse_tolerance)[policy_spec]
    check_output_file(out)
    check_output_file(votes_out)
    task_options = TaskOptions(inspect(model).family.name, data, shots, num_problems, seed)
    prompt_set = load_questions(
        task, prompt_file, task_options, is_embedded=model in (None, EMBEDDED)
    )
    effective_batch_size = resolve_batch_size(batch_size, memory, 1)
    engine = open_engine(
        model, dtype=dtype, device=device, expert_dtype=expert_dtype, memory=memory
    )
    check_options(engine, options)
    check_policy_files(engine, [policy], options)
    run = TraceRun(engine, prompt_set, policy_spec, effective_batch_size, max_forwards, options)
    record_run(out, run)
    recorded = read_trace(out)
    if votes_out is not None:
        save_votes(votes_out, recorded, engine.model)
    trace_summary = trace_document(out, recorded)
    if json:
        print_document(trace_summary)
    else:
        console().print(summary_line(trace_summary))


@dataclass(frozen=True)
class TraceRun:
    """What is run for a trace; ``wanted`` are options of the generation."""

    engine: Engine
    questions: PromptSet
    policy: str
    batch_size: int
    max_forwards: int | None
    options: GenerationOptions


def record_run(out: Path, run: TraceRun) -> None:
    """The run, each forward in the file as soon as it is done."""
    engine = run.engine
    header = trace_header(
        engine,
        policy=run.policy,
        generation=engine.generation.replace(**run.options),
        prompts=run.questions.to_dict(),
        provenance={
            "command": ["coterie", *sys.argv[1:]],
            "commit": git_commit(),
            "rows": run.batch_size,
        },
    )
    prompts = [question.text for question in run.questions.prompts]
    with progress_bar(MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task_id = progress.add_task("tracing", total=len(prompts))
        with TraceWriter(out, header, bias_of(engine.model)) as writer:
            record_trace(
                engine, prompts, writer, policy=run.policy, batch_size=run.batch_size, max_forwards=run.max_forwards,
                on_result=lambda _: progress.advance(task_id), **run.options,
            )  # fmt: skip


def save_votes(path: Path, recorded: Trace, model: Model) -> None:
    """Of every forward of the trace, on average."""
    routers = "" if model.folder is None else router_checksum(model.folder)
    mean = TraceVotes.of(recorded).mean_votes
    write_votes(path, SavedVotes.of(model.name, recorded.header.layers, mean, routers))


def trace_document(path: Path, recorded: Trace) -> dict[str, object]:
    """What is in a trace, in short."""
    count = len(recorded.forwards)
    return {
        "trace": str(path),
        "model": recorded.header.model,
        "policy": recorded.header.policy,
        "forwards": count,
        "rows": len({forward.row for forward in recorded.forwards}),
        "kinds": {
            kind: sum(forward.kind == kind for forward in recorded.forwards) for kind in KINDS
        },
        "steps_per_block": steps_per_block(recorded) if count else None,
        "bytes": path.stat().st_size,
        "bytes_a_forward": path.stat().st_size / count if count else None,
    }


def summary_line(trace_summary: dict[str, object]) -> str:
    """The same in a line."""
    forward_bytes, file_bytes = trace_summary["bytes_a_forward"], trace_summary["bytes"]
    average_size = (
        format_bytes(float(forward_bytes)) if isinstance(forward_bytes, float) else "nothing"
    )
    total_size = format_bytes(float(file_bytes)) if isinstance(file_bytes, int) else ""
    sequence_noun = "row" if trace_summary["rows"] == 1 else "rows"
    return (
        f"{trace_summary['trace']}: {trace_summary['forwards']} forwards of {trace_summary['rows']} {sequence_noun} under "
        f"{trace_summary['policy']}, {average_size} each, {total_size} in all"
    )
