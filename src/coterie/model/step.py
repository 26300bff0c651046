"""What changes from one forward to the next, in one value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.model.cache import Cache
from coterie.telemetry import Recorder
from coterie.values import Incumbents, Policy, Progress, Settled, Window


@dataclass(frozen=True)
class Coresets:
    """What a block's last step elected, and what this one does: [L, B, E] bool of the layers that
    route. A row that has none yet elects anew."""

    drift: float
    before: Tensor
    after: Tensor  # written layer by layer, as a cache is; before that, nobody

    @staticmethod
    def of(drift: float, before: Tensor) -> Coresets:
        return Coresets(drift, before, torch.zeros_like(before))

    def incumbents(self, ordinal: int) -> Incumbents:
        """Those of a layer, by its place among the layers that route."""
        return Incumbents(self.drift, self.before[ordinal])

    def keep(self, ordinal: int, settled: Settled) -> None:
        self.after[ordinal] = settled.coresets


@dataclass(frozen=True)
class Step:
    """One forward: where it looks, what it may use, who watches, and what it must answer.

    Without a cache the window is all there is: it starts at 0 and keys are not kept.
    """

    window: Window
    cache: Cache | None
    policy: Policy
    recorder: Recorder
    wanted: Tensor | None = None  # [P] int64 into B*width: positions to make logits for; None = all
    voters: Tensor | None = None  # [B, width] weight of each position's vote; None = everybody
    progress: Progress | None = None  # for policies that choose who votes
    forward: tuple[int, ...] = ()  # decode-forward number of each row
    coresets: Coresets | None = None  # where a block keeps its own from step to step
    embeddings: Tensor | None = None  # [B, width, H], in place of the tokens' embeddings
