"""Vote weights of all tokens, in one launch with a program per row."""

# Python's types do not describe the Triton language.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.ops.triton.launch import launch, next_power_of_two


def vote_weights(
    voters: Tensor | None, voter_filter: Tensor | None, *, invert_filter: bool = False
) -> Tensor:
    """See ``ops.vote_weights``."""
    template = voters if voter_filter is None else voter_filter
    assert template is not None
    rows, tokens = template.shape
    weights = template.new_empty((rows, tokens), dtype=torch.float32)
    launch(
        _vote_weights_kernel,
        (rows,),
        _as_bytes(voters),
        _as_bytes(voter_filter),
        weights,
        tokens,
        INVERT_FILTER=invert_filter,
        TOKENS=next_power_of_two(tokens),
        num_warps=4 if tokens > 128 else 1,
    )
    return weights


def _as_bytes(values: Tensor | None) -> Tensor | None:
    if values is None:
        return None
    return (values.view(torch.uint8) if values.dtype == torch.bool else values).contiguous()


@triton.jit(do_not_specialize=["tokens"])
def _vote_weights_kernel(
    voters,  # [S, N] of any dtype, or None
    voter_filter,  # [S, N] of any dtype, or None
    out,  # output [S, N] fp32
    tokens,
    INVERT_FILTER: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.arange(0, TOKENS)
    valid = token < tokens
    index = tl.program_id(0) * tokens + token
    weights = tl.where(valid, 1.0, 0.0)
    result = weights
    if voters is not None:
        weights = tl.load(voters + index, mask=valid, other=0).to(tl.float32)
        result = tl.where(tl.max(weights, axis=0) > 0, weights, result)
    if voter_filter is not None:
        filter_weights = tl.load(voter_filter + index, mask=valid, other=0).to(tl.float32)
        if INVERT_FILTER:
            filter_weights = 1.0 - filter_weights
        filtered = tl.where(valid, weights * filter_weights, 0.0)
        result = tl.where(tl.max(filtered, axis=0) > 0, filtered, result)
    tl.store(out + index, result, mask=valid)
