"""The inputs of a forward pass besides tokens and weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.model.cache import KVCache
from coterie.telemetry import Recorder
from coterie.values import CoresetReuse, DecodeProgress, Policy, PreviousCoresets, Window


@dataclass(frozen=True)
class CoresetState:
    """Coresets of the previous and the current step of a block: [MoE layers, B, E] bool.

    A row without a previous coreset, all False, elects a new one.
    """

    reuse_tolerance: float
    previous: Tensor
    current: Tensor  # written layer by layer; all False before

    @staticmethod
    def of(reuse_tolerance: float, previous: Tensor) -> CoresetState:
        return CoresetState(reuse_tolerance, previous, torch.zeros_like(previous))

    def previous_coresets(self, moe_index: int) -> PreviousCoresets:
        """The previous coresets of a layer; ``moe_index`` counts MoE layers."""
        return PreviousCoresets(self.reuse_tolerance, self.previous[moe_index])

    def set_current(self, moe_index: int, reuse: CoresetReuse) -> None:
        self.current[moe_index] = reuse.coresets


@dataclass(frozen=True)
class ForwardContext:
    """The window, cache, policy, recorder and requested logits of one forward.

    Without a cache, the window starts at 0 and its keys are not stored.
    """

    window: Window
    cache: KVCache | None
    policy: Policy
    recorder: Recorder = field(default_factory=Recorder)
    committed: int = 0  # the first positions of each row: a finished block
    commit_policy: Policy | None = None  # routes these
    logits_indices: Tensor | None = None  # [P] int64 into B * width: where to compute logits
    voters: Tensor | None = None  # [B, width] weight of each position's vote; None = all 1
    progress: DecodeProgress | None = None  # for policies that filter voters
    forward: tuple[int, ...] = ()  # decode-forward number of each row
    coresets: CoresetState | None = None  # for policies that reuse coresets between steps
    embeddings: Tensor | None = None  # [B, width, H], replaces the tokens' embeddings
    expected: Tensor | None = None  # [B, width, H], expected embedding of the last step's logits
    encodes: bool = False  # the pass writes the keys of final tokens; its logits are not read
