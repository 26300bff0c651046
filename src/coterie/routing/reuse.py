"""Coreset reuse: the steps of a block keep one coreset until it loses too many votes."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.values import CoresetReuse, PreviousCoresets


def reuse_masks(
    previous: Tensor, fresh: Tensor, votes: Tensor, *, reuse_tolerance: float
) -> Tensor:
    """Mask [S, E]: ``previous`` if it holds 1 - ``reuse_tolerance`` of the votes [S, E] of the
    ``fresh`` coreset, else ``fresh``."""
    previous_votes, fresh_votes = _coreset_votes(previous, votes), _coreset_votes(fresh, votes)
    return previous.where(previous_votes >= (1 - reuse_tolerance) * fresh_votes, fresh)


def reuse_coresets(
    previous_coresets: PreviousCoresets, fresh: Tensor, votes: Tensor
) -> CoresetReuse:
    """``reuse_masks`` for rows with a previous coreset, ``fresh`` for other rows.

    Nothing waits for the device.
    """
    previous = previous_coresets.coresets
    previous_votes, fresh_votes = _coreset_votes(previous, votes), _coreset_votes(fresh, votes)
    reused = previous.any(-1, keepdim=True) & (
        previous_votes >= (1 - previous_coresets.reuse_tolerance) * fresh_votes
    )
    vote_loss = (1 - previous_votes / fresh_votes.where(fresh_votes > 0, 1.0)).clamp(min=0)
    vote_loss = vote_loss.masked_fill(~reused | (fresh_votes <= 0), 0.0)
    return CoresetReuse(previous.where(reused, fresh), reused.squeeze(-1), vote_loss.squeeze(-1))


def _coreset_votes(coresets: Tensor, votes: Tensor) -> Tensor:
    """The votes of each coreset, [S, 1] fp64."""
    return (votes.to(torch.float64) * coresets).sum(-1, keepdim=True)
