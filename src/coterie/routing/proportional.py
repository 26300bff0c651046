"""Proportional election: experts are seated one by one, and a token that has its own weighs less.

The block's tokens are not alike: of 32, twenty may want the same experts. Counted once, their votes
take every seat, and what an odd token needs is lost. Here a token's weight falls with the square of
the share of its vote that is seated, as weights fall in Thiele's and Phragmen's rules of 1895 (see
Lackner and Skowron, "Multi-Winner Voting with Approval Preferences", arXiv 2007.01795).

All numbers are whole and no sum passes 2**53, so float64 holds them: exact in any order, on any
device, and the same as in integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 2**16  # what each token's vote is split into
VOICE = 2**20  # units of a token's say
DOWN = 2**28  # takes VOICE * SHARE**2 to 2**24: a whole vote's gain is 2**40, the unit of votes
FIRST = 2.0**52  # above any gain


def seats(
    ballots: Tensor, voice: Tensor, first: Tensor, *, most: int, k: int, worth: float
) -> tuple[Tensor, Tensor]:
    """Experts [S, m] in the order they are seated, and the gain [S, m] int64 of each, m <= most.

    ballots [S, N, E] >= 0, of any sum; voice [S, N]. Those of ``first`` [S, E] come before all
    others; from there on gains never rise. On a CPU the walk ends with the first gain below
    ``worth`` (in units of 2**-40) of every row, but not before k seats.
    """
    split = shares(ballots)
    say = (voice.double() * VOICE).round()
    lacking = torch.full_like(say, SHARE)  # [S, N]: the part of each vote that is not seated
    seated = torch.zeros_like(first)
    order, gains = [], []
    for place in range(most):
        weight = torch.floor(say * lacking * lacking / DOWN)
        gain = (weight.unsqueeze(1) @ split).squeeze(1).masked_fill(seated, -1.0)  # [S, E]
        waiting = first & ~seated
        chosen = (gain + FIRST * waiting).argmax(-1, keepdim=True)  # of ties, the lower
        gain = gain.gather(-1, chosen)
        if place >= k and _nobody(gain < worth, waiting):
            break
        order.append(chosen)
        gains.append(gain)
        seated = seated.scatter(-1, chosen, True)
        given = split.gather(-1, chosen.unsqueeze(1).expand(*split.shape[:2], 1))
        lacking = lacking - given.squeeze(-1)
    return torch.cat(order, dim=-1), torch.cat(gains, dim=-1).to(torch.int64)


def shares(ballots: Tensor) -> Tensor:
    """[S, N, E]: each ballot as parts of SHARE, rounded down; nothing where it is empty."""
    units = (ballots.double() * SHARE).round()
    return torch.floor(units * SHARE / units.sum(-1, keepdim=True).clamp(min=1))


def _nobody(poor: Tensor, waiting: Tensor) -> bool:
    """Whether the walk may end; an accelerator is not asked, for that would stall it."""
    return poor.device.type == "cpu" and bool(poor.all()) and not bool(waiting.any())
