"""Who votes, in one launch: a program for each row."""

# Kernels are in the language of Triton, which types of Python do not describe.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.ops.triton.launch import launch, power_of_two


def voices(asked: Tensor | None, narrowing: Tensor | None, *, opposite: bool = False) -> Tensor:
    """See ``ops.voices``."""
    known = asked if narrowing is None else narrowing
    assert known is not None
    rows, tokens = known.shape
    voice = known.new_empty((rows, tokens), dtype=torch.float32)
    launch(
        _hear,
        (rows,),
        _plain(asked),
        _plain(narrowing),
        voice,
        tokens,
        OPPOSITE=opposite,
        TOKENS=power_of_two(tokens),
        num_warps=4 if tokens > 128 else 1,
    )
    return voice


def _plain(values: Tensor | None) -> Tensor | None:
    if values is None:
        return None
    return (values.view(torch.uint8) if values.dtype == torch.bool else values).contiguous()


@triton.jit(do_not_specialize=["tokens"])
def _hear(
    asked,  # [S, N] of any type, or None
    narrowing,  # the same
    voice,  # out [S, N] fp32
    tokens,
    OPPOSITE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    at = tl.arange(0, TOKENS)
    real = at < tokens
    line = tl.program_id(0) * tokens + at
    told = tl.where(real, 1.0, 0.0)
    allowed = told
    if asked is not None:
        told = tl.load(asked + line, mask=real, other=0).to(tl.float32)
        allowed = tl.where(tl.max(told, axis=0) > 0, told, allowed)
    if narrowing is not None:
        part = tl.load(narrowing + line, mask=real, other=0).to(tl.float32)
        if OPPOSITE:
            part = 1.0 - part
        narrowed = tl.where(real, told * part, 0.0)
        allowed = tl.where(tl.max(narrowed, axis=0) > 0, narrowed, allowed)
    tl.store(voice + line, allowed, mask=real)
