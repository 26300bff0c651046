"""The tokens of one request: the prompt, and masks that are filled block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Positions ``start .. stop`` that are unmasked together; the first block may start in the
    prompt."""

    index: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start

    def contains(self, positions: Tensor) -> Tensor:
        """Which of the positions [n] are in the block, bool [n]."""
        return (positions >= self.start) & (positions < self.stop)


class Canvas:
    """The tokens of one row, on the host. Mutable: decoding fills it."""

    def __init__(self, prompt_ids: Sequence[int], length: int, mask_id: int) -> None:
        self.prompt_length = len(prompt_ids)
        self.mask_id = mask_id
        self.tokens = torch.full((length,), mask_id, dtype=torch.int64)
        self.tokens[: self.prompt_length] = torch.tensor(prompt_ids, dtype=torch.int64)
        self.confidence = torch.zeros(length)  # of the written token, or of the last proposal
        self.confidence[: self.prompt_length] = 1.0

    @property
    def length(self) -> int:
        return self.tokens.shape[0]

    def is_masked(self, start: int, stop: int) -> Tensor:
        """Which positions hold the mask, bool [stop - start]."""
        return self.tokens[start:stop] == self.mask_id

    def is_filled(self, start: int, stop: int) -> bool:
        return not bool(self.is_masked(start, stop).any())

    def is_generated(self, start: int, stop: int) -> Tensor:
        """Which positions after the prompt hold a token, bool [stop - start]."""
        after_prompt = torch.arange(start, stop) >= self.prompt_length
        return after_prompt & ~self.is_masked(start, stop)

    def write(self, block: Block, write_mask: Tensor, ids: Tensor) -> None:
        """Writes ids [width] at the positions of the block in ``write_mask`` (bool [width])."""
        span = self.tokens[block.start : block.stop]
        span[write_mask] = ids[write_mask]


def split_into_blocks(
    prompt_length: int, max_new_tokens: int, block_length: int, *, aligned: bool, whole_blocks: bool
) -> tuple[Block, ...]:
    """The blocks that hold ``max_new_tokens`` after the prompt.

    ``aligned``: block borders are multiples of ``block_length``, so the first block may start in
    the prompt; otherwise it starts after the prompt. ``whole_blocks``: the last block is not cut
    off at the last new token.
    """
    first = prompt_length // block_length * block_length if aligned else prompt_length
    end = prompt_length + max_new_tokens
    starts = range(first, end, block_length)
    stops = (
        start + block_length if whole_blocks else min(start + block_length, end) for start in starts
    )
    return tuple(Block(i, a, b) for i, (a, b) in enumerate(zip(starts, stops, strict=True)))
