"""Which proposals to keep: the published rules, each a small frozen dataclass.

A rule answers one question: of the positions still masked, which are written now? What surrounds
it (editing, credit, smoothing) is in ``refine``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coterie.decoding.sampling import Proposal
from coterie.specs import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
    UnitFraction,
    check_options,
)

NEG_INF = float("-inf")


@dataclass(frozen=True)
class BlockState:
    """What a rule sees of one block after one forward; w positions."""

    proposal: Proposal
    tokens: Tensor  # [w] int64, as they went into the forward
    masked: Tensor  # [w] bool
    generated: Tensor  # [w] bool: written by an earlier step, not by the prompt
    mask_id: int  # the mask token's id
    step: int  # forwards this block has had before
    initial_masked: int  # positions that were masked when the block was entered
    threshold_floor: float = NEG_INF  # thresholds are at least this (iteration smoothing)

    @property
    def confidence(self) -> Tensor:
        """[w] fp32, -inf where nothing is masked."""
        return self.proposal.confidence.masked_fill(~self.masked, NEG_INF)

    @property
    def width(self) -> int:
        return self.masked.shape[0]


class UnmaskRule(Protocol):
    """A frozen dataclass of options."""

    def choose(self, state: BlockState) -> Tensor:
        """Bool [w]: the masked positions to write now."""
        ...


@dataclass(frozen=True)
class ThresholdRule:
    """All as sure as ``p``, and always the best (Fast-dLLM).

    With ``slack`` also all that are within it of the best (dInfer: 1e-5). A position whose proposal
    is the mask itself is passed over (dInfer).
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
    """All surer than ``p`` if they are enough, else the best of them until they are.

    Enough is an even share of the block over ``steps`` forwards (LLaDA2.0, SDAR), or ``least``
    where ``steps`` is 0 (LLaDA2.1).
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
        return (
            confident
            if int(confident.sum()) >= min_count
            else top_positions(state.confidence, min_count)
        )


@dataclass(frozen=True)
class FixedRule:
    """The best of what is masked, an even share of it in each of ``steps`` forwards (LLaDA)."""

    steps: PositiveInt = 32

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        return top_positions(
            state.confidence, max(1, even_share(state.initial_masked, self.steps, state.step))
        )


@dataclass(frozen=True)
class StaticRule:
    """The best, an even share of the whole block in each of ``steps`` forwards (SDAR)."""

    steps: PositiveInt = 4

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        return top_positions(
            state.confidence, max(1, even_share(state.width, self.steps, state.step))
        )


@dataclass(frozen=True)
class SequentialRule:
    """From left to right, an even share of the block in each of ``steps`` forwards (SDAR)."""

    steps: PositiveInt = 4

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        first = int(state.masked.int().argmax())
        stop = first + max(1, even_share(state.width, self.steps, state.step))
        positions = torch.arange(state.width)
        return state.masked & (positions >= first) & (positions < stop)


@dataclass(frozen=True)
class EntropyRule:
    """The least uncertain, as many as keep their summed entropy under ``bound`` nats (SDAR)."""

    bound: NonNegativeFloat = 0.35

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        if state.proposal.entropy is None:
            raise RuntimeError("the entropy rule needs proposals that know their entropy")
        entropy = state.proposal.entropy.masked_fill(~state.masked, float("inf"))
        total = entropy.sort().values.cumsum(dim=0)
        return top_positions(-entropy, max(1, int((total < self.bound).sum())))


@dataclass(frozen=True)
class HierarchyRule:
    """All surer than ``p``, the best of every run of masks if surer than ``low``, and the best.

    Splitting each run in its middle lets few forwards reach everywhere (dInfer).
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
    """How many of ``total`` fall to ``step`` when they are spread evenly, the first steps more."""
    return total // steps + (1 if step < total % steps else 0)


def top_positions(confidence: Tensor, count: int) -> Tensor:
    """Bool [w]: the ``count`` greatest of confidence [w], the lower position first; never -inf."""
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
    "hierarchy": HierarchyRule,
}
