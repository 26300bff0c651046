"""Coreset sizes: a fixed count, a share, enough votes, a minimum vote, or a union."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.routing.router import VOTE_UNIT


@dataclass(frozen=True)
class Fraction:
    """The floor(beta * E) experts with most votes, at least one."""

    beta: float

    def count(self, votes: Tensor, k: int) -> Tensor:
        """[S, 1] or a scalar, from votes [S, m] in the order in which experts are taken."""
        return torch.full((), self.count_of(votes.shape[-1]), device=votes.device)

    def search_limits(self, experts: int) -> tuple[int, float]:
        """The most experts that can be taken, and the fewest votes of one worth taking."""
        return self.count_of(experts), 0.0

    def count_of(self, experts: int) -> int:
        return max(1, math.floor(self.beta * experts + 1e-9))


@dataclass(frozen=True)
class Fixed:
    """The ``m`` experts with most votes."""

    m: int

    def count(self, votes: Tensor, k: int) -> Tensor:
        return torch.full((), min(self.m, votes.shape[-1]), device=votes.device)

    def search_limits(self, experts: int) -> tuple[int, float]:
        return min(self.m, experts), 0.0


@dataclass(frozen=True)
class Mass:
    """The fewest experts that hold the share ``tau`` of all votes.

    There are at least ``min_experts``, or k if it is None.
    """

    tau: float
    min_experts: int | None = None

    def count(self, votes: Tensor, k: int) -> Tensor:
        cumulative = votes.cumsum(dim=-1)
        needed = (cumulative < self.tau * cumulative[:, -1:].double()).sum(dim=-1, keepdim=True) + 1
        return needed.clamp(min=self.minimum(votes.shape[-1], k))

    def search_limits(self, experts: int) -> tuple[int, float]:
        return experts, 0.0

    def minimum(self, experts: int, k: int) -> int:
        return k if self.min_experts is None else min(self.min_experts, experts)


@dataclass(frozen=True)
class Priced:
    """Every expert with at least ``price`` votes (a token has one vote); at least k experts."""

    price: float

    def count(self, votes: Tensor, k: int) -> Tensor:
        position = torch.arange(1, votes.shape[-1] + 1, device=votes.device)
        # In float64: comparing int64 with a Python float rounds the integers to float32.
        qualifies = votes.double() >= self.price * VOTE_UNIT
        # A protected expert may have fewer votes than later ones: count up to the last that
        # qualifies.
        return (qualifies * position).amax(dim=-1, keepdim=True).clamp(min=k)

    def search_limits(self, experts: int) -> tuple[int, float]:
        return experts, self.price * VOTE_UNIT


CoresetSize = Fraction | Fixed | Mass | Priced
"""How many experts a coreset has."""


@dataclass(frozen=True)
class Union:
    """The first ``k`` own experts of every voter (DES, Eq. 5), without counting votes."""

    k: int
