"""Experts computed on a CPU beside the GPU that misses them, where that is sooner than a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.experts.eviction import Mask
from coterie.experts.slots import NOBODY
from coterie.naming import CoterieError
from coterie.values import Slab

Counts = NDArray[np.int64]


class Choice(Protocol):
    """Which of the experts that a layer misses are computed where they lie."""

    def chosen(self, missed: Mask, tokens: Counts) -> Mask:
        """[E] bool, none but ``missed``; ``tokens`` [E] are those of each expert."""
        ...


@dataclass(frozen=True)
class AtMost:
    """Those with so few tokens, whatever it takes."""

    tokens: int

    def chosen(self, missed: Mask, tokens: Counts) -> Mask:
        return missed & (tokens <= self.tokens)


@dataclass(frozen=True)
class BreakEven:
    """As many as are computed by the time the others are copied; those with fewest tokens.

    All in seconds: ``copy`` an expert; on the CPU, ``begin`` a layer, compute ``each`` expert, and
    each ``token`` of it. Both are taken to be as fast at once as they are alone.
    """

    copy: float
    begin: float
    each: float
    token: float

    def chosen(self, missed: Mask, tokens: Counts) -> Mask:
        """The split whose later end comes first; of equals, fewer on the CPU."""
        experts = np.flatnonzero(missed)
        order = experts[np.argsort(tokens[experts], kind="stable")]
        here = self.copy * np.arange(len(order), -1, -1)
        there = np.append(0.0, self.begin + np.cumsum(self.each + self.token * tokens[order]))
        found = np.zeros_like(missed)
        found[order[: int(np.argmin(np.maximum(here, there)))]] = True
        return found

    @staticmethod
    def through(
        copy: float, *, one: float, many: float, full: float, experts: int, tokens: int
    ) -> BreakEven:
        """From seconds of layers on the CPU: one expert and ``many`` experts of a token each, and
        as many ``full`` ones, of so many tokens each. Noise makes no price negative."""
        token = max(0.0, (full - many) / (experts * (tokens - 1)))
        each = max(0.0, (many - one) / (experts - 1) - token)
        return BreakEven(copy, max(0.0, one - each - token), each, token)

    def most(self) -> int:
        """Tokens of an expert up to which the CPU computes a further one before it is copied."""
        if self.each >= self.copy:
            return 0
        return int((self.copy - self.each) / self.token) if self.token else 1 << 30


@dataclass(frozen=True)
class Aside:
    """The CPU's part: whom it computes, and all experts of each layer in host memory."""

    choice: Choice
    slabs: Mapping[int, Slab]

    def slab(self, layer: int, experts: Sequence[int]) -> Slab:
        """Of these alone."""
        whole, chosen = self.slabs[layer], list(experts)
        slot_of = torch.full_like(whole.slot_of, NOBODY)
        slot_of[chosen] = whole.slot_of[chosen]
        return replace(whole, slot_of=slot_of)


def parse_aside(text: str) -> AtMost | Literal["auto"] | None:
    """ "off" is nobody, "auto" is to be measured, "4" is experts of at most so many tokens."""
    asked = text.strip()
    if asked in ("auto", "off"):
        return "auto" if asked == "auto" else None
    if not asked.isdecimal() or int(asked) < 1:
        raise CoterieError(
            f"--cpu-experts {text!r}: say auto, off, or the most tokens of an expert that a CPU "
            "computes"
        )
    return AtMost(int(asked))
