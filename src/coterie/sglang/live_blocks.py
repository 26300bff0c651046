"""The blocks of a forward in SGLang: which rows the policy routes, and which tokens vote.

Shapes: S requests, N tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.values import DecodeProgress

NO_REQUEST = torch.iinfo(torch.int64).max
"""The length of a padded row: all of its positions count as fixed."""


@dataclass(frozen=True)
class BlockRules:
    """What a server does with each kind of block."""

    mask_id: int
    route_commits: bool = False  # a block without masks, which only writes keys or is edited
    route_prompts: bool = False
    prompt_votes: bool = False


@dataclass(frozen=True)
class LiveBlocks:
    """The current blocks of a forward."""

    masked: Tensor  # [S, N] bool: a position to fill
    voters: Tensor  # [S, N] fp32: 1 for a token that votes
    routed: Tensor  # [S] bool: rows under the policy; the others route as the unmodified model

    @staticmethod
    def of(
        tokens: Tensor, positions: Tensor, fixed_lengths: Tensor, rules: BlockRules
    ) -> LiveBlocks:
        """From tokens and positions [S, N], and the fixed tokens [S] of each request: prompt and
        finished blocks."""
        generated = positions >= fixed_lengths.unsqueeze(-1)
        masked = generated & (tokens == rules.mask_id)
        is_current = generated.any(-1)
        is_decoded = is_current if rules.route_commits else masked.any(-1)
        can_vote = torch.ones_like(generated) if rules.prompt_votes else generated
        voters = (can_vote & is_decoded.unsqueeze(-1)).float()
        routed = is_decoded | ~is_current if rules.route_prompts else is_decoded
        return LiveBlocks(masked, voters, routed)

    @property
    def progress(self) -> DecodeProgress:
        return DecodeProgress(masked=self.masked)
