"""Running the generations that a reference folder names, and comparing every id and forward."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from coterie.decoding import Row
from coterie.engine.config import Generation
from coterie.engine.engine import Engine
from coterie.engine.load import Model, load_model
from coterie.engine.published import Parameters, tell
from coterie.engine.reference import Arrays
from coterie.naming import CoterieError

CLOSE = 2e-6
"""Runs whose own decisions are nearer than this to a tie are reported, not judged."""
PARTS = ("prompt", "out", "trace_block_inputs", "trace_window_end", "calls_len_pos_store")
"""Arrays of a generation; which of the traces there are depends on the family."""
VERBATIM = "off_"
"""Runs so tagged reproduce a known error of published code: reported, not judged."""


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
class Run:
    """One entry of meta.json's ``generations`` with its arrays; B rows."""

    tag: str
    family: str
    entry: Mapping[str, object]
    prompts: list[list[int]]
    outs: list[list[int]]
    arrays: Arrays

    @property
    def excused(self) -> str:
        if self.tag.startswith(VERBATIM):
            return "reproduces a known error"
        return f"margin {self.margin:.1e}" if self.margin < CLOSE else ""

    @property
    def margin(self) -> float:
        """The smallest that the run records."""
        named = self.entry.get("margins")
        found = list(named.values()) if isinstance(named, dict) else []
        found += [value for key, value in self.entry.items() if key.endswith("_margin")]
        return min((v for v in found if isinstance(v, float)), default=math.inf)

    @property
    def where(self) -> str:
        return f"{self.arrays.file.parent}: {self.tag}"


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
    rows: list[Row]
    forwards: list[Forward]
    unpublished: int


def generation_verdicts(folder: Path) -> tuple[Verdict, ...]:
    """Run everything the folder names (CPU, fp32).

    Raises CoterieError when the folder is damaged: an entry, an array or a parameter missing,
    unknown or malformed.
    """
    arrays = Arrays.of(folder / "reference.npz")
    runs = read_runs(folder, arrays)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    mask, end = int(arrays.whole("mask_id")), int(arrays.whole("eos_id"))
    return tuple(verdict for run in runs for verdict in _judge(run, model, mask, end))


def read_runs(folder: Path, arrays: Arrays) -> list[Run]:
    """Every generation of meta.json, checked against the arrays, and the arrays against it."""
    meta = _object(folder / "meta.json")
    family, entries = meta.get("family"), meta.get("generations")
    if not isinstance(family, str) or family not in SHOWN:
        raise CoterieError(f"{folder}: meta.json: family is {family!r}; known: {', '.join(SHOWN)}")
    if not isinstance(entries, list) or not entries:
        raise CoterieError(f"{folder}: meta.json lists no generations")
    runs = [_run(folder, family, entry, arrays) for entry in entries]
    tags = [run.tag for run in runs]
    if len(set(tags)) < len(tags):
        raise CoterieError(f"{folder}: meta.json lists a generation twice")
    named = {f"gen_{tag}_{part}" for tag in tags for part in PARTS}
    for name in arrays.held:
        if name.startswith("gen_") and name not in named:
            raise CoterieError(f"{arrays.file}: {name} belongs to no generation of meta.json")
    return runs


def _run(folder: Path, family: str, entry: object, arrays: Arrays) -> Run:
    if not isinstance(entry, dict) or not isinstance(entry.get("tag"), str):
        raise CoterieError(f"{folder}: meta.json: a generation without a tag")
    tag = entry["tag"]
    prompts, outs = (_rows(arrays, f"gen_{tag}_{part}") for part in ("prompt", "out"))
    if len(prompts) != len(outs):
        raise CoterieError(f"{arrays.file}: {tag}: {len(prompts)} prompts, {len(outs)} outputs")
    if entry.get("n_out", len(outs[0])) != len(outs[0]):
        raise CoterieError(f"{folder}: {tag}: n_out is {entry['n_out']}, of {len(outs[0])} ids")
    return Run(tag, family, entry, prompts, outs, arrays)


def _rows(arrays: Arrays, name: str) -> list[list[int]]:
    held = arrays.held.get(name)
    axes = held.ndim if isinstance(held, np.ndarray) and held.ndim in (1, 2) else 1
    found = arrays.whole(name, *arrays.shape(name, axes))
    return found.reshape(-1, found.shape[-1]).tolist()


def _judge(run: Run, model: Model, mask: int, end: int) -> list[Verdict]:
    entry = run.entry
    values = entry.get("params")
    if not isinstance(values, dict):
        raise CoterieError(f"{run.where}: params is {values!r}, not an object")
    mask = _whole(run, "mask_id", mask)
    algorithm = ALGORITHMS.get(run.family) or str(entry.get("algo"))
    loop = tell(algorithm, Parameters(run.where, values), mask=mask, end=end)
    model = replace(model, mask_id=loop.mask, eos_ids=loop.stops)
    ways = loop.generations[:1] if run.excused else loop.generations
    return [_verdict(run, way, play(model, way, run.prompts)) for way in ways]


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


def _verdict(run: Run, generation: Generation, played: Played) -> Verdict:
    shown = [SHOWN[run.family](row, run) for row in played.rows]
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
    stated = _whole(run, "nfe", None)
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
        ours = [(f.width, f.start) for f in played.forwards]
        theirs = [(length, start) for length, start, stored in _calls(run) if not stored]
    elif run.family == "lladamoe":
        ours = [[f.rows, f.width] for f in played.forwards]
        listed = run.entry.get("calls")
        if not isinstance(listed, list):
            raise CoterieError(f"{run.where}: calls is {type(listed).__name__}, not a list")
        theirs = listed
    else:
        count, width = _whole(run, "nfe", None), generation.block
        inputs = run.arrays.whole(f"gen_{run.tag}_trace_block_inputs", count, width)
        ends = run.arrays.whole(f"gen_{run.tag}_trace_window_end", count)
        ours = [(f.blocks[0], f.stop) for f in played.forwards]
        theirs = list(zip(inputs.tolist(), ends.tolist(), strict=True))
    pairs = enumerate(zip(ours, theirs))  # noqa: B905  the count is another problem
    first = next((i for i, (a, b) in pairs if a != b), None)
    return [] if first is None else [f"forward {first} has another input"]


def _calls(run: Run) -> list[list[int]]:
    name = f"gen_{run.tag}_calls_len_pos_store"
    count, axes = run.arrays.shape(name, 2)
    return run.arrays.whole(name, count, 3 if axes != 3 else axes).tolist()


def _whole(run: Run, name: str, default: int | None) -> int:
    value = run.entry.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CoterieError(f"{run.where}: {name} is {value!r}, not a whole number")
    return value


def _object(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CoterieError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise CoterieError(f"{file}: not a readable JSON file ({error})") from None
    if not isinstance(found, dict):
        raise CoterieError(f"{file}: holds a {type(found).__name__}, not an object")
    return found


def _whole_canvas(row: Row, run: Run) -> list[int]:
    return row.canvas.tokens.tolist()


def _llada_moe(row: Row, run: Run) -> list[int]:
    """dInfer fills with end-of-text after a stop, and drops it from single rows."""
    tokens = row.canvas.tokens.tolist()
    if "dInfer" not in str(run.entry.get("algo")) or not row.ask.stops:
        return tokens
    end = row.ask.stops[0]
    filled = [end if i >= row.block.stop else token for i, token in enumerate(tokens)]
    return filled if len(run.outs) > 1 else [token for token in filled if token != end]


def _llada2(row: Row, run: Run) -> list[int]:
    """The answer with its end-of-text. Where 2.0 stops inside a block, the prompt comes along."""
    answer = row.canvas.tokens.tolist()[row.canvas.prompt :][: row.ask.new]
    ends = [i for i, token in enumerate(answer) if token in row.ask.stops]
    answer = answer[: ends[0] + 1] if ends else answer
    return [*row.ask.prompt, *answer] if row.cut else answer


SHOWN: dict[str, Callable[[Row, Run], list[int]]] = {
    "lladamoe": _llada_moe,
    "llada2": _llada2,
    "llada21": _llada2,
    "sdar_moe": _whole_canvas,
}
ALGORITHMS = {"llada2": "LLaDA2.0", "llada21": "LLaDA2.1", "sdar_moe": "SDAR"}
