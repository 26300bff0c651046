"""``coterie trace``: records the routing of real runs, for ``coterie replay``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from coterie.cli import options as o
from coterie.cli import output
from coterie.cli.benchmark_options import PromptOptions
from coterie.cli.engine_options import (
    VANILLA,
    DecodeOptions,
    EngineOptions,
    GenerationOptions,
    canonical_policy,
    check_engine,
    reuse_options,
)
from coterie.cli.option_groups import with_option_groups
from coterie.engine.engine import Engine
from coterie.lab.calibration import PromptSet
from coterie.lab.records import git_commit
from coterie.lab.replay.cache_simulation import TraceVotes
from coterie.lab.replay.recorder import bias_of, record_trace, trace_header
from coterie.lab.replay.replay import steps_per_block
from coterie.lab.replay.trace import KINDS, Trace, TraceWriter, read_trace
from coterie.loading.load import Model
from coterie.loading.saved_votes import SavedVotes, router_checksum, write_votes
from coterie.offload.capacity import format_bytes

DEFAULT_PROBLEMS = 20  # of each task


@with_option_groups
def trace(
    *,
    out: Annotated[Path, o.output("File of the trace.", "--out", "-o")],
    prompts: PromptOptions,
    policy: o.PolicySpec = VANILLA,
    max_forwards: Annotated[
        int | None,
        o.decoding("Maximum of denoising forwards of each prompt (default: no limit).", min=1),
    ] = None,
    decode: DecodeOptions,
    engine_options: EngineOptions,
    coreset_reuse: o.CoresetReuse = None,
    batch_size: Annotated[
        int | None, o.runtime("Prompts decoded together (default 1).", min=1)
    ] = None,
    save_votes: Annotated[
        Path | None, o.output("File for the mean votes, which --warm-start reads.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Record votes, routing and steps of real runs, for `coterie replay`.

    A forward of 32 tokens in 19 layers of 256 experts takes at most 8 KiB. The trace of a run that
    was killed holds all earlier forwards.

    \b
    coterie trace -o vanilla.trace
    coterie trace -m inclusionAI/LLaDA2.0-mini --task gsm8k -o mini.trace
    coterie replay vanilla.trace -p des-vote:beta=0.3 --eviction lru --expert-memory 35%
    """
    spec = canonical_policy(policy)
    options = decode.to_fields() | reuse_options([spec], coreset_reuse)[spec]
    output.check_output_file(out)
    output.check_output_file(save_votes)
    prompt_set = prompts.load(engine_options.model, default_count=DEFAULT_PROBLEMS)
    effective_batch_size = engine_options.resolve_batch_size(batch_size, 1)
    engine = engine_options.open()
    check_engine(engine, [policy], options)
    record_run(
        out, engine, prompt_set, policy=spec, batch_size=effective_batch_size,
        max_forwards=max_forwards, options=options,
    )  # fmt: skip
    recorded = read_trace(out)
    if save_votes is not None:
        write_mean_votes(save_votes, recorded, engine.model)
    if json:
        output.print_document(trace_document(out, recorded))
    else:
        output.console().print(summary_line(out, recorded))


def record_run(
    out: Path,
    engine: Engine,
    prompt_set: PromptSet,
    *,
    policy: str,
    batch_size: int,
    max_forwards: int | None,
    options: GenerationOptions,
) -> None:
    """Runs the prompts; each forward is in the file as soon as it is done."""
    command = ["coterie", *sys.argv[1:]]
    header = trace_header(
        engine,
        policy=policy,
        generation=engine.generation.replace(**options),
        prompts=prompt_set.to_dict(),
        provenance={"command": command, "commit": git_commit(), "rows": batch_size},
    )
    texts = [prompt.text for prompt in prompt_set.prompts]
    with output.progress_bar(MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task_id = progress.add_task("tracing", total=len(texts))
        with TraceWriter(out, header, bias_of(engine.model)) as writer:
            record_trace(
                engine, texts, writer, policy=policy, batch_size=batch_size,
                max_forwards=max_forwards, on_result=lambda _: progress.advance(task_id), **options,
            )  # fmt: skip


def write_mean_votes(path: Path, recorded: Trace, model: Model) -> None:
    routers = "" if model.folder is None else router_checksum(model.folder)
    mean_votes = TraceVotes.of(recorded).mean_votes
    write_votes(path, SavedVotes.of(model.name, recorded.header.layers, mean_votes, routers))


def trace_document(path: Path, recorded: Trace) -> dict[str, object]:
    """The contents of a trace in short, as JSON."""
    forwards, size = recorded.forwards, path.stat().st_size
    return {
        "trace": str(path),
        "model": recorded.header.model,
        "policy": recorded.header.policy,
        "forwards": len(forwards),
        "rows": len({forward.row for forward in forwards}),
        "kinds": {kind: sum(forward.kind == kind for forward in forwards) for kind in KINDS},
        "steps_per_block": steps_per_block(recorded) if forwards else None,
        "bytes": size,
        "bytes_a_forward": size / len(forwards) if forwards else None,
    }


def summary_line(path: Path, recorded: Trace) -> str:
    count, size = len(recorded.forwards), path.stat().st_size
    sequences = len({forward.row for forward in recorded.forwards})
    each = f", {format_bytes(size / count)} each" if count else ""
    noun = "sequence" if sequences == 1 else "sequences"
    return (
        f"{path}: {count} forwards of {sequences} {noun} under {recorded.header.policy}{each}, "
        f"{format_bytes(size)} in all"
    )
