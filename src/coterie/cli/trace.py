"""``coterie trace``: records the routing of real runs, for ``coterie replay``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from coterie.cli import engine_options as engines
from coterie.cli import output
from coterie.cli.prompt_options import PromptOptions
from coterie.lab.records import git_commit
from coterie.lab.replay.cache_simulation import TraceVotes
from coterie.lab.replay.recorder import bias_of, record_trace, trace_header
from coterie.lab.replay.replay import steps_per_block
from coterie.lab.replay.trace import Trace
from coterie.lab.replay.trace_file import TraceWriter, check_new_trace, read_trace
from coterie.loading.load import Model
from coterie.loading.saved_votes import SavedVotes, router_checksum, write_votes
from coterie.offload.capacity import format_bytes

COLUMNS = (MofNCompleteColumn(), TimeElapsedColumn())
DEFAULT_PROBLEMS = 20  # of each task


def trace(
    *, out: Path, prompts: PromptOptions, policy: str = engines.VANILLA,
    max_forwards: int | None = None, decode: engines.DecodeOptions,
    engine_options: engines.EngineOptions, coreset_reuse: float | None = None,
    batch_size: int | None = None, save_votes: Path | None = None, overwrite: bool = False,
    json: bool = False,
) -> None:  # fmt: skip
    """Record votes, routing and steps of real runs, for `coterie replay`.

    A forward of 32 tokens in 19 layers of 256 experts takes at most 8 KiB. The trace is FILE.part
    until it is complete; that of a run that was stopped holds all forwards before.

    \b
    coterie trace -o vanilla.trace
    coterie trace -m inclusionAI/LLaDA2.0-mini --task gsm8k -o mini.trace
    coterie replay vanilla.trace -p des-vote:beta=0.3 --eviction lru --expert-memory 35%
    """
    spec = engines.canonical_policy(policy)
    options = decode.to_fields() | engines.reuse_options([spec], coreset_reuse)[spec]
    output.check_output_file(out)
    output.check_output_file(save_votes)
    check_new_trace(out, overwrite=overwrite)
    prompt_set = prompts.load(engine_options.model, default_count=DEFAULT_PROBLEMS)
    batch_size = engine_options.resolve_batch_size(batch_size, 1)
    engine = engine_options.open()
    engines.check_engine(engine, [policy], options)
    provenance = {"command": output.command_line(), "commit": git_commit(), "rows": batch_size}
    header = trace_header(
        engine, policy=spec, generation=engine.generation.replace(**options),
        prompts=prompt_set.to_dict(), provenance=provenance,
    )  # fmt: skip
    texts = [prompt.text for prompt in prompt_set.prompts]
    writer = TraceWriter(out, header, bias_of(engine.model), overwrite=overwrite)
    with _note_if_stopped(writer), output.progress_bar(*COLUMNS) as progress:
        task_id = progress.add_task("tracing", total=len(texts))
        with writer:
            record_trace(
                engine, texts, writer, policy=spec, batch_size=batch_size,
                max_forwards=max_forwards, on_result=lambda _: progress.advance(task_id), **options,
            )  # fmt: skip
            recorded = read_trace(writer.path)
            if save_votes is not None:  # before the trace is complete: a killed run can be repeated
                write_votes(save_votes, _mean_votes(engine.model, recorded))
    document = trace_document(out, recorded)
    output.print_result(document, summary_line(document), json=json)


def _mean_votes(model: Model, recorded: Trace) -> SavedVotes:
    routers = "" if model.folder is None else router_checksum(model.folder)
    mean_votes = TraceVotes.of(recorded).mean_votes
    return SavedVotes.of(model.name, recorded.header.layers, mean_votes, routers)


@contextmanager
def _note_if_stopped(writer: TraceWriter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        output.print_note(f"{writer.path} is a trace of the {writer.records} forwards so far")
        raise


def trace_document(path: Path, recorded: Trace) -> dict[str, object]:
    """The contents of a trace in short, as JSON."""
    forwards, size = recorded.forwards, path.stat().st_size
    return {
        "trace": str(path), "model": recorded.header.model, "policy": recorded.header.policy,
        "forwards": len(forwards), "rows": len({forward.row for forward in forwards}),
        "kinds": recorded.kinds, "steps_per_block": steps_per_block(recorded) if forwards else None,
        "bytes": size, "bytes_a_forward": size / len(forwards) if forwards else None,
    }  # fmt: skip


def summary_line(document: Mapping[str, Any]) -> str:
    """The counts of a ``trace_document`` and its size."""
    size, rows = document["bytes_a_forward"], document["rows"]
    each = "" if size is None else f", {format_bytes(size)} each"
    noun = "sequence" if rows == 1 else "sequences"
    text = f"{document['forwards']} forwards of {rows} {noun} under {document['policy']}{each}"
    return f"{document['trace']}: {text}, {format_bytes(document['bytes'])} in all"
