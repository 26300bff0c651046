"""One row's tokens: a prompt that stands, and masks that fill up block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Positions ``start .. stop`` that are unmasked together; the first may begin in the prompt."""

    index: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


class Canvas:
    """The tokens of one row, on the host. Mutable: filling it is what decoding does."""

    def __init__(self, prompt: Sequence[int], length: int, mask: int) -> None:
        self.prompt = len(prompt)
        self.mask = mask
        self.tokens = torch.full((length,), mask, dtype=torch.int64)
        self.tokens[: self.prompt] = torch.tensor(prompt, dtype=torch.int64)
        self.confidence = torch.zeros(length)  # of the token that stands, or was last proposed
        self.confidence[: self.prompt] = 1.0

    @property
    def length(self) -> int:
        return self.tokens.shape[0]

    def masked(self, start: int, stop: int) -> Tensor:
        """Bool [stop - start]."""
        return self.tokens[start:stop] == self.mask

    def unmasked(self, start: int, stop: int) -> bool:
        return not bool(self.masked(start, stop).any())

    def answered(self, start: int, stop: int) -> Tensor:
        """Which positions lie after the prompt and hold a token, bool [stop - start]."""
        ours = torch.arange(start, stop) >= self.prompt
        return ours & ~self.masked(start, stop)

    def write(self, block: Block, where: Tensor, ids: Tensor) -> None:
        """Put ids [width] at the block's positions ``where`` (bool [width])."""
        span = self.tokens[block.start : block.stop]
        span[where] = ids[where]


def lay_out(prompt: int, new: int, width: int, *, aligned: bool, whole: bool) -> tuple[Block, ...]:
    """The blocks that hold ``new`` tokens after ``prompt``.

    ``aligned``: block borders are multiples of the width, so the first block may begin in the
    prompt; else the first block begins at the prompt's end. ``whole``: the last block is not cut
    off at the last new token.
    """
    first = prompt // width * width if aligned else prompt
    end = prompt + new
    starts = range(first, end, width)
    stops = (start + width if whole else min(start + width, end) for start in starts)
    return tuple(Block(i, a, b) for i, (a, b) in enumerate(zip(starts, stops, strict=True)))
