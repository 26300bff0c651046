"""Reruns the generations of a reference folder, and compares every id and forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch

from coterie.decoding import SequenceState
from coterie.decoding.sequence import first_index_of
from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CheckpointError
from coterie.lab.parity.published import PublishedLoop, make_loop
from coterie.lab.parity.recorded import RecordedRun, ReferenceArrays, read_runs
from coterie.loading.load import Model, load_model


@dataclass(frozen=True)
class ParityResult:
    """The comparison of one generation. With an ``excuse``, differences are reported only."""

    name: str
    problems: tuple[str, ...]
    forwards: int  # denoising forwards
    extra_forwards: int  # prefills and commits
    excuse: str = ""

    @property
    def passed(self) -> bool:
        return not self.problems or bool(self.excuse)


@dataclass(frozen=True)
class DenoisingForward:
    """One denoising forward of all unfinished sequences."""

    rows: int
    width: int
    start: int
    stop: int
    blocks: tuple[list[int], ...]  # input tokens of each sequence's block


@dataclass(frozen=True)
class GeneratedRun:
    """Our generations for the prompts of a run."""

    sequences: list[SequenceState]
    forwards: list[DenoisingForward]
    extra_forwards: int


def generation_results(folder: Path, device: str = "cpu") -> tuple[ParityResult, ...]:
    """Run all generations of a folder in fp32.

    Raises CheckpointError if an entry, an array or a parameter is missing, unknown or malformed.
    """
    arrays = ReferenceArrays.of(folder / "reference.npz")
    runs = read_runs(folder, arrays)
    model = load_model(folder, dtype=torch.float32, device=device)
    mask_id, eos_id = int(arrays.integers("mask_id")), int(arrays.integers("eos_id"))
    if model.eos_ids and eos_id not in model.eos_ids:
        raise CheckpointError(f"{arrays.file}: eos_id is {eos_id}; config.json has {model.eos_ids}")
    return tuple(result for run in runs for result in _compare_run(run, model, mask_id, eos_id))


def _compare_run(run: RecordedRun, model: Model, mask_id: int, eos_id: int) -> list[ParityResult]:
    run.fields.allow_only("mask_id", mask_id)
    algorithm = ALGORITHM_NAMES.get(run.family) or str(run.entry.get("algo"))
    parameters = run.fields.section("params", required=True)
    loop = make_loop(algorithm, parameters, mask_id=mask_id, eos_id=eos_id)
    model = replace(model, mask_id=mask_id, eos_ids=loop.stop_ids)
    configs = loop.configs[:1] if run.excuse else loop.configs
    return [
        _compare_generation(run, loop, config, generate_run(model, config, run.prompts))
        for config in configs
    ]


def generate_run(
    model: Model, config: GenerationConfig, prompts: Sequence[Sequence[int]]
) -> GeneratedRun:
    """Generate all prompts together and record every forward."""
    engine = Engine(model, generation=config)
    sequences = [engine.sequence(engine.submit(list(prompt))) for prompt in prompts]
    forwards, extra_forwards = [], 0
    while engine.rows:
        active = [sequence for sequence in sequences if sequence.next_pass is not None]
        next_pass = active[0].next_pass
        if next_pass is not None and next_pass.is_denoising:
            blocks = tuple(
                sequence.canvas.tokens[sequence.block.start : sequence.block.stop].tolist()
                for sequence in active
            )
            forwards.append(
                DenoisingForward(
                    len(active), next_pass.width, next_pass.start, next_pass.visible, blocks
                )
            )
        else:
            extra_forwards += 1
        engine.step()
    return GeneratedRun(sequences, forwards, extra_forwards)


def _compare_generation(
    run: RecordedRun, loop: PublishedLoop, config: GenerationConfig, generated: GeneratedRun
) -> ParityResult:
    is_single = len(generated.sequences) == 1
    outputs = [
        OUTPUT_IDS[run.family](sequence, loop, is_single) for sequence in generated.sequences
    ]
    problems = []
    for number, (ours, theirs) in enumerate(zip(outputs, run.outputs, strict=True)):
        if ours != theirs:
            mismatch = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)  # noqa: B905
            difference = "have another length" if mismatch is None else f"differ from {mismatch} on"
            problems.append(f"ids of row {number} {difference}")
    expected = _expected_forwards(run)
    if len(generated.forwards) != expected:
        problems.append(f"{len(generated.forwards)} forwards, not {expected}")
    problems += _trace_problems(run, config, generated)
    name = f"{run.tag} [{config.kv_cache.partition(':')[0]}]"
    return ParityResult(
        name, tuple(problems), len(generated.forwards), generated.extra_forwards, run.excuse
    )


def _expected_forwards(run: RecordedRun) -> int:
    """The number of denoising forwards; SDAR's ``nfe`` also counts those that store keys."""
    recorded = run.fields.integer("nfe")
    if run.family != "sdar_moe":
        return recorded
    calls = _calls(run)
    if len(calls) != recorded:
        raise CheckpointError(
            f"{run.location}: nfe is {recorded}, but {len(calls)} calls are recorded"
        )
    return sum(1 for _, _, stored in calls if not stored)


def _trace_problems(
    run: RecordedRun, config: GenerationConfig, generated: GeneratedRun
) -> list[str]:
    """Differences in the input of each forward, as far as the run recorded it."""
    ours: list[object]
    theirs: list[object]
    if run.family == "sdar_moe":
        ours, theirs = [*_calls_with_stores(generated)], [*_calls(run)]
    elif run.family == "lladamoe":
        ours = [[f.rows, f.width] for f in generated.forwards]
        theirs = run.fields.items("calls")
    else:
        count, width = run.fields.integer("nfe"), config.block
        inputs = run.arrays.integers(f"gen_{run.tag}_trace_block_inputs", count, width)
        ends = run.arrays.integers(f"gen_{run.tag}_trace_window_end", count)
        ours = [(f.blocks[0], f.stop) for f in generated.forwards]
        theirs = list(zip(inputs.tolist(), ends.tolist(), strict=True))
    pairs = enumerate(zip_longest(ours, theirs))
    first = next((i for i, (a, b) in pairs if a != b), None)
    return [] if first is None else [f"forward {first} has another input"]


def _calls_with_stores(generated: GeneratedRun) -> Iterator[list[int]]:
    """(width, start, stores keys) of our forwards, as SDAR counts them.

    SDAR stores the keys of the prompt and of every block, including the last one.
    """
    if prefill_length := generated.sequences[0].blocks[0].start:
        yield [prefill_length, 0, 1]
    for current, next_forward in zip_longest(generated.forwards, generated.forwards[1:]):
        yield [current.width, current.start, 0]
        if next_forward is None or next_forward.start != current.start:
            yield [current.width, current.start, 1]


def _calls(run: RecordedRun) -> list[list[int]]:
    """(width, start, stores keys) of every recorded forward."""
    name = f"gen_{run.tag}_calls_len_pos_store"
    count, _ = run.arrays.shape(name, 2)
    return run.arrays.integers(name, count, 3).tolist()


def _whole_canvas(sequence: SequenceState, loop: PublishedLoop, is_single: bool) -> list[int]:
    return sequence.canvas.tokens.tolist()


def _llada_moe(sequence: SequenceState, loop: PublishedLoop, is_single: bool) -> list[int]:
    """dInfer fills the canvas with end-of-text after a stop, and drops it from single sequences."""
    tokens = sequence.canvas.tokens.tolist()
    if loop.fills_after_stop:
        tokens[sequence.block.stop :] = loop.stop_ids[:1] * (len(tokens) - sequence.block.stop)
    return [token for token in tokens if token not in loop.stop_ids] if is_single else tokens


def _llada2(sequence: SequenceState, loop: PublishedLoop, is_single: bool) -> list[int]:
    """The answer with its end-of-text; LLaDA2.0 adds the prompt if it stops inside a block."""
    answer = sequence.canvas.tokens.tolist()[sequence.canvas.prompt_length :]
    answer = answer if sequence.stopped_early else answer[: sequence.request.max_new_tokens]
    end = first_index_of(answer, sequence.request.eos_ids)
    answer = answer if end is None else answer[: end + 1]
    return [*sequence.request.prompt_ids, *answer] if sequence.stopped_early else answer


OUTPUT_IDS: dict[str, Callable[[SequenceState, PublishedLoop, bool], list[int]]] = {
    "lladamoe": _llada_moe,
    "llada2": _llada2,
    "llada21": _llada2,
    "sdar_moe": _whole_canvas,
}
ALGORITHM_NAMES = {"llada2": "LLaDA2.0", "llada21": "LLaDA2.1", "sdar_moe": "SDAR"}
