"""Corrupted inputs, and the bound of the negative log-likelihood that the logits of each give.

The mean over corruptions is an upper bound of the nats of the clean tokens, given what is before
them: of a model that fills masks in random order, or of one that removes uniform noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.values import NO_MASK


@dataclass(frozen=True)
class MaskedTokens:
    """A span of W positions, in which some of the scored tokens are masked."""

    tokens: Tensor  # [W] int64, the input
    undecided: Tensor  # [W] bool: masked
    positions: Tensor  # [n] int64: the scored ones that are masked; they need logits
    targets: Tensor  # [n] int64
    weight: float

    @staticmethod
    def draw(
        tokens: Tensor, scored: Tensor, mask_id: int, generator: torch.Generator
    ) -> MaskedTokens:
        """Masks l of the L positions ``scored`` [L]; all such sets are equally likely.

        With l uniform in 1 .. L and the weight L / l, the mean of ``nats`` is the expected nats of
        filling in a random order (LLaDA, arXiv 2502.09992, Eq. 6 and Eq. 14).
        """
        count = int(torch.randint(1, len(scored) + 1, (), generator=generator))
        order = torch.randperm(len(scored), generator=generator)
        return MaskedTokens.of(tokens, scored, scored[order[:count].sort().values], mask_id)

    @staticmethod
    def of(tokens: Tensor, scored: Tensor, masked: Tensor, mask_id: int) -> MaskedTokens:
        """Masks the positions ``masked`` [l] of ``scored`` [L]."""
        corrupted = tokens.index_fill(0, masked, mask_id)
        weight = len(scored) / len(masked)
        return MaskedTokens(corrupted, corrupted == mask_id, masked, tokens[masked], weight)

    def nats(self, logits: Tensor) -> float:
        targets = self.targets.to(logits.device)
        return self.weight * float(F.cross_entropy(logits.double(), targets, reduction="sum"))


@dataclass(frozen=True)
class NoisyTokens:
    """A span in which scored tokens are uniform noise, each with probability 1 - ``signal``."""

    tokens: Tensor  # [W] int64, the input
    undecided: Tensor  # [W] bool: a decoder would not keep it
    positions: Tensor  # [n] int64: all scored ones
    targets: Tensor  # [n] int64
    signal: float

    @staticmethod
    def draw(
        tokens: Tensor, scored: Tensor, vocabulary: int, generator: torch.Generator
    ) -> NoisyTokens:
        """The signal is uniform in 0 .. 1: noise grows linearly in time."""
        noise_level = float(torch.rand((), generator=generator))
        noise = torch.randint(vocabulary, tokens.shape, generator=generator)
        is_noise = torch.rand(tokens.shape, generator=generator) < noise_level
        is_scored = torch.zeros_like(is_noise).index_fill(0, scored, True)
        # Positions after the text are noise at every level, and are not scored.
        undecided = is_scored | (tokens == NO_MASK)
        corrupted = noise.where(is_noise & is_scored | (tokens == NO_MASK), tokens)
        return NoisyTokens(corrupted, undecided, scored, tokens[scored], 1 - noise_level)

    def nats(self, logits: Tensor) -> float:
        """The rate of relative entropy between the true and the model's reverse jumps.

        From token i to j these are x_j / (N signal) and y_j / (N signal), with x_j = q_j / q_i,
        where q_j = N signal [j = target] + 1 - signal, and y_j the mean of x_j over the model's
        targets (arXiv 2205.14987, Prop. 1 and 2). The rate is the sum over j != i of
        y_j - x_j + x_j log(x_j / y_j), over N signal. It is tight for the true posterior.
        """
        p = torch.softmax(logits.double(), dim=-1)  # [n, N]
        n, size = p.shape
        current, rows = self.tokens[self.positions].to(p.device)[:, None], torch.arange(n)
        gain = 1 + size * self.signal / (1 - self.signal)  # of a ratio if j or i is the target
        p_current, targets = p.gather(-1, current), self.targets.to(p.device)
        y = 1 + p * (gain - 1) + p_current * (1 / gain - 1)
        x = torch.where(targets[:, None] == current, 1 / gain, 1.0).expand(n, size).clone()
        x[rows, targets] = gain
        jumps = (y - x + x * (x / y).log()).scatter(-1, current, 0.0)
        return float(jumps.sum()) / (size * self.signal)


Corruption: TypeAlias = MaskedTokens | NoisyTokens
