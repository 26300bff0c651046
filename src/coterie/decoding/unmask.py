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
from coterie.spelling import Amount, Count, Part, Share, Whole, check_options

NEVER = float("-inf")


@dataclass(frozen=True)
class Moment:
    """What a rule sees of one block after one forward; w positions."""

    proposal: Proposal
    tokens: Tensor  # [w] int64, as they went into the forward
    masked: Tensor  # [w] bool
    answered: Tensor  # [w] bool: written by an earlier step, not by the prompt
    mask: int  # the mask token's id
    step: int  # forwards this block has had before
    opened: int  # positions that were masked when the block was entered
    floor: float = NEVER  # thresholds are at least this (iteration smoothing)

    @property
    def confidence(self) -> Tensor:
        """[w] fp32, -inf where nothing is masked."""
        return self.proposal.confidence.masked_fill(~self.masked, NEVER)

    @property
    def width(self) -> int:
        return self.masked.shape[0]


class Rule(Protocol):
    """A frozen dataclass of options."""

    def choose(self, moment: Moment) -> Tensor:
        """Bool [w]: the masked positions to write now."""
        ...


@dataclass(frozen=True)
class Threshold:
    """All as sure as ``p``, and always the best (Fast-dLLM).

    With ``slack`` also all that are within it of the best (dInfer: 1e-5). A position whose proposal
    is the mask itself is passed over (dInfer).
    """

    p: Share = 0.9
    slack: Part = 1e-5

    __post_init__ = check_options

    def choose(self, moment: Moment) -> Tensor:
        able = moment.masked & (moment.proposal.ids != moment.mask)
        confidence = moment.confidence.masked_fill(~able, NEVER)
        bar = torch.clamp(confidence.max() - self.slack, max=max(self.p, moment.floor))
        return able & (confidence >= bar)


@dataclass(frozen=True)
class Dynamic:
    """All surer than ``p`` if they are enough, else the best of them until they are.

    Enough is an even share of the block over ``steps`` forwards (LLaDA2.0, SDAR), or ``least``
    where ``steps`` is 0 (LLaDA2.1).
    """

    p: Share = 0.9
    steps: Whole = 0
    least: Count = 1

    __post_init__ = check_options

    def choose(self, moment: Moment) -> Tensor:
        enough = self.least
        if self.steps:
            enough = max(enough, share(moment.width, self.steps, moment.step))
        sure = moment.confidence > max(self.p, moment.floor)
        return sure if int(sure.sum()) >= enough else best(moment.confidence, enough)


@dataclass(frozen=True)
class Fixed:
    """The best of what is masked, an even share of it in each of ``steps`` forwards (LLaDA)."""

    steps: Count = 32

    __post_init__ = check_options

    def choose(self, moment: Moment) -> Tensor:
        return best(moment.confidence, max(1, share(moment.opened, self.steps, moment.step)))


@dataclass(frozen=True)
class Static:
    """The best, an even share of the whole block in each of ``steps`` forwards (SDAR)."""

    steps: Count = 4

    __post_init__ = check_options

    def choose(self, moment: Moment) -> Tensor:
        return best(moment.confidence, max(1, share(moment.width, self.steps, moment.step)))


@dataclass(frozen=True)
class Sequential:
    """From left to right, an even share of the block in each of ``steps`` forwards (SDAR)."""

    steps: Count = 4

    __post_init__ = check_options

    def choose(self, moment: Moment) -> Tensor:
        first = int(moment.masked.int().argmax())
        reach = first + max(1, share(moment.width, self.steps, moment.step))
        place = torch.arange(moment.width)
        return moment.masked & (place >= first) & (place < reach)


@dataclass(frozen=True)
class Entropy:
    """The least uncertain, as many as keep their summed entropy under ``bound`` nats (SDAR)."""

    bound: Amount = 0.35

    __post_init__ = check_options

    def choose(self, moment: Moment) -> Tensor:
        if moment.proposal.entropy is None:
            raise RuntimeError("the entropy rule needs proposals that know their entropy")
        doubt = moment.proposal.entropy.masked_fill(~moment.masked, float("inf"))
        total = doubt.sort().values.cumsum(dim=0)
        return best(-doubt, max(1, int((total < self.bound).sum())))


@dataclass(frozen=True)
class Hierarchy:
    """All surer than ``p``, the best of every run of masks if surer than ``low``, and the best.

    Splitting each run in its middle lets few forwards reach everywhere (dInfer).
    """

    p: Share = 0.9
    low: Part = 0.4

    __post_init__ = check_options

    def choose(self, moment: Moment) -> Tensor:
        masked, confidence = moment.masked, moment.confidence
        starts = masked & ~torch.cat((torch.zeros(1, dtype=torch.bool), masked[:-1]))
        run = (starts.cumsum(dim=0) - 1).clamp(min=0)
        peak = torch.full_like(confidence, NEVER).scatter_reduce(0, run, confidence, "amax")
        peaks = (confidence == peak[run]) & (confidence > self.low)
        sure = confidence > max(self.p, moment.floor)
        return masked & (peaks | sure | best(confidence, 1))


def share(total: int, steps: int, step: int) -> int:
    """How many of ``total`` fall to ``step`` when they are spread evenly, the first steps more."""
    return total // steps + (1 if step < total % steps else 0)


def best(confidence: Tensor, count: int) -> Tensor:
    """Bool [w]: the ``count`` greatest of confidence [w], the lower position first; never -inf."""
    order = confidence.sort(descending=True, stable=True).indices
    kept = torch.zeros_like(confidence, dtype=torch.bool)
    kept[order[:count]] = True
    return kept & (confidence > NEVER)


RULES: dict[str, type[Rule]] = {
    "threshold": Threshold,
    "dynamic": Dynamic,
    "fixed": Fixed,
    "static": Static,
    "sequential": Sequential,
    "entropy": Entropy,
    "hierarchy": Hierarchy,
}
