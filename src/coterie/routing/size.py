"""How large a coreset is: so many, a share, the fewest that hold enough votes, or a union."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coterie.routing.router import VOTE_UNIT


class CoresetSize(Protocol):
    """How many experts to elect."""

    def count(self, votes: Tensor, k: int) -> Tensor:
        """[S, 1] or a scalar, from votes [S, m] in the order in which experts are taken."""
        ...

    def search_limits(self, experts: int) -> tuple[int, float]:
        """How far a walk down the votes needs to go: so many experts, and down to such votes."""
        ...


@dataclass(frozen=True)
class Fraction:
    """The floor(beta * E) experts with most votes, at least one."""

    beta: float

    def count(self, votes: Tensor, k: int) -> Tensor:
        return torch.full((), self.count_of(votes.shape[-1]), device=votes.device)

    def search_limits(self, experts: int) -> tuple[int, float]:
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
    """The fewest experts that hold the share ``tau`` of all votes, at least ``least`` (None: k)."""

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
    """Every expert with at least ``price`` votes, a full vote being 1; at least k experts."""

    price: float

    def count(self, votes: Tensor, k: int) -> Tensor:
        position = torch.arange(1, votes.shape[-1] + 1, device=votes.device)
        # In float64: compared with a Python number, whole ones would be rounded to float32.
        qualifies = votes.double() >= self.price * VOTE_UNIT
        # Those behind a protected expert with few votes may have more: up to the last worthy one.
        return (qualifies * position).amax(dim=-1, keepdim=True).clamp(min=k)

    def search_limits(self, experts: int) -> tuple[int, float]:
        return experts, self.price * VOTE_UNIT


@dataclass(frozen=True)
class Union:
    """Every voter's first ``k`` own experts (DES, Eq. 5); nothing is counted."""

    k: int
