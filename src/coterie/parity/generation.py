"""Running the generations that a reference folder names, and comparing every id and forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch

from coterie.decoding import Row
from coterie.decoding.row import first_of
from coterie.engine.config import Generation
from coterie.engine.engine import Engine
from coterie.engine.load import Model, load_model
from coterie.naming import CoterieError
from coterie.parity.arrays import Arrays
from coterie.parity.parameters import Parameters
from coterie.parity.published import Loop, tell
from coterie.parity.recorded import Run, read_runs


@dataclass(frozen=True)
class Verdict:
    """How one generation came out; ``excused`` says why a difference is not held against it."""

    name: str
    problems: tuple[str, ...]
    forwards: int
    unpublished: int  # forwards beside: prefills and commits
    excused: str = ""

    @property
    def passed(self) -> bool:
        return not self.problems or bool(self.excused)


@dataclass(frozen=True)
class Forward:
    """One denoising forward of all rows that are still going."""

    rows: int
    width: int
    start: int
    stop: int
    blocks: tuple[list[int], ...]  # tokens of each row's block as they went in


@dataclass(frozen=True)
class Played:
    """What became of a run's prompts."""

    rows: list[Row]
    forwards: list[Forward]
    unpublished: int


def generation_verdicts(folder: Path, device: str = "cpu") -> tuple[Verdict, ...]:
    """Run everything the folder names, in fp32.

    Raises CoterieError when the folder is damaged: an entry, an array or a parameter missing,
    unknown or malformed.
    """
    arrays = Arrays.of(folder / "reference.npz")
    runs = read_runs(folder, arrays)
    model = load_model(folder, dtype=torch.float32, device=device)
    mask, end = int(arrays.whole("mask_id")), int(arrays.whole("eos_id"))
    if model.eos_ids and end not in model.eos_ids:
        raise CoterieError(f"{arrays.file}: eos_id is {end}; config.json says {model.eos_ids}")
    return tuple(verdict for run in runs for verdict in _judge(run, model, mask, end))


def _judge(run: Run, model: Model, mask: int, end: int) -> list[Verdict]:
    for stated in (run.entry, run.parameters):
        if stated.get("mask_id", mask) != mask:
            raise CoterieError(f"{run.where}: mask_id is {stated['mask_id']!r}, not {mask}")
    algorithm = ALGORITHMS.get(run.family) or str(run.entry.get("algo"))
    loop = tell(algorithm, Parameters(run.where, run.parameters), mask=mask, end=end)
    model = replace(model, mask_id=loop.mask, eos_ids=loop.stops)
    ways = loop.generations[:1] if run.excused else loop.generations
    return [_verdict(run, loop, way, play(model, way, run.prompts)) for way in ways]


def play(model: Model, generation: Generation, prompts: Sequence[Sequence[int]]) -> Played:
    """Generate all prompts together and keep every forward."""
    engine = Engine(model, generation=generation)
    numbers = [engine.submit(list(prompt)) for prompt in prompts]
    rows = [engine.row(number) for number in numbers]
    forwards, unpublished = [], 0
    while engine.rows:
        going = [row for row in rows if row.look is not None]
        look = going[0].look
        if look is not None and look.denoises:
            blocks = tuple(
                row.canvas.tokens[row.block.start : row.block.stop].tolist() for row in going
            )
            forwards.append(Forward(len(going), look.width, look.start, look.visible, blocks))
        else:
            unpublished += 1
        engine.step()
    return Played(rows, forwards, unpublished)


def _verdict(run: Run, loop: Loop, generation: Generation, played: Played) -> Verdict:
    alone = len(played.rows) == 1
    shown = [SHOWN[run.family](row, loop, alone) for row in played.rows]
    problems = []
    for number, (ours, theirs) in enumerate(zip(shown, run.outs, strict=True)):
        if ours != theirs:
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)  # noqa: B905
            at = f"differ from {place} on" if place is not None else "have another length"
            problems.append(f"ids of row {number} {at}")
    expected = _expected_forwards(run)
    if len(played.forwards) != expected:
        problems.append(f"{len(played.forwards)} forwards, not {expected}")
    problems += _trace_problems(run, generation, played)
    name = f"{run.tag} [{generation.plan.partition(':')[0]}]"
    return Verdict(name, tuple(problems), len(played.forwards), played.unpublished, run.excused)


def _expected_forwards(run: Run) -> int:
    """Denoising forwards; SDAR's count holds the passes that store keys."""
    stated = _stated_forwards(run)
    if run.family != "sdar_moe":
        return stated
    calls = _calls(run)
    if len(calls) != stated:
        raise CoterieError(f"{run.where}: nfe is {stated}, but {len(calls)} calls are recorded")
    return sum(1 for _, _, stored in calls if not stored)


def _trace_problems(run: Run, generation: Generation, played: Played) -> list[str]:
    """Differences in what went into each forward, as far as the run recorded it."""
    ours: list[object]
    theirs: list[object]
    if run.family == "sdar_moe":
        ours, theirs = [*_with_stores(played)], [*_calls(run)]
    elif run.family == "lladamoe":
        ours = [[f.rows, f.width] for f in played.forwards]
        listed = run.entry.get("calls")
        if not isinstance(listed, list):
            raise CoterieError(f"{run.where}: calls is {type(listed).__name__}, not a list")
        theirs = listed
    else:
        count, width = _stated_forwards(run), generation.block
        inputs = run.arrays.whole(f"gen_{run.tag}_trace_block_inputs", count, width)
        ends = run.arrays.whole(f"gen_{run.tag}_trace_window_end", count)
        ours = [(f.blocks[0], f.stop) for f in played.forwards]
        theirs = list(zip(inputs.tolist(), ends.tolist(), strict=True))
    pairs = enumerate(zip_longest(ours, theirs))
    first = next((i for i, (a, b) in pairs if a != b), None)
    return [] if first is None else [f"forward {first} has another input"]


def _with_stores(played: Played) -> Iterator[list[int]]:
    """(length, start, stores keys) of SDAR's calls: it stores prompt and blocks, the last too."""
    if prefilled := played.rows[0].blocks[0].start:
        yield [prefilled, 0, 1]
    for this, following in zip_longest(played.forwards, played.forwards[1:]):
        yield [this.width, this.start, 0]
        if following is None or following.start != this.start:
            yield [this.width, this.start, 1]


def _calls(run: Run) -> list[list[int]]:
    """(width, start, stores keys) of every forward."""
    name = f"gen_{run.tag}_calls_len_pos_store"
    count, _ = run.arrays.shape(name, 2)
    return run.arrays.whole(name, count, 3).tolist()


def _stated_forwards(run: Run) -> int:
    return Parameters(run.where, run.entry).whole("nfe")


def _whole_canvas(row: Row, loop: Loop, alone: bool) -> list[int]:
    return row.canvas.tokens.tolist()


def _llada_moe(row: Row, loop: Loop, alone: bool) -> list[int]:
    """dInfer fills with end-of-text after a stop, and drops it from single rows."""
    tokens = row.canvas.tokens.tolist()
    if loop.fills:
        tokens[row.block.stop :] = loop.stops[:1] * (len(tokens) - row.block.stop)
    return [token for token in tokens if token not in loop.stops] if alone else tokens


def _llada2(row: Row, loop: Loop, alone: bool) -> list[int]:
    """The answer with its end-of-text. Where 2.0 stops inside a block, the prompt comes along."""
    answer = row.canvas.tokens.tolist()[row.canvas.prompt :]
    answer = answer if row.cut else answer[: row.ask.new]
    end = first_of(answer, row.ask.stops)
    answer = answer if end is None else answer[: end + 1]
    return [*row.ask.prompt, *answer] if row.cut else answer


SHOWN: dict[str, Callable[[Row, Loop, bool], list[int]]] = {
    "lladamoe": _llada_moe,
    "llada2": _llada2,
    "llada21": _llada2,
    "sdar_moe": _whole_canvas,
}
ALGORITHMS = {"llada2": "LLaDA2.0", "llada21": "LLaDA2.1", "sdar_moe": "SDAR"}
