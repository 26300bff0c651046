"""Coresets that last: the steps of a block keep one, and leave it when it has lost its votes."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.values import Incumbents, Settled


def persisted(before: Tensor, fresh: Tensor, votes: Tensor, *, drift: float) -> Tensor:
    """Mask [S, E]: ``before`` where it still holds 1 - ``drift`` of the votes [S, E] that the
    ``fresh`` coreset holds, else ``fresh``.

    At drift 0 it moves as soon as another holds more votes.
    """
    held, best = _held(before, votes), _held(fresh, votes)
    return before.where(held >= (1 - drift) * best, fresh)


def settle(incumbents: Incumbents, fresh: Tensor, votes: Tensor) -> Settled:
    """``persisted`` for rows that had a coreset in the step before, and ``fresh`` for the others;
    with what came of it. Nobody waits for the device."""
    before = incumbents.coresets
    held, best = _held(before, votes), _held(fresh, votes)
    kept = before.any(-1, keepdim=True) & (held >= (1 - incumbents.drift) * best)
    lost = (1 - held / best.where(best > 0, 1.0)).clamp(min=0)
    lost = lost.masked_fill(~kept | (best <= 0), 0.0)
    return Settled(before.where(kept, fresh), kept.squeeze(-1), lost.squeeze(-1))


def _held(coresets: Tensor, votes: Tensor) -> Tensor:
    """[S, 1] fp64."""
    return (votes.to(torch.float64) * coresets).sum(-1, keepdim=True)
