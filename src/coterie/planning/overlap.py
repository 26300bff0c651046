"""How alike the experts of one step and the next are: what caching can hope for at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from coterie.keys import Key, to_json
from coterie.planning.booking import Memory
from coterie.planning.coding import Mask

Means = tuple[float, ...]  # of each layer
FOUR = ("step_jaccard", "block_jaccard", "step_cosine", "block_cosine")


@dataclass(frozen=True)
class Overlap:
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

    def document(self) -> dict[str, object]:
        """Of each layer, and the means."""
        return {**to_json(self), "means": {name: self.mean(name) for name in FOUR}}


def overlap(memory: Memory, used: Mask) -> Overlap:
    """Of what was used, [F, L, E], and the votes of the trace."""
    found: dict[bool, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {
        True: [],
        False: [],
    }
    for before, after, same in pairs(memory):
        alike = jaccard(used[before], used[after])
        turned = cosine(memory.votes[before], memory.votes[after])
        found[same].append((alike, turned))
    within, between = found[True], found[False]
    return Overlap(
        len(within),
        len(between),
        *(_means([pair[0] for pair in some]) for some in (within, between)),
        *(_means([pair[1] for pair in some]) for some in (within, between)),
    )


def pairs(memory: Memory) -> Iterator[tuple[int, int, bool]]:
    """Places of consecutive forwards of one row, and whether they are of one block."""
    last: dict[int, int] = {}
    forwards = memory.trace.forwards
    for place, forward in enumerate(forwards):
        if forward.kind != "decode":
            continue
        before = last.get(forward.row)
        if before is not None:
            yield before, place, forwards[before].block == forward.block
        last[forward.row] = place


def jaccard(one: Mask, other: Mask) -> NDArray[np.float64]:
    """[L] of masks [L, E]; two empty ones are alike."""
    either = (one | other).sum(-1)
    return np.where(either > 0, (one & other).sum(-1) / np.maximum(either, 1), 1.0)


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L] of vectors [L, E]; 0 where one is nothing."""
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return np.where(norms > 0, (one * other).sum(-1) / np.maximum(norms, 1e-300), 0.0)


def _means(values: list[NDArray[np.float64]]) -> Means:
    return tuple(np.mean(values, axis=0).tolist()) if values else ()
