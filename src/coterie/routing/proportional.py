"""Proportional election: experts are seated one by one, and a token that has its own weighs less.

The block's tokens are not alike: of 32, twenty may want the same experts. Counted once, their votes
take every seat, and what an odd token needs is lost. Here a token's weight falls with the square of
the share of its vote that is seated, as weights fall in Thiele's and Phragmen's rules of 1895 (see
Lackner and Skowron, "Multi-Winner Voting with Approval Preferences", arXiv 2007.01795).

All numbers are whole and no sum passes 2**53, so float64 holds them: exact in any order, on any
device, and the same as in integers. (Where residents are favoured, their gains are multiplied by
one number, which every device rounds alike.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VOTE_PARTS = 2**16  # what each token's vote is split into
WEIGHT_UNITS = 2**20  # units of a token's say
GAIN_DIVISOR = (
    2**28
)  # takes VOICE * SHARE**2 to 2**24: a whole vote's gain is 2**40, the unit of votes
PROTECTED_BONUS = 2.0**52  # above any gain


@dataclass(frozen=True)
class ResidencyBonus:
    """Who is in fast memory, bool [E] or [S, E], and what that counts.

    Their gains are taken as 1 + ``lam`` times as much, as long as what all seats have lost by it is
    at most ``eps`` of what they could have gained.
    """

    resident: Tensor
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
) -> tuple[Tensor, Tensor]:
    """Experts [S, m] in the order they are seated, and the gain [S, m] int64 of each, m <= most.

    ballots [S, N, E] >= 0, of any sum; voice [S, N]. Those of ``first`` [S, E] come before all
    others; from there on gains never rise, unless somebody is favoured: then these are gains as
    they were taken. On a CPU the walk ends when nobody's gain is ``worth`` it (in units of 2**-40)
    in any row, but not before k seats.
    """
    vote_parts = split_votes(ballots)
    weight_units = (vote_weight.double() * WEIGHT_UNITS).round()
    unelected_parts = torch.full_like(
        weight_units, VOTE_PARTS
    )  # [S, N]: the part of each vote that is not seated
    elected = torch.zeros_like(protected)
    loss = BonusLoss.zero(protected, bonus)
    order, gains = [], []
    for step in range(max_steps):
        weight = torch.floor(weight_units * unelected_parts * unelected_parts / GAIN_DIVISOR)
        gain = (weight.unsqueeze(1) @ vote_parts).squeeze(1).masked_fill(elected, -1.0)  # [S, E]
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
    """[S, N, E]: each ballot as parts of SHARE, rounded down; nothing where it is empty."""
    units = (ballots.double() * VOTE_PARTS).round()
    return torch.floor(units * VOTE_PARTS / units.sum(-1, keepdim=True).clamp(min=1))


@dataclass(frozen=True)
class BonusLoss:
    """Who is seated next, and what favour has cost so far; both [S, 1], in units of gain."""

    bonus: ResidencyBonus | None
    best_gain: Tensor  # the best gains that there were, added up
    lost_gain: Tensor  # of these, what was not taken

    @staticmethod
    def zero(protected: Tensor, bonus: ResidencyBonus | None) -> BonusLoss:
        zeros = torch.zeros(len(protected), 1, dtype=torch.float64, device=protected.device)
        return BonusLoss(bonus, zeros, zeros)

    def next_expert(self, gain: Tensor, pending: Tensor) -> tuple[Tensor, Tensor, BonusLoss]:
        """The next one [S, 1] of gains [S, E], these gains as they are taken, and the loss then."""
        best_expert = (gain + PROTECTED_BONUS * pending).argmax(
            -1, keepdim=True
        )  # of ties, the lower
        if self.bonus is None:
            return best_expert, gain, self
        scale = 1 + self.bonus.factor
        adjusted_gain = gain.where(~self.bonus.resident, gain * scale)
        # Over the scale, for nobody's may pass FIRST.
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
    """Whether the walk may end; an accelerator is not asked, for that would stall it."""
    return too_low.device.type == "cpu" and bool(too_low.all()) and not bool(pending.any())
