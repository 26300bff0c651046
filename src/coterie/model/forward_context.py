"""What changes from one forward to the next, in one value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.model.cache import KVCache
from coterie.telemetry import Recorder
from coterie.values import CoresetReuse, DecodeProgress, Policy, PreviousCoresets, Window


@dataclass(frozen=True)
class CoresetState:
    """What a block's last step elected, and what this one does: [L, B, E] bool of the layers that
    route. A row that has none yet elects anew."""

    reuse_tolerance: float
    previous: Tensor
    current: Tensor  # written layer by layer, as a cache is; before that, nobody

    @staticmethod
    def of(reuse_tolerance: float, previous: Tensor) -> CoresetState:
        return CoresetState(reuse_tolerance, previous, torch.zeros_like(previous))

    def previous_coresets(self, ordinal: int) -> PreviousCoresets:
        """Those of a layer, by its place among the layers that route."""
        return PreviousCoresets(self.reuse_tolerance, self.previous[ordinal])

    def set_current(self, ordinal: int, reuse: CoresetReuse) -> None:
        self.current[ordinal] = reuse.coresets


@dataclass(frozen=True)
class ForwardContext:
    """One forward: where it looks, what it may use, who watches, and what it must answer.

    Without a cache the window is all there is: it starts at 0 and keys are not kept.
    """

    window: Window
    cache: KVCache | None
    policy: Policy
    recorder: Recorder
    logits_indices: Tensor | None = (
        None  # [P] int64 into B*width: positions to make logits for; None = all
    )
    voters: Tensor | None = None  # [B, width] weight of each position's vote; None = everybody
    progress: DecodeProgress | None = None  # for policies that choose who votes
    forward: tuple[int, ...] = ()  # decode-forward number of each row
    coresets: CoresetState | None = None  # where a block keeps its own from step to step
    embeddings: Tensor | None = None  # [B, width, H], in place of the tokens' embeddings
