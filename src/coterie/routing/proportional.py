"""Proportional election: one expert at a time; tokens with elected experts weigh less.

The tokens of a block differ: of 32, twenty may vote for the same experts. In a plain election these
votes decide every expert, and an unusual token gets none of its own. Here a token's weight is the
square of the share of its vote that is not elected yet, similar to the rules of Thiele and Phragmen
(1895; Lackner and Skowron, "Multi-Winner Voting with Approval Preferences", arXiv 2007.01795).

All numbers are integers below 2**53 in float64, so sums are exact in any order and on any device.
(The bonus of resident experts multiplies gains by one number, which every device rounds alike.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VOTE_PARTS = 2**16  # parts of each token's vote
WEIGHT_UNITS = 2**20  # a vote weight of 1 in integer units
GAIN_DIVISOR = 2**28  # makes the gain of a whole vote 2**40, the unit of votes
PROTECTED_BONUS = 2.0**52  # above any gain


@dataclass(frozen=True)
class ResidencyBonus:
    """A bonus for experts in fast memory.

    Their gains count 1 + ``factor`` times, as long as the gain lost by that, over all elected
    experts, is at most ``max_vote_loss`` of the best possible gain.
    """

    resident: Tensor  # [E] or [S, E] bool
    factor: float
    max_vote_loss: float


def elect_sequentially(
    ballots: Tensor,
    vote_weight: Tensor,
    protected: Tensor,
    *,
    max_steps: int,
    k: int,
    min_gain: float,
    bonus: ResidencyBonus | None = None,
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts [S, m] in the order of their election and the gain [S, m] int64 of each.

    m <= ``max_steps``. ballots [S, N, E] >= 0 of any sum; vote_weight [S, N]. ``protected`` [S, E]
    are elected first. After these, gains never rise, except with a ``bonus``: then they include it.
    ``excluded`` experts [S, E], without ballots, come last.
    On a CPU the election stops after k experts when every gain is below ``min_gain`` (in units of
    2**-40) in all rows.
    """
    vote_parts = split_votes(ballots)
    weight_units = (vote_weight.double() * WEIGHT_UNITS).round()
    unelected_parts = torch.full_like(weight_units, VOTE_PARTS)  # [S, N], of each token's vote
    elected = torch.zeros_like(protected)
    loss = BonusLoss.zero(protected, bonus)
    order, gains = [], []
    for step in range(max_steps):
        weight = torch.floor(weight_units * unelected_parts * unelected_parts / GAIN_DIVISOR)
        gain = (weight.unsqueeze(1) @ vote_parts).squeeze(1)  # [S, E]
        gain = gain if excluded is None else gain.masked_fill(excluded, -0.5)
        gain = gain.masked_fill(elected, -1.0)
        pending = protected & ~elected
        expert, adjusted_gain, loss = loss.next_expert(gain, pending)
        if step >= k and _can_stop(adjusted_gain.amax(-1, keepdim=True) < min_gain, pending):
            break
        order.append(expert)
        gains.append(adjusted_gain.gather(-1, expert))
        elected = elected.scatter(-1, expert, True)
        expert_parts = vote_parts.gather(-1, expert.unsqueeze(1).expand(*vote_parts.shape[:2], 1))
        unelected_parts = unelected_parts - expert_parts.squeeze(-1)
    return torch.cat(order, dim=-1), torch.cat(gains, dim=-1).to(torch.int64)


def split_votes(ballots: Tensor) -> Tensor:
    """[S, N, E]: each ballot in ``VOTE_PARTS`` parts, rounded down; 0 for an empty ballot."""
    units = (ballots.double() * VOTE_PARTS).round()
    return torch.floor(units * VOTE_PARTS / units.sum(-1, keepdim=True).clamp(min=1))


@dataclass(frozen=True)
class BonusLoss:
    """The gain that the bonus has cost so far. Tensors are [S, 1], in units of gain."""

    bonus: ResidencyBonus | None
    best_gain: Tensor  # the sum of the best gain of each step
    lost_gain: Tensor  # the part of it that the elected experts did not gain

    @staticmethod
    def zero(protected: Tensor, bonus: ResidencyBonus | None) -> BonusLoss:
        zeros = torch.zeros(len(protected), 1, dtype=torch.float64, device=protected.device)
        return BonusLoss(bonus, zeros, zeros)

    def next_expert(self, gain: Tensor, pending: Tensor) -> tuple[Tensor, Tensor, BonusLoss]:
        """The next expert [S, 1], the gains [S, E] with the bonus, and the loss after this step."""
        # Ties go to the lower index.
        best_expert = (gain + PROTECTED_BONUS * pending).argmax(-1, keepdim=True)
        if self.bonus is None:
            return best_expert, gain, self
        scale = 1 + self.bonus.factor
        adjusted_gain = gain.where(~self.bonus.resident, gain * scale)
        # Divided by the scale, so that no gain exceeds PROTECTED_BONUS.
        bonus_expert = (adjusted_gain / scale + PROTECTED_BONUS * pending).argmax(-1, keepdim=True)
        step_best = gain.gather(-1, best_expert)
        best_gain = self.best_gain + step_best
        lost_gain = self.lost_gain + step_best - gain.gather(-1, bonus_expert)
        within_limit = lost_gain <= self.bonus.max_vote_loss * best_gain
        return (
            bonus_expert.where(within_limit, best_expert),
            adjusted_gain,
            BonusLoss(self.bonus, best_gain, lost_gain.where(within_limit, self.lost_gain)),
        )


def _can_stop(too_low: Tensor, pending: Tensor) -> bool:
    """Whether the election may stop; on a GPU this is not checked, because it would wait."""
    return too_low.device.type == "cpu" and bool(too_low.all()) and not bool(pending.any())
