"""Coresets that last: the steps of a block keep one, and leave it when it has lost its votes."""

from __future__ import annotations

from torch import Tensor


def persisted(before: Tensor, fresh: Tensor, votes: Tensor, *, drift: float) -> Tensor:
    """Mask [S, E]: ``before`` where it still holds 1 - ``drift`` of the votes [S, E] that the
    ``fresh`` coreset holds, else ``fresh``.

    At drift 0 it moves as soon as another holds more votes.
    """
    held, best = ((votes.double() * mask).sum(-1, keepdim=True) for mask in (before, fresh))
    return before.where(held >= (1 - drift) * best, fresh)
