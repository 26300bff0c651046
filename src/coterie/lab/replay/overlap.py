"""How alike the experts of one step and the next are: what caching can hope for at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from coterie.keys import Key, to_json
from coterie.lab.replay.bit_packing import Mask
from coterie.lab.replay.cache_simulation import TraceVotes

Means = tuple[float, ...]  # of each layer
METRICS = ("step_jaccard", "block_jaccard", "step_cosine", "block_cosine")


@dataclass(frozen=True)
class StepOverlap:
    """Means over consecutive decoding forwards of a row; empty where there are none.

    ``steps``: within one block; ``blocks``: the last of one block and the first of the next.
    Jaccard: experts in both over experts in either. Cosine: of the votes.
    """

    steps: Annotated[int, Key("steps")]  # how many pairs there were
    blocks: Annotated[int, Key("blocks")]
    step_jaccard: Annotated[Means, Key("step_jaccard")]
    block_jaccard: Annotated[Means, Key("block_jaccard")]
    step_cosine: Annotated[Means, Key("step_cosine")]
    block_cosine: Annotated[Means, Key("block_cosine")]

    def mean(self, name: str) -> float | None:
        """Over layers, of one of the four."""
        values = to_json(self)[name]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, object]:
        """Of each layer, and the means."""
        return {**to_json(self), "means": {name: self.mean(name) for name in METRICS}}


def measure_overlap(trace_votes: TraceVotes, used: Mask) -> StepOverlap:
    """Of what was used, [F, L, E], and the votes of the trace."""
    pairs_by_block: dict[bool, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {
        True: [],
        False: [],
    }
    for previous, current, same_block in consecutive_pairs(trace_votes):
        jaccards = jaccard(used[previous], used[current])
        cosines = cosine(trace_votes.votes[previous], trace_votes.votes[current])
        pairs_by_block[same_block].append((jaccards, cosines))
    within, between = pairs_by_block[True], pairs_by_block[False]
    return StepOverlap(
        len(within),
        len(between),
        *(_means([pair[0] for pair in group]) for group in (within, between)),
        *(_means([pair[1] for pair in group]) for group in (within, between)),
    )


def consecutive_pairs(trace_votes: TraceVotes) -> Iterator[tuple[int, int, bool]]:
    """Places of consecutive forwards of one row, and whether they are of one block."""
    last_of_row: dict[int, int] = {}
    forwards = trace_votes.trace.forwards
    for index, forward in enumerate(forwards):
        if forward.kind != "decode":
            continue
        previous = last_of_row.get(forward.row)
        if previous is not None:
            yield previous, index, forwards[previous].block_start == forward.block_start
        last_of_row[forward.row] = index


def jaccard(first: Mask, second: Mask) -> NDArray[np.float64]:
    """[L] of masks [L, E]; two empty ones are alike."""
    union = (first | second).sum(-1)
    return np.where(union > 0, (first & second).sum(-1) / np.maximum(union, 1), 1.0)


def cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L] of vectors [L, E]; 0 where one is nothing."""
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.where(norms > 0, (first * second).sum(-1) / np.maximum(norms, 1e-300), 0.0)


def _means(values: list[NDArray[np.float64]]) -> Means:
    return tuple(np.mean(values, axis=0).tolist()) if values else ()
