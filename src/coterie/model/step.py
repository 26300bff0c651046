"""What changes from one forward to the next, in one value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coterie.model.cache import Cache
from coterie.telemetry import Recorder
from coterie.values import Policy, Progress, Window


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
    embeddings: Tensor | None = None  # [B, width, H], in place of the tokens' embeddings
