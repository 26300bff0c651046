"""Coresets that last: the steps of a block keep one, and leave it when it has lost its votes."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.values import CoresetReuse, PreviousCoresets


def reuse_masks(
    previous: Tensor, fresh: Tensor, votes: Tensor, *, reuse_tolerance: float
) -> Tensor:
    """Mask [S, E]: ``before`` where it still holds 1 - ``drift`` of the votes [S, E] that the
    ``fresh`` coreset holds, else ``fresh``.

    At drift 0 it moves as soon as another holds more votes.
    """
    previous_votes, fresh_votes = _coreset_votes(previous, votes), _coreset_votes(fresh, votes)
    return previous.where(previous_votes >= (1 - reuse_tolerance) * fresh_votes, fresh)


def reuse_coresets(
    previous_coresets: PreviousCoresets, fresh: Tensor, votes: Tensor
) -> CoresetReuse:
    """``persisted`` for rows that had a coreset in the step before, and ``fresh`` for the others;
    with what came of it. Nobody waits for the device."""
    previous = previous_coresets.coresets
    previous_votes, fresh_votes = _coreset_votes(previous, votes), _coreset_votes(fresh, votes)
    reused = previous.any(-1, keepdim=True) & (
        previous_votes >= (1 - previous_coresets.reuse_tolerance) * fresh_votes
    )
    lost_share = (1 - previous_votes / fresh_votes.where(fresh_votes > 0, 1.0)).clamp(min=0)
    lost_share = lost_share.masked_fill(~reused | (fresh_votes <= 0), 0.0)
    return CoresetReuse(previous.where(reused, fresh), reused.squeeze(-1), lost_share.squeeze(-1))


def _coreset_votes(coresets: Tensor, votes: Tensor) -> Tensor:
    """[S, 1] fp64."""
    return (votes.to(torch.float64) * coresets).sum(-1, keepdim=True)
