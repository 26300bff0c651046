"""Unmasking rules: which masked positions of a block are written after a forward.

Each published rule is a frozen dataclass. Editing, credit and smoothing are in ``refinements``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

from coterie.decoding.sampling import MIN_TEMPERATURE, Proposal
from coterie.specs import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
    UnitFraction,
    check_options,
)

NEG_INF = float("-inf")
Temperature = Annotated[float, Bounds(ge=MIN_TEMPERATURE)]


@dataclass(frozen=True)
class BlockState:
    """The state of one block of w positions after a forward, as rules see it."""

    proposal: Proposal
    tokens: Tensor  # [w] int64, the input of the forward
    masked: Tensor  # [w] bool
    generated: Tensor  # [w] bool: written by an earlier step, not part of the prompt
    mask_id: int
    step: int  # earlier forwards of this block
    initial_masked: int  # masked positions before the first forward of the block
    threshold_floor: float = NEG_INF  # the minimum of thresholds (smoothing)

    @property
    def confidence(self) -> Tensor:
        """[w] fp32, -inf at positions that are not masked."""
        return self.proposal.confidence.masked_fill(~self.masked, NEG_INF)

    @property
    def width(self) -> int:
        return self.masked.shape[0]


class UnmaskRule(Protocol):
    """An unmasking rule; a frozen dataclass of options."""

    def choose(self, state: BlockState) -> Tensor:
        """The masked positions to write now, bool [w]."""
        ...


@dataclass(frozen=True)
class ThresholdRule:
    """Writes positions with confidence of at least ``p``, and always the best (Fast-dLLM).

    Positions within ``slack`` of the best are written, too (dInfer: 1e-5). A position
    with the mask itself as its proposal is skipped (dInfer).
    """

    p: PositiveFraction = 0.9
    slack: UnitFraction = 1e-5

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        allowed = state.masked & (state.proposal.ids != state.mask_id)
        confidence = state.confidence.masked_fill(~allowed, NEG_INF)
        threshold = torch.clamp(
            confidence.max() - self.slack, max=max(self.p, state.threshold_floor)
        )
        return allowed & (confidence >= threshold)


@dataclass(frozen=True)
class DynamicRule:
    """Writes positions with confidence above ``p``; if they are too few, the best ones.

    The minimum is an even share of the block over ``steps`` forwards (LLaDA2.0, SDAR), and at least
    ``least`` (LLaDA2.1, with ``steps`` 0).
    """

    p: PositiveFraction = 0.9
    steps: NonNegativeInt = 0
    least: PositiveInt = 1

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        min_count = self.least
        if self.steps:
            min_count = max(min_count, even_share(state.width, self.steps, state.step))
        confident = state.confidence > max(self.p, state.threshold_floor)
        if int(confident.sum()) >= min_count:
            return confident
        return top_positions(state.confidence, min_count)


@dataclass(frozen=True)
class FixedRule:
    """Writes the best positions, an even share of the masks in each of ``steps`` (LLaDA)."""

    steps: PositiveInt = 32

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        count = even_share(state.initial_masked, self.steps, state.step)
        return top_positions(state.confidence, count)


@dataclass(frozen=True)
class StaticRule:
    """Writes the best positions, an even share of the block in each of ``steps`` (SDAR)."""

    steps: PositiveInt = 4

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        return top_positions(state.confidence, even_share(state.width, self.steps, state.step))


@dataclass(frozen=True)
class SequentialRule:
    """Writes from left to right, an even share of the block in each of ``steps`` (SDAR)."""

    steps: PositiveInt = 4

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        first = int(state.masked.int().argmax())
        stop = first + even_share(state.width, self.steps, state.step)
        positions = torch.arange(state.width)
        return state.masked & (positions >= first) & (positions < stop)


@dataclass(frozen=True)
class EntropyRule:
    """Writes the positions of least entropy, up to a sum of ``bound`` nats (SDAR)."""

    bound: NonNegativeFloat = 0.35

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        if state.proposal.entropy is None:
            raise RuntimeError("the entropy rule needs proposals with `entropy`")
        entropy = state.proposal.entropy.masked_fill(~state.masked, float("inf"))
        total = entropy.sort().values.cumsum(dim=0)
        return top_positions(-entropy, max(1, int((total < self.bound).sum())))


@dataclass(frozen=True)
class RenoiseRule:
    """Keeps drawn tokens of least entropy, up to ``bound`` nats before each (DiffusionGemma).

    A block starts as random tokens, and each step replaces those it does not keep by new ones. The
    temperature falls from ``hot`` towards ``cold`` over ``steps``. The last step writes the most
    probable tokens. The block ends earlier if these were the same in ``stable`` steps before and
    the mean entropy is below ``certain``.
    """

    bound: NonNegativeFloat = 0.1
    steps: PositiveInt = 48
    hot: Temperature = 0.8
    cold: Temperature = 0.4
    stable: NonNegativeInt = 1
    certain: NonNegativeFloat = 0.005

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        if state.proposal.entropy is None:
            raise RuntimeError("the renoise rule needs proposals with `entropy`")
        entropy = state.proposal.entropy.masked_fill(~state.masked, float("inf")).sort(stable=True)
        before = entropy.values.cumsum(dim=0) - entropy.values
        kept = torch.zeros_like(state.masked)
        kept[entropy.indices] = before <= self.bound
        return kept & state.masked

    def temperature(self, step: int) -> float:
        """The temperature of the draws in ``step``, counted from 0."""
        return self.cold + (self.hot - self.cold) * (self.steps - step) / self.steps

    def is_final(self, step: int, best: Sequence[Tensor], entropy: Tensor) -> bool:
        """Whether ``step`` is the last; ``best`` are the most probable tokens of all steps."""
        same = len(best) > self.stable and all(
            torch.equal(tokens, best[-1]) for tokens in best[-1 - self.stable : -1]
        )
        return step + 1 >= self.steps or (same and float(entropy.mean()) < self.certain)


@dataclass(frozen=True)
class HierarchyRule:
    """Writes positions with confidence above ``p``, and the best of each run of masks (dInfer).

    The best of a run needs confidence above ``low``, except for the best of all.
    """

    p: PositiveFraction = 0.9
    low: UnitFraction = 0.4

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        masked, confidence = state.masked, state.confidence
        starts = masked & ~torch.cat((torch.zeros(1, dtype=torch.bool), masked[:-1]))
        run = (starts.cumsum(dim=0) - 1).clamp(min=0)
        peak = torch.full_like(confidence, NEG_INF).scatter_reduce(0, run, confidence, "amax")
        peaks = (confidence == peak[run]) & (confidence > self.low)
        confident = confidence > max(self.p, state.threshold_floor)
        return masked & (peaks | confident | top_positions(confidence, 1))


def even_share(total: int, steps: int, step: int) -> int:
    """The part of ``total`` in ``step``, at least 1, spread evenly; the first steps have more."""
    return max(1, total // steps + (step < total % steps))


def top_positions(confidence: Tensor, count: int) -> Tensor:
    """Bool [w]: the ``count`` greatest of confidence [w], not -inf; ties go to the lower one."""
    order = confidence.sort(descending=True, stable=True).indices
    selected = torch.zeros_like(confidence, dtype=torch.bool)
    selected[order[:count]] = True
    return selected & (confidence > NEG_INF)


RULES: dict[str, type[UnmaskRule]] = {
    "threshold": ThresholdRule,
    "dynamic": DynamicRule,
    "fixed": FixedRule,
    "static": StaticRule,
    "sequential": SequentialRule,
    "entropy": EntropyRule,
    "renoise": RenoiseRule,
    "hierarchy": HierarchyRule,
}
