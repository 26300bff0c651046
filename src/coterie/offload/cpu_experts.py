"""Cache misses of a GPU computed on the CPU, where that is faster than a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.errors import OffloadError
from coterie.offload.eviction import Mask
from coterie.offload.slot_table import EMPTY
from coterie.values import Slab

TokenCounts = NDArray[np.int64]


@dataclass(frozen=True)
class TokenLimit:
    """Misses needed by at most ``max_tokens`` tokens."""

    max_tokens: int

    def select(self, missed_mask: Mask, token_counts: TokenCounts) -> Mask:
        """[E] bool, a subset of the misses; ``token_counts`` [E] are the tokens of each expert."""
        return missed_mask & (token_counts <= self.max_tokens)

    def describe(self) -> str:
        return f"cache misses needed by at most {self.max_tokens} tokens are computed on the CPU"


@dataclass(frozen=True)
class BreakEven:
    """The split of the misses that ends soonest; the experts with the fewest tokens on the CPU.

    Copies and the CPU are assumed to run at full speed at the same time.
    """

    copy_seconds: float  # of one expert
    layer_seconds: float  # on the CPU, to start a layer
    expert_seconds: float  # on the CPU, per expert
    token_seconds: float  # on the CPU, per token of an expert

    def select(self, missed_mask: Mask, token_counts: TokenCounts) -> Mask:
        """The split that ends first; ties go to fewer experts on the CPU."""
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
        """The split that follows from the seconds of a copy and of three layers on the CPU.

        The layers compute one expert of one token, ``experts`` of one token each, and ``experts``
        of ``tokens`` each. Results are clipped at 0, since timings are noisy.
        """
        token_seconds = max(0.0, (full_experts - many_experts) / (experts * (tokens - 1)))
        expert_seconds = max(0.0, (many_experts - one_expert) / (experts - 1) - token_seconds)
        return BreakEven(
            copy_seconds,
            max(0.0, one_expert - expert_seconds - token_seconds),
            expert_seconds,
            token_seconds,
        )

    def describe(self) -> str:
        return (
            "cache misses are computed on the CPU where that is faster than a copy: a copy takes "
            f"{self.copy_seconds * 1e3:.3g} ms; the CPU needs {self.layer_seconds * 1e3:.3g} ms "
            f"per layer, {self.expert_seconds * 1e3:.3g} ms per expert and "
            f"{self.token_seconds * 1e3:.3g} ms per token"
        )


CpuSelection = TokenLimit | BreakEven
"""Which cache misses the CPU computes."""


@dataclass(frozen=True)
class CpuExperts:
    """Which misses the CPU computes, and every layer's experts in host memory."""

    selection: CpuSelection
    slabs: Mapping[int, Slab]

    def slab(self, layer: int, experts: Sequence[int]) -> Slab:
        """A slab of these experts only."""
        layer_slab, selected_ids = self.slabs[layer], list(experts)
        slot_of = torch.full_like(layer_slab.slot_of, EMPTY)
        slot_of[selected_ids] = layer_slab.slot_of[selected_ids]
        return replace(layer_slab, slot_of=slot_of)


def parse_cpu_experts(text: str) -> TokenLimit | Literal["auto"] | None:
    """Parse "off" (None), "auto" (measured at load) or a maximum number of tokens, such as "4"."""
    option = text.strip()
    if option in ("auto", "off"):
        return "auto" if option == "auto" else None
    if not option.isdecimal() or int(option) < 1:
        raise OffloadError(
            f"`cpu_experts` is {text!r}; use auto, off, or the largest number of tokens of an "
            "expert that the CPU computes"
        )
    return TokenLimit(int(option))
