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

SHARE = 2**16  # what each token's vote is split into
VOICE = 2**20  # units of a token's say
DOWN = 2**28  # takes VOICE * SHARE**2 to 2**24: a whole vote's gain is 2**40, the unit of votes
FIRST = 2.0**52  # above any gain


@dataclass(frozen=True)
class Favour:
    """Who is in fast memory, bool [E] or [S, E], and what that counts.

    Their gains are taken as 1 + ``lam`` times as much, as long as what all seats have lost by it is
    at most ``eps`` of what they could have gained.
    """

    resident: Tensor
    lam: float
    eps: float


def seats(
    ballots: Tensor,
    voice: Tensor,
    first: Tensor,
    *,
    most: int,
    k: int,
    worth: float,
    favour: Favour | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts [S, m] in the order they are seated, and the gain [S, m] int64 of each, m <= most.

    ballots [S, N, E] >= 0, of any sum; voice [S, N]. Those of ``first`` [S, E] come before all
    others; from there on gains never rise, unless somebody is favoured: then these are gains as
    they were taken. On a CPU the walk ends when nobody's gain is ``worth`` it (in units of 2**-40)
    in any row, but not before k seats.
    """
    split = shares(ballots)
    say = (voice.double() * VOICE).round()
    lacking = torch.full_like(say, SHARE)  # [S, N]: the part of each vote that is not seated
    seated = torch.zeros_like(first)
    loss = Loss.none(first, favour)
    order, gains = [], []
    for place in range(most):
        weight = torch.floor(say * lacking * lacking / DOWN)
        gain = (weight.unsqueeze(1) @ split).squeeze(1).masked_fill(seated, -1.0)  # [S, E]
        waiting = first & ~seated
        chosen, taken, loss = loss.choose(gain, waiting)
        if place >= k and _nobody(taken.amax(-1, keepdim=True) < worth, waiting):
            break
        order.append(chosen)
        gains.append(taken.gather(-1, chosen))
        seated = seated.scatter(-1, chosen, True)
        given = split.gather(-1, chosen.unsqueeze(1).expand(*split.shape[:2], 1))
        lacking = lacking - given.squeeze(-1)
    return torch.cat(order, dim=-1), torch.cat(gains, dim=-1).to(torch.int64)


def shares(ballots: Tensor) -> Tensor:
    """[S, N, E]: each ballot as parts of SHARE, rounded down; nothing where it is empty."""
    units = (ballots.double() * SHARE).round()
    return torch.floor(units * SHARE / units.sum(-1, keepdim=True).clamp(min=1))


@dataclass(frozen=True)
class Loss:
    """Who is seated next, and what favour has cost so far; both [S, 1], in units of gain."""

    favour: Favour | None
    could: Tensor  # the best gains that there were, added up
    lost: Tensor  # of these, what was not taken

    @staticmethod
    def none(first: Tensor, favour: Favour | None) -> Loss:
        nothing = torch.zeros(len(first), 1, dtype=torch.float64, device=first.device)
        return Loss(favour, nothing, nothing)

    def choose(self, gain: Tensor, waiting: Tensor) -> tuple[Tensor, Tensor, Loss]:
        """The next one [S, 1] of gains [S, E], these gains as they are taken, and the loss then."""
        plain = (gain + FIRST * waiting).argmax(-1, keepdim=True)  # of ties, the lower
        if self.favour is None:
            return plain, gain, self
        scale = 1 + self.favour.lam
        taken = gain.where(~self.favour.resident, gain * scale)
        # Over the scale, for nobody's may pass FIRST.
        liked = (taken / scale + FIRST * waiting).argmax(-1, keepdim=True)
        best = gain.gather(-1, plain)
        could = self.could + best
        lost = self.lost + best - gain.gather(-1, liked)
        bearable = lost <= self.favour.eps * could
        return (
            liked.where(bearable, plain),
            taken,
            Loss(self.favour, could, lost.where(bearable, self.lost)),
        )


def _nobody(poor: Tensor, waiting: Tensor) -> bool:
    """Whether the walk may end; an accelerator is not asked, for that would stall it."""
    return poor.device.type == "cpu" and bool(poor.all()) and not bool(waiting.any())
