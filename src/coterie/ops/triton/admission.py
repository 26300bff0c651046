"""The experts that a router keeps for a token before top-k: some groups, or those of its block.

A block of LLaDA2.2 admits the experts with the best score of any of its tokens. ``admit_kernel``
has a program for each block. See ``election`` for the column layout.
"""

# Python's types do not describe the Triton language.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from coterie.ops.triton.sort_keys import LOWEST_KEY, first_candidates, float_to_key, key_to_float


@triton.jit(do_not_specialize=["tokens"])
def admit_kernel(
    logits,  # [S, N, E] fp32
    bias,  # [E] fp32, or None
    starts,  # [S] int64: the position of each row's first token, or None: all 0
    admitted,  # out [S, blocks, E] int32: 1 or 0; blocks without a token admit none
    tokens,  # N
    SIGMOID: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,  # positions of a block
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,  # EXPERTS, padded
    TOKENS: tl.constexpr,  # read at once
):
    block, row = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    valid_column = column < EXPERTS
    first = block * BLOCK - block_offset(starts, row, BLOCK)
    best = tl.full((COLUMNS,), LOWEST_KEY, tl.int32)
    count = block * 0
    for begin in range(0, BLOCK, TOKENS):
        index = begin + tl.arange(0, TOKENS)
        token = first + index
        valid_token = (index < BLOCK) & (token >= 0) & (token < tokens)
        offset = (row * tokens + token)[:, None] * EXPERTS + column[None, :]
        z = tl.load(logits + offset, mask=valid_token[:, None] & valid_column[None, :], other=0.0)
        finite = is_finite(z)
        c = activation(tl.where(valid_column[None, :], z, float("-inf")), SIGMOID)
        if bias is not None:
            c = c + tl.load(bias + column, mask=valid_column, other=0.0)[None, :]
        votes = (valid_token & finite)[:, None] & valid_column[None, :]
        best = tl.maximum(best, tl.max(tl.where(votes, float_to_key(c), LOWEST_KEY), axis=0))
        count += tl.sum(valid_token.to(tl.int32), axis=0)
    order = tl.sort(best, descending=True)
    selected = first_candidates(best, valid_column, CAPACITY, order, column) & (count > 0)
    target = (row * tl.num_programs(0) + block) * EXPERTS + column
    tl.store(admitted + target, selected.to(tl.int32), mask=valid_column)


@triton.jit
def block_offset(starts, row, BLOCK: tl.constexpr):
    """The position of a row's first token inside its block."""
    offset = row * 0
    if starts is not None:
        offset = (tl.load(starts + row) % BLOCK).to(tl.int32)
    return offset


@triton.jit
def is_finite(z):
    """[tokens]: whether all of a token's logits are numbers."""
    non_finite = ((z.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
    return tl.max(non_finite, axis=1) == 0


@triton.jit
def activation(z, SIGMOID: tl.constexpr):
    """p of logits [.., COLUMNS], which are -inf in padding columns."""
    if SIGMOID:
        exp_z = tl.exp(-tl.abs(z))
        return tl.div_rn(tl.where(z >= 0, 1.0, exp_z), 1.0 + exp_z)
    exps = tl.exp(z - tl.max(z, axis=1)[:, None])
    return tl.div_rn(exps, tl.broadcast_to(tl.sum(exps, axis=1)[:, None], exps.shape))


@triton.jit
def dropped_groups(
    key,
    TOPK_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
):
    """Mask [tokens, COLUMNS] of dropped groups: all but the TOPK_GROUPS with the largest score.

    A group's score is the sum of its two best scores.
    """
    keys = tl.reshape(key, (TOKENS, PADDED_GROUPS, PADDED_SIZE))
    best = tl.max(keys, axis=2)
    total = key_to_float(best)
    if GROUP_SIZE > 1:
        column = tl.arange(0, PADDED_SIZE)[None, None, :]
        best_column = tl.min(tl.where(keys == best[:, :, None], column, PADDED_SIZE), axis=2)
        total += key_to_float(
            tl.max(tl.where(column == best_column[:, :, None], LOWEST_KEY, keys), axis=2)
        )
    # Padding groups rank below all others.
    score = tl.where(best == LOWEST_KEY, LOWEST_KEY, float_to_key(tl.where(total == 0, 0.0, total)))
    group = tl.arange(0, PADDED_GROUPS)
    score_a, score_b = score[:, :, None], score[:, None, :]
    lower_index = (group[None, :] < group[:, None])[None, :, :]
    ranked_above = (score_b > score_a) | ((score_b == score_a) & lower_index)
    dropped = tl.sum(ranked_above.to(tl.int32), axis=2) >= TOPK_GROUPS
    expanded = tl.broadcast_to(dropped[:, :, None], (TOKENS, PADDED_GROUPS, PADDED_SIZE))
    return tl.reshape(expanded.to(tl.int32), (TOKENS, PADDED_GROUPS * PADDED_SIZE)) != 0
