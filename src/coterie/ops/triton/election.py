"""Routing with a coreset election, in two launches.

``vote_kernel`` has a program for each tile of a few tokens. It computes probabilities, the vanilla
top-k and the tile's votes. ``choose_kernel`` sums the votes of all tiles (in every program, since
programs cannot wait for each other), elects the coreset and selects each token's experts in it.
Votes are integers, so their sum does not depend on the order. No atomics and no zeroed memory are
needed.

Columns: groups of experts are padded to powers of two, so column ``g * PADDED_SIZE + i`` is expert
``g * GROUP_SIZE + i``; there are COLUMNS = PADDED_GROUPS * PADDED_SIZE. Between the launches,
probabilities are stored as bits; the sign bit marks experts of dropped groups.
"""

# Python's types do not describe the Triton language.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from coterie.ops.triton.admission import activation, block_offset, dropped_groups, is_finite
from coterie.ops.triton.sort_keys import (
    LOWEST_KEY,
    LOWEST_KEY64,
    double_to_key,
    first_candidates,
    float_to_key,
    key_to_double,
    key_to_float,
    topk_columns,
)

VOTE_UNIT = tl.constexpr(1099511627776.0)  # 2**40
MARGIN_FLOOR = tl.constexpr(0.0009765625)  # 2**-10
INTEGER_THRESHOLD = tl.constexpr(8388608.0)  # 2**23: from here on, fp32 holds whole numbers only


@triton.jit(do_not_specialize=["tokens", "blocks"])
def vote_kernel(
    logits,  # [S, N, E] fp32
    bias,  # [E] fp32, or None
    vote_weight,  # [S, N] fp32, or None
    starts,  # [S] int64, or None; read with ``admitted``
    admitted,  # [S, blocks, E] int32, or None: see ``admission``
    p_bits,  # out [S, N, E] int32: bits of p
    vanilla_ids,  # out [S, N, K] int64
    vote_sums,  # out [S, tiles, E] int64: votes of each tile, if VOTE
    marks,  # out [S, tiles, E] int32: whether a voter has the expert among its first MARKS
    used,  # out [E] uint8: zeroed for the next launch
    tokens,  # N
    blocks,  # of ``admitted``
    VOTE: tl.constexpr,  # "" for none
    MARKS: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,  # weights are c = p + bias, not p
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    CHOICES: tl.constexpr,  # K, padded
    KEPT: tl.constexpr,  # experts in the kept groups, or that a block admits
    BLOCK: tl.constexpr,  # positions of such a block
    TOKENS: tl.constexpr,  # per program
):
    tile, row = tl.program_id(0), tl.program_id(1)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    valid_token = token < tokens
    column = tl.arange(0, PADDED_GROUPS * PADDED_SIZE)
    expert = (column // PADDED_SIZE) * GROUP_SIZE + column % PADDED_SIZE
    valid_column = (column // PADDED_SIZE < GROUPS) & (column % PADDED_SIZE < GROUP_SIZE)
    valid = valid_token[:, None] & valid_column[None, :]
    token_index = row * tokens + token
    offset = token_index[:, None] * EXPERTS + expert[None, :]

    z = tl.load(logits + offset, mask=valid, other=0.0)
    # Tokens with non-finite logits do not vote, and their p is NaN, which shows in the weights.
    finite = is_finite(z)
    z = tl.where(finite[:, None], z, 0.0)
    p = activation(tl.where(valid_column[None, :], z, float("-inf")), SIGMOID)
    c = p
    if bias is not None:
        c = p + tl.load(bias + expert, mask=valid_column, other=0.0)[None, :]
    key = tl.where(valid_column[None, :], float_to_key(c), LOWEST_KEY)
    bits = tl.where(finite[:, None], p, float("nan")).to(tl.int32, bitcast=True)
    in_groups = valid_column[None, :]
    if TOPK_GROUPS < GROUPS:
        dropped = (
            dropped_groups(key, TOPK_GROUPS, GROUP_SIZE, TOKENS, PADDED_GROUPS, PADDED_SIZE)
            & in_groups
        )
        in_groups = in_groups & ~dropped
        bits = tl.where(dropped, bits | LOWEST_KEY, bits)
    if admitted is not None:
        block = row * blocks + (block_offset(starts, row, BLOCK) + token) // BLOCK
        is_admitted = tl.load(
            admitted + block[:, None] * EXPERTS + expert[None, :], mask=valid, other=1
        )
        in_groups = in_groups & (is_admitted > 0)
        bits = tl.where(is_admitted > 0, bits, bits | LOWEST_KEY)
    tl.store(p_bits + offset, bits, mask=valid)

    # Margins are measured from the best score outside the top k.
    EXTRA: tl.constexpr = 1 if VOTE == "margin" and K < EXPERTS else 0
    HAS_OUTER: tl.constexpr = KEPT < K + EXTRA
    choice = tl.arange(0, CHOICES)
    marked = tl.zeros((TOKENS, PADDED_GROUPS * PADDED_SIZE), tl.int1)
    inner = tl.where(in_groups, key, LOWEST_KEY)
    outer = tl.where(in_groups, LOWEST_KEY, key)
    inner_count = tl.full((TOKENS,), KEPT, tl.int32)
    columns, inner, outer, last_key, marked = topk_columns(
        inner, outer, inner_count, column, choice, marked, K, MARKS, HAS_OUTER
    )
    if EXTRA:
        last_key = tl.max(inner if K < KEPT else outer, axis=1)
    # The key of a selected column was removed.
    selected = (valid_column[None, :] if HAS_OUTER else in_groups) & (inner == LOWEST_KEY)
    if HAS_OUTER:
        selected = selected & (outer == LOWEST_KEY)
    ids = (columns // PADDED_SIZE) * GROUP_SIZE + columns % PADDED_SIZE
    valid_choice = valid_token[:, None] & (choice < K)[None, :]
    tl.store(
        vanilla_ids + token_index[:, None] * K + choice[None, :],
        ids.to(tl.int64),
        mask=valid_choice,
    )
    clear_mask = valid_column & (column * 0 + tile + row == 0)
    tl.store(used + expert, tl.zeros((PADDED_GROUPS * PADDED_SIZE,), tl.uint8), mask=clear_mask)

    weight = tl.where(valid_token, 1.0, 0.0)
    if vote_weight is not None:
        weight = tl.load(vote_weight + token_index, mask=valid_token, other=0.0)
    tile_offset = (row * tl.num_programs(0) + tile) * EXPERTS + expert
    if MARKS > 0:
        voter_marks = (marked & (finite & (weight > 0))[:, None]).to(tl.int32)
        tl.store(marks + tile_offset, tl.max(voter_marks, axis=0), mask=valid_column)
    if VOTE == "max":
        can_vote = (weight > 0) & finite
        best_score = tl.where(can_vote[:, None], vote_units(c), LOWEST_KEY64)
        tl.store(vote_sums + tile_offset, tl.max(best_score, axis=0), mask=valid_column)
    elif VOTE != "":
        split_score = c if BIASED else p
        votes = token_votes(
            p, c, split_score, selected, valid_column[None, :], key_to_float(last_key), VOTE
        )
        weight = tl.where(finite, weight, 0.0)
        tl.store(
            vote_sums + tile_offset,
            tl.sum(vote_units(votes * weight[:, None]), axis=0),
            mask=valid_column,
        )


@triton.jit(
    do_not_specialize=[
        *("tokens", "tiles", "blocks", "count", "min_experts"),
        *("mass_bits", "bonus_bits", "loss_bits"),
    ]
)
def choose_kernel(
    logits,  # [S, N, E] fp32
    admitted,  # [S, blocks, E] int32, or None: see ``admission``
    p_bits,  # [S, N, E] int32; this and the next four are outputs of ``vote_kernel``
    vanilla_ids,
    vote_sums,
    marks,
    used,  # out [E] uint8
    bias,  # [E] fp32, or None
    resident,  # [E] uint8, or None
    ids,  # out [S, N, K] int64
    weights,  # out [S, N, K] fp32
    tokens,
    tiles,  # tiles per sequence in the first launch
    blocks,  # of ``admitted``
    count,  # coreset size, unless MASS
    min_experts,  # minimum coreset size, if MASS
    mass_bits,  # bits of a double, as the next two
    bonus_bits,
    loss_bits,
    RULE: tl.constexpr,  # none, union, count, mass
    BEST: tl.constexpr,  # votes are maximum scores, not sums
    PROTECT: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    BIASED: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    CHOICES: tl.constexpr,
    KEPT: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid_token = token < tokens
    token_index = row * tokens + token
    choice = tl.arange(0, CHOICES)
    valid_choice = valid_token[:, None] & (choice < K)[None, :]
    choice_offset = token_index[:, None] * K + choice[None, :]
    if RULE == "none":
        selected = tl.load(vanilla_ids + choice_offset, mask=valid_choice, other=-1)
    else:
        column = tl.arange(0, PADDED_GROUPS * PADDED_SIZE)
        expert = (column // PADDED_SIZE) * GROUP_SIZE + column % PADDED_SIZE
        valid_column = (column // PADDED_SIZE < GROUPS) & (column % PADDED_SIZE < GROUP_SIZE)
        tile_offset = row * tiles * EXPERTS + expert
        coreset = valid_column
        eligible = valid_column
        if admitted is not None:
            pointers = admitted + row * blocks * EXPERTS + expert
            eligible = reduce_tiles(pointers, valid_column, blocks, EXPERTS, "any") > 0
        if RULE == "union":
            coreset = reduce_tiles(marks + tile_offset, valid_column, tiles, EXPERTS, "any") > 0
        else:
            reduction: tl.constexpr = "best" if BEST else "sum"
            votes = reduce_tiles(vote_sums + tile_offset, valid_column, tiles, EXPERTS, reduction)
            votes = tl.where(eligible, votes, 0)
            protected = tl.zeros((PADDED_GROUPS * PADDED_SIZE,), tl.int1)
            if PROTECT:
                protected = reduce_tiles(marks + tile_offset, valid_column, tiles, EXPERTS, "any")
                protected = protected > 0
            MASS: tl.constexpr = RULE == "mass"
            coreset = elect(votes, protected, eligible, count, min_experts, mass_bits, MASS)
            if resident is not None:
                is_resident = tl.load(resident + expert, mask=valid_column, other=0).to(tl.float64)
                factor = 1.0 + bonus_bits.to(tl.int64).to(tl.float64, bitcast=True) * is_resident
                weighted_votes = votes.to(tl.float64) * factor
                resident_coreset = elect(
                    weighted_votes, protected, eligible, count, min_experts, mass_bits, MASS
                )
                coreset = restore_votes(resident_coreset, coreset, votes, loss_bits)
        offset = token_index[:, None] * EXPERTS + expert[None, :]
        bits = tl.load(p_bits + offset, mask=valid_token[:, None] & valid_column[None, :], other=0)
        c = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        if bias is not None:
            c = c + tl.load(bias + expert, mask=valid_column, other=0.0)[None, :]
        key = tl.where((coreset & valid_column)[None, :], float_to_key(c), LOWEST_KEY)
        HAS_OUTER: tl.constexpr = KEPT < EXPERTS
        outer = tl.where(bits < 0, key, LOWEST_KEY)
        inner = tl.where(bits < 0, LOWEST_KEY, key) if HAS_OUTER else key
        inner_count = tl.sum((inner != LOWEST_KEY).to(tl.int32), axis=1)
        marked = tl.zeros((TOKENS, PADDED_GROUPS * PADDED_SIZE), tl.int1)
        columns, _, _, _, _ = topk_columns(
            inner, outer, inner_count, column, choice, marked, K, 0, HAS_OUTER
        )
        selected = tl.where(
            columns < 0, -1, (columns // PADDED_SIZE) * GROUP_SIZE + columns % PADDED_SIZE
        ).to(tl.int64)
        tl.store(ids + choice_offset, selected, mask=valid_choice)

    valid = valid_choice & (selected >= 0)
    bits = tl.load(p_bits + token_index[:, None] * EXPERTS + selected, mask=valid, other=0)
    w = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    if BIASED:
        w = tl.where(valid, w + tl.load(bias + selected, mask=valid, other=0.0), 0.0)
    if RENORMALISE:
        total = tl.where(valid_token, tl.sum(w, axis=1) + EPSILON, 1.0)
        if EPSILON == 0:  # where all probabilities are 0, the logits weigh
            offset = token_index[:, None] * EXPERTS + selected
            z = tl.load(logits + offset, mask=valid, other=-3e38)
            peak = tl.max(z, axis=1)
            exps = tl.where(valid, tl.exp(z - peak[:, None]), 0.0)
            w = tl.where((total == 0)[:, None], exps, w)
            total = tl.where(total == 0, tl.sum(exps, axis=1), total)
        w = tl.div_rn(w, tl.broadcast_to(total[:, None], (TOKENS, CHOICES)))
    tl.store(weights + choice_offset, w * SCALE, mask=valid_choice)
    tl.store(used + selected, tl.full((TOKENS, CHOICES), 1, tl.uint8), mask=valid)


@triton.jit
def token_votes(p, c, weight, selected, valid_column, last_score, VOTE: tl.constexpr):
    """Each token's votes for each expert, [tokens, COLUMNS]."""
    if VOTE == "full":
        return tl.where(valid_column, p, 0.0)
    if VOTE == "count":
        return tl.where(selected, 1.0, 0.0)
    if VOTE == "topk-prob":
        return tl.where(selected, p, 0.0)
    if VOTE == "margin":
        gain = c - last_score[:, None]
        votes = tl.where(selected, tl.where(gain > 0, gain, 0.0) + MARGIN_FLOOR, 0.0)
    else:
        votes = tl.where(selected, weight, 0.0)
    total = tl.sum(votes, axis=1)
    total = tl.where(total != 0, total, 1.0)
    return tl.div_rn(votes, tl.broadcast_to(total[:, None], votes.shape))


@triton.jit
def vote_units(x):
    """Votes in units of 2**-40, rounded half to even."""
    scaled = x * VOTE_UNIT
    size = tl.abs(scaled)
    # Adding 2**23 makes the hardware round to an integer.
    size = tl.where(
        size < INTEGER_THRESHOLD, (size + INTEGER_THRESHOLD) - INTEGER_THRESHOLD, size
    ).to(tl.int64)
    return tl.where(scaled < 0, -size, size)


@triton.jit
def reduce_tiles(pointers, valid_column, tiles, EXPERTS: tl.constexpr, HOW: tl.constexpr):
    """[COLUMNS]: int64 votes ("best", "sum") or int32 marks ("any") of a row, over its tiles."""
    tile = tl.arange(0, 8)
    LEAST: tl.constexpr = LOWEST_KEY64 if HOW == "best" else 0
    total = tl.full(valid_column.shape, LEAST, tl.int32 if HOW == "any" else tl.int64)
    for start in range(0, tiles, 8):
        valid = (start + tile < tiles)[:, None] & valid_column[None, :]
        tile_pointers = pointers[None, :] + (start + tile)[:, None] * EXPERTS
        values = tl.load(tile_pointers, mask=valid, other=LEAST)
        if HOW == "sum":
            total += tl.sum(values, axis=0)
        else:
            total = tl.maximum(total, tl.max(values, axis=0))
    return total


@triton.jit
def elect(
    votes,  # [COLUMNS] int64, or fp64
    protected,
    eligible,
    count,
    min_experts,
    mass_bits,
    MASS: tl.constexpr,
):
    """The coreset, a mask [COLUMNS]: protected experts, then those with most votes."""
    rank = tl.arange(0, votes.shape[0])
    candidate = eligible & ~protected
    candidate_count = tl.sum(candidate.to(tl.int32), axis=0)
    protected_count = tl.sum(protected.to(tl.int32), axis=0)
    FLOATS: tl.constexpr = votes.dtype == tl.float64
    key = double_to_key(votes) if FLOATS else votes
    key = tl.where(candidate, key, LOWEST_KEY64)
    order = tl.sort(key, descending=True)
    size = count
    if MASS:
        zero = tl.zeros_like(votes)
        inside = rank < candidate_count
        value = tl.where(inside, key_to_double(order) if FLOATS else order, zero)
        protected_votes = tl.sum(tl.where(protected, votes, zero), axis=0)
        cumulative = (protected_votes + tl.cumsum(value, axis=0)).to(tl.float64)
        all_votes = (protected_votes + tl.sum(value, axis=0)).to(tl.float64)
        required = mass_bits.to(tl.int64).to(tl.float64, bitcast=True) * all_votes
        below_count = tl.sum((inside & (cumulative < required)).to(tl.int32), axis=0)
        # Protected experts alone may hold enough votes; then only ``min_experts`` adds others.
        needs_more = (protected_count == 0) | (protected_votes.to(tl.float64) < required)
        size = tl.maximum(tl.where(needs_more, protected_count + below_count + 1, 1), min_experts)
    size = tl.minimum(tl.maximum(size - protected_count, 0), candidate_count)
    return protected | first_candidates(key, candidate, size, order, rank)


@triton.jit
def restore_votes(coreset, plain_coreset, votes, loss_bits):
    """``coreset`` with its largest losses restored, a mask [COLUMNS].

    Missing experts of ``plain_coreset`` return one by one, most votes first. Each replaces the
    extra expert with fewest votes, until the coreset holds (1 - max_vote_loss) of the votes that
    ``plain_coreset`` holds.
    """
    rank = tl.arange(0, votes.shape[0])
    missing, extra = plain_coreset & ~coreset, coreset & ~plain_coreset
    zero = tl.zeros_like(votes)
    gain = tl.where(missing, votes, LOWEST_KEY64)
    loss = tl.where(extra, -votes, LOWEST_KEY64)
    sorted_gain, sorted_loss = tl.sort(gain, descending=True), tl.sort(loss, descending=True)
    swap_gain = tl.where(sorted_gain > LOWEST_KEY64, sorted_gain, zero) + tl.where(
        sorted_loss > LOWEST_KEY64, sorted_loss, zero
    )
    coreset_votes = tl.sum(tl.where(coreset, votes, zero), axis=0)
    plain_votes = tl.sum(tl.where(plain_coreset, votes, zero), axis=0).to(tl.float64)
    floor = plain_votes * (1.0 - loss_bits.to(tl.int64).to(tl.float64, bitcast=True))
    after = (coreset_votes + tl.cumsum(swap_gain, axis=0)).to(tl.float64)
    swaps = tl.min(tl.where(after >= floor, rank + 1, votes.shape[0]), axis=0)
    swaps = tl.where(coreset_votes.to(tl.float64) >= floor, 0, swaps)
    restored = first_candidates(gain, missing, swaps, sorted_gain, rank)
    return (coreset | restored) & ~first_candidates(loss, extra, swaps, sorted_loss, rank)
