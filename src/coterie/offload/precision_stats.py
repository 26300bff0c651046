"""How much of the votes a store with two precisions serves in each, and what that loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from coterie.offload.eviction import FloatArray, Mask


@dataclass(frozen=True)
class PrecisionErrors:
    """Relative output errors of a layer's experts for Gaussian input, [E] per precision."""

    high: FloatArray
    low: FloatArray


@dataclass  # not frozen: it accumulates
class PrecisionStats:
    """The precision in which votes were served; sums over layers and forwards.

    One layer's loss bound is the sum over used experts of vote share x relative error of the
    precision served: the total error if all errors point the same way. The sum of squares estimates
    it for errors in independent directions.
    """

    high_format: str
    low_format: str
    high_slots: int  # per layer
    low_slots: int
    errors: Mapping[int, PrecisionErrors]  # by layer; empty if unknown
    forwards: int = 0  # of one layer each
    high_share_sum: float = 0.0
    bound_sum: float = 0.0
    square_sum: float = 0.0
    promotions: int = 0

    @property
    def high_precision_share(self) -> float:
        """Mean share of the votes served in high precision."""
        return self.high_share_sum / max(1, self.forwards)

    @property
    def loss_bound(self) -> float | None:
        """Mean loss bound of a layer; None if the errors are unknown."""
        return self.bound_sum / max(1, self.forwards) if self.errors else None

    @property
    def loss_rms(self) -> float | None:
        """Root mean square error of a layer, close to the relative error of its output."""
        return math.sqrt(self.square_sum / max(1, self.forwards)) if self.errors else None

    def to_dict(self) -> dict[str, object]:
        """The statistics as JSON, under stable keys."""
        return {
            "fine": self.high_format,
            "coarse": self.low_format,
            "fine_slots": self.high_slots,
            "coarse_slots": self.low_slots,
            "votes_fine": self.high_precision_share,
            "votes_coarse": 1 - self.high_precision_share,
            "upgrades": self.promotions,
            "loss_bound": self.loss_bound,
            "loss_rms": self.loss_rms,
        }

    def record(self, layer: int, votes: FloatArray, high_mask: Mask, low_mask: Mask) -> None:
        """Add one forward of one layer; experts in neither mask were not used."""
        share = vote_shares(votes, high_mask | low_mask)
        self.forwards += 1
        self.high_share_sum += float(share[high_mask].sum())
        if (errors := self.errors.get(layer)) is not None:
            error = np.where(high_mask, errors.high, errors.low)
            self.bound_sum += float((share * error).sum())
            self.square_sum += float((share * error**2).sum())


def vote_shares(votes: FloatArray, used: Mask) -> FloatArray:
    """[E]: each used expert's share of the used experts' votes; equal shares without votes."""
    used_votes = np.where(used, votes, 0.0)
    total = used_votes.sum()
    return used_votes / total if total > 0 else used / max(1, int(np.count_nonzero(used)))
