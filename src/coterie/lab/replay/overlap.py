"""How similar the experts of consecutive steps are: the upper limit of what caching can save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from coterie.keys import Key, to_json
from coterie.lab.replay.cache_simulation import TraceVotes
from coterie.lab.replay.trace import Mask

LayerMeans = tuple[float, ...]
METRICS = ("step_jaccard", "block_jaccard", "step_cosine", "block_cosine")


@dataclass(frozen=True)
class StepOverlap:
    """Means over pairs of consecutive decoding forwards of a row, for each layer; empty without.

    ``steps`` pairs lie within one block, ``blocks`` pairs span two. Jaccard: experts in both over
    experts in either. Cosine: of the votes.
    """

    steps: Annotated[int, Key("steps")]
    blocks: Annotated[int, Key("blocks")]
    step_jaccard: Annotated[LayerMeans, Key("step_jaccard")]
    block_jaccard: Annotated[LayerMeans, Key("block_jaccard")]
    step_cosine: Annotated[LayerMeans, Key("step_cosine")]
    block_cosine: Annotated[LayerMeans, Key("block_cosine")]

    def mean(self, name: str) -> float | None:
        """The mean over layers of one of the METRICS."""
        values = to_json(self)[name]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, object]:
        return {**to_json(self), "means": {name: self.mean(name) for name in METRICS}}


def measure_overlap(trace_votes: TraceVotes, used: Mask) -> StepOverlap:
    """The overlap of the experts used, [F, L, E], and of the trace's votes."""
    forwards, votes = trace_votes.trace.forwards, trace_votes.votes
    pairs: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # whether in one block
    last_of_row: dict[int, int] = {}
    for index in trace_votes.trace.decode_indices:
        row, block = forwards[index].row, forwards[index].block_start
        if (previous := last_of_row.get(row)) is not None:
            pairs[forwards[previous].block_start == block].append((previous, index))
        last_of_row[row] = index
    groups = within, between = (pairs[True], pairs[False])
    return StepOverlap(
        *(len(within), len(between)),
        *(_means([jaccard(used[a], used[b]) for a, b in group]) for group in groups),
        *(_means([cosine(votes[a], votes[b]) for a, b in group]) for group in groups),
    )


def jaccard(first: Mask, second: Mask) -> NDArray[np.float64]:
    """[L] from masks [L, E]; 1 where both are empty."""
    union = (first | second).sum(-1)
    return np.where(union > 0, (first & second).sum(-1) / np.maximum(union, 1), 1.0)


def cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L] from vectors [L, E]; 0 where one is zero."""
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.where(norms > 0, (first * second).sum(-1) / np.maximum(norms, 1e-300), 0.0)


def _means(values: list[NDArray[np.float64]]) -> LayerMeans:
    return tuple(np.mean(values, axis=0).tolist()) if values else ()
