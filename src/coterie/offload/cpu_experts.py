"""Experts computed on a CPU beside the GPU that misses them, where that is sooner than a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.errors import CoterieError
from coterie.offload.eviction import Mask
from coterie.offload.slot_table import EMPTY
from coterie.values import Slab

TokenCounts = NDArray[np.int64]


class CpuSelection(Protocol):
    """Which of the experts that a layer misses are computed where they lie."""

    def select(self, missed_mask: Mask, token_counts: TokenCounts) -> Mask:
        """[E] bool, none but ``missed``; ``tokens`` [E] are those of each expert."""
        ...


@dataclass(frozen=True)
class TokenLimit:
    """Those with so few tokens, whatever it takes."""

    max_tokens: int

    def select(self, missed_mask: Mask, token_counts: TokenCounts) -> Mask:
        return missed_mask & (token_counts <= self.max_tokens)


@dataclass(frozen=True)
class BreakEven:
    """As many as are computed by the time the others are copied; those with fewest tokens.

    All in seconds: ``copy`` an expert; on the CPU, ``begin`` a layer, compute ``each`` expert, and
    each ``token`` of it. Both are taken to be as fast at once as they are alone.
    """

    copy_seconds: float
    layer_seconds: float
    expert_seconds: float
    token_seconds: float

    def select(self, missed_mask: Mask, token_counts: TokenCounts) -> Mask:
        """The split whose later end comes first; of equals, fewer on the CPU."""
        experts = np.flatnonzero(missed_mask)
        order = experts[np.argsort(token_counts[experts], kind="stable")]
        copy_ends = self.copy_seconds * np.arange(len(order), -1, -1)
        cpu_ends = np.append(
            0.0,
            self.layer_seconds
            + np.cumsum(self.expert_seconds + self.token_seconds * token_counts[order]),
        )
        selected_mask = np.zeros_like(missed_mask)
        selected_mask[order[: int(np.argmin(np.maximum(copy_ends, cpu_ends)))]] = True
        return selected_mask

    @staticmethod
    def from_timings(
        copy_seconds: float,
        *,
        one_expert: float,
        many_experts: float,
        full_experts: float,
        experts: int,
        tokens: int,
    ) -> BreakEven:
        """From seconds of layers on the CPU: one expert and ``many`` experts of a token each, and
        as many ``full`` ones, of so many tokens each. Noise makes no price negative."""
        token_seconds = max(0.0, (full_experts - many_experts) / (experts * (tokens - 1)))
        expert_seconds = max(0.0, (many_experts - one_expert) / (experts - 1) - token_seconds)
        return BreakEven(
            copy_seconds,
            max(0.0, one_expert - expert_seconds - token_seconds),
            expert_seconds,
            token_seconds,
        )

    def max_tokens(self) -> int:
        """Tokens of an expert up to which the CPU computes a further one before it is copied."""
        if self.expert_seconds >= self.copy_seconds:
            return 0
        return (
            int((self.copy_seconds - self.expert_seconds) / self.token_seconds)
            if self.token_seconds
            else 1 << 30
        )


@dataclass(frozen=True)
class CpuExperts:
    """The CPU's part: whom it computes, and all experts of each layer in host memory."""

    selection: CpuSelection
    slabs: Mapping[int, Slab]

    def slab(self, layer: int, experts: Sequence[int]) -> Slab:
        """Of these alone."""
        layer_slab, selected_ids = self.slabs[layer], list(experts)
        slot_of = torch.full_like(layer_slab.slot_of, EMPTY)
        slot_of[selected_ids] = layer_slab.slot_of[selected_ids]
        return replace(layer_slab, slot_of=slot_of)


def parse_cpu_experts(text: str) -> TokenLimit | Literal["auto"] | None:
    """ "off" is nobody, "auto" is to be measured, "4" is experts of at most so many tokens."""
    option = text.strip()
    if option in ("auto", "off"):
        return "auto" if option == "auto" else None
    if not option.isdecimal() or int(option) < 1:
        raise CoterieError(
            f"--cpu-experts {text!r}: say auto, off, or the most tokens of an expert that a CPU "
            "computes"
        )
    return TokenLimit(int(option))
