"""An election in two launches: tokens choose and cast votes; seats are given and tokens served.

Launch 1, ``vote``, has a program for a few tokens: scores, own experts, and what these tokens vote
for together. Launch 2, ``serve``, adds these up (each program again, for no program may wait for
another), elects, and chooses inside the coreset. Votes are whole numbers: any order adds up to
the same, so parts are summed rather than added atomically, and no memory must be clean before.

Columns: groups of experts are padded to powers of two, so column ``g * WIDE + i`` is expert
``g * SIZE + i``; W = MANY * WIDE columns in all. Scores wait between the launches as the bits of p,
the sign saying that the expert's group was dropped.
"""

# Kernels are in the language of Triton, which types of Python do not describe.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from coterie.ops.triton.keys import (
    LOW,
    NEVER,
    best_columns,
    double_order,
    first,
    float_order,
    order_double,
    order_float,
)

UNIT = tl.constexpr(1099511627776.0)  # 2**40
FLOOR = tl.constexpr(0.0009765625)  # 2**-10
WHOLE = tl.constexpr(8388608.0)  # 2**23: from here on, fp32 holds whole numbers only


@triton.jit(do_not_specialize=["tokens"])
def vote(
    logits,  # [S, N, E] fp32
    bias,  # [E] fp32, or None
    voice,  # [S, N] fp32, or None
    scores,  # out [S, N, E] int32: bits of p
    own,  # out [S, N, K] int64
    parts,  # out [S, tiles, E] int64: votes, where any are counted
    marks,  # out [S, tiles, E] int32: experts of somebody's first MARKS
    used,  # out [E] uint8: cleared for the next launch
    tokens,  # N
    VOTE: tl.constexpr,  # "" for none
    MARKS: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,  # c multiplies, not p
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    MANY: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    CHOICES: tl.constexpr,  # K, padded
    TOKENS: tl.constexpr,  # of a program
):
    tile, row = tl.program_id(0), tl.program_id(1)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    real = token < tokens
    column = tl.arange(0, MANY * WIDE)
    expert = (column // WIDE) * SIZE + column % WIDE
    known = (column // WIDE < GROUPS) & (column % WIDE < SIZE)
    there = real[:, None] & known[None, :]
    line = row * tokens + token
    at = line[:, None] * EXPERTS + expert[None, :]

    z = tl.load(logits + at, mask=there, other=0.0)
    # No number, no vote; and p that is no number, so that whoever reads the weights finds out.
    strange = ((z.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
    sound = tl.max(strange, axis=1) == 0
    z = tl.where(sound[:, None], z, 0.0)
    p = activation(tl.where(known[None, :], z, float("-inf")), SIGMOID)
    c = p
    if bias is not None:
        c = p + tl.load(bias + expert, mask=known, other=0.0)[None, :]
    key = tl.where(known[None, :], float_order(c), LOW)
    bits = tl.where(sound[:, None], p, float("nan")).to(tl.int32, bitcast=True)
    inside = known[None, :]
    if KEPT < GROUPS:
        dropped = outside(key, KEPT, SIZE, TOKENS, MANY, WIDE) & inside
        inside = inside & ~dropped
        bits = tl.where(dropped, bits | LOW, bits)
    tl.store(scores + at, bits, mask=there)

    # One more than a token takes, where a margin is measured from there.
    MORE: tl.constexpr = 1 if VOTE == "margin" and K < EXPERTS else 0
    TWO: tl.constexpr = KEPT * SIZE < K + MORE
    choice = tl.arange(0, CHOICES)
    marked = tl.zeros((TOKENS, MANY * WIDE), tl.int1)
    inner = tl.where(inside, key, LOW)
    outer = tl.where(inside, LOW, key)
    within = tl.full((TOKENS,), KEPT * SIZE, tl.int32)
    columns, inner, outer, last, marked = best_columns(
        inner, outer, within, column, choice, marked, K, MARKS, TWO, MANY * WIDE
    )
    if MORE:
        last = tl.max(inner if K < KEPT * SIZE else outer, axis=1)
    # Taken is who was there and has no key any more.
    chosen = (known[None, :] if TWO else inside) & (inner == LOW)
    if TWO:
        chosen = chosen & (outer == LOW)
    ids = (columns // WIDE) * SIZE + columns % WIDE
    taken = real[:, None] & (choice < K)[None, :]
    tl.store(own + line[:, None] * K + choice[None, :], ids.to(tl.int64), mask=taken)
    clearing = known & (column * 0 + tile + row == 0)
    tl.store(used + expert, tl.zeros((MANY * WIDE,), tl.uint8), mask=clearing)

    say = tl.where(real, 1.0, 0.0)
    if voice is not None:
        say = tl.load(voice + line, mask=real, other=0.0)
    part = (row * tl.num_programs(0) + tile) * EXPERTS + expert
    if MARKS > 0:
        spoken = (marked & (sound & (say > 0))[:, None]).to(tl.int32)
        tl.store(marks + part, tl.max(spoken, axis=0), mask=known)
    if VOTE == "max":
        loud = (say > 0) & sound
        best_score = tl.where(loud[:, None], units(c), NEVER)
        tl.store(parts + part, tl.max(best_score, axis=0), mask=known)
    elif VOTE != "":
        weight = c if BIASED else p
        cast = ballot(p, c, weight, chosen, known[None, :], order_float(last), VOTE)
        say = tl.where(sound, say, 0.0)
        tl.store(parts + part, tl.sum(units(cast * say[:, None]), axis=0), mask=known)


@triton.jit(do_not_specialize=["tokens", "tiles", "count", "least", "tau", "lam", "eps"])
def serve(
    scores,  # [S, N, E] int32, and the next four: what ``vote`` left
    own,
    parts,
    marks,
    used,  # out [E] uint8
    bias,  # [E] fp32, or None
    resident,  # [E] uint8, or None
    ids,  # out [S, N, K] int64
    weights,  # out [S, N, K] fp32
    tokens,
    tiles,  # of the first launch, in a row
    count,  # seats, unless MASS
    least,  # seats at least, if MASS
    tau,  # the bits of a double, and the next two
    lam,
    eps,
    RULE: tl.constexpr,  # none, union, count, mass
    BEST: tl.constexpr,  # votes are the best score anybody gives
    PROTECT: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    BIASED: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    MANY: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = token < tokens
    line = row * tokens + token
    choice = tl.arange(0, CHOICES)
    taken = real[:, None] & (choice < K)[None, :]
    out = line[:, None] * K + choice[None, :]
    if RULE == "none":
        chosen = tl.load(own + out, mask=taken, other=-1)
    else:
        column = tl.arange(0, MANY * WIDE)
        expert = (column // WIDE) * SIZE + column % WIDE
        known = (column // WIDE < GROUPS) & (column % WIDE < SIZE)
        here = row * tiles * EXPERTS + expert
        seated = known
        if RULE == "union":
            seated = added(marks + here, known, tiles, EXPERTS, MANY * WIDE, "any") > 0
        else:
            how: tl.constexpr = "best" if BEST else "sum"
            votes = added(parts + here, known, tiles, EXPERTS, MANY * WIDE, how)
            safe = tl.zeros((MANY * WIDE,), tl.int1)
            if PROTECT:
                safe = added(marks + here, known, tiles, EXPERTS, MANY * WIDE, "any") > 0
            MASS: tl.constexpr = RULE == "mass"
            seated = elect(votes, safe, known, count, least, tau, MASS, EXPERTS, MANY * WIDE)
            if resident is not None:
                near = tl.load(resident + expert, mask=known, other=0).to(tl.float64)
                factor = 1.0 + lam.to(tl.int64).to(tl.float64, bitcast=True) * near
                worth = votes.to(tl.float64) * factor
                liked = elect(worth, safe, known, count, least, tau, MASS, EXPERTS, MANY * WIDE)
                seated = repaired(liked, seated, votes, eps, EXPERTS, MANY * WIDE)
        at = line[:, None] * EXPERTS + expert[None, :]
        bits = tl.load(scores + at, mask=real[:, None] & known[None, :], other=0)
        c = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        if bias is not None:
            c = c + tl.load(bias + expert, mask=known, other=0.0)[None, :]
        key = tl.where((seated & known)[None, :], float_order(c), LOW)
        TWO: tl.constexpr = KEPT < GROUPS
        outer = tl.where(bits < 0, key, LOW)
        inner = tl.where(bits < 0, LOW, key) if TWO else key
        within = tl.sum((inner != LOW).to(tl.int32), axis=1)
        marked = tl.zeros((TOKENS, MANY * WIDE), tl.int1)
        columns, _, _, _, _ = best_columns(
            inner, outer, within, column, choice, marked, K, 0, TWO, MANY * WIDE
        )
        chosen = tl.where(columns < 0, -1, (columns // WIDE) * SIZE + columns % WIDE).to(tl.int64)
        tl.store(ids + out, chosen, mask=taken)

    some = taken & (chosen >= 0)
    bits = tl.load(scores + line[:, None] * EXPERTS + chosen, mask=some, other=0)
    w = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    if BIASED:
        w = tl.where(some, w + tl.load(bias + chosen, mask=some, other=0.0), 0.0)
    if RENORMALISE:
        total = tl.where(real, tl.sum(w, axis=1) + EPSILON, 1.0)
        w = tl.div_rn(w, tl.broadcast_to(total[:, None], (TOKENS, CHOICES)))
    tl.store(weights + out, w * SCALE, mask=taken)
    tl.store(used + chosen, tl.full((TOKENS, CHOICES), 1, tl.uint8), mask=some)


@triton.jit
def activation(z, SIGMOID: tl.constexpr):
    """p of logits [.., W], -inf where there is no expert."""
    if SIGMOID:
        small = tl.exp(-tl.abs(z))
        return tl.div_rn(tl.where(z >= 0, 1.0, small), 1.0 + small)
    power = tl.exp(z - tl.max(z, axis=1)[:, None])
    return tl.div_rn(power, tl.broadcast_to(tl.sum(power, axis=1)[:, None], power.shape))


@triton.jit
def outside(
    key,
    KEPT: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    MANY: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mask [tokens, W] of the columns whose group's two best scores do not add up to enough."""
    keys = tl.reshape(key, (TOKENS, MANY, WIDE))
    best = tl.max(keys, axis=2)
    total = order_float(best)
    if SIZE > 1:
        column = tl.arange(0, WIDE)[None, None, :]
        at = tl.min(tl.where(keys == best[:, :, None], column, WIDE), axis=2)
        total += order_float(tl.max(tl.where(column == at[:, :, None], LOW, keys), axis=2))
    # Groups of padding stay below all others.
    score = tl.where(best == LOW, LOW, float_order(tl.where(total == 0, 0.0, total)))
    group = tl.arange(0, MANY)
    mine, others = score[:, :, None], score[:, None, :]
    before = (group[None, :] < group[:, None])[None, :, :]
    beaten = (others > mine) | ((others == mine) & before)
    dropped = tl.sum(beaten.to(tl.int32), axis=2) >= KEPT
    wide = tl.broadcast_to(dropped[:, :, None], (TOKENS, MANY, WIDE))
    return tl.reshape(wide.to(tl.int32), (TOKENS, MANY * WIDE)) != 0


@triton.jit
def ballot(p, c, weight, chosen, known, last, VOTE: tl.constexpr):
    """v [tokens, W]: what each token gives each expert."""
    if VOTE == "full":
        return tl.where(known, p, 0.0)
    if VOTE == "count":
        return tl.where(chosen, 1.0, 0.0)
    if VOTE == "masked":
        return tl.where(chosen, p, 0.0)
    if VOTE == "margin":
        gain = c - last[:, None]
        given = tl.where(chosen, tl.where(gain > 0, gain, 0.0) + FLOOR, 0.0)
    else:
        given = tl.where(chosen, weight, 0.0)
    total = tl.sum(given, axis=1)
    total = tl.where(total != 0, total, 1.0)
    return tl.div_rn(given, tl.broadcast_to(total[:, None], given.shape))


@triton.jit
def units(x):
    """Votes as whole numbers of 2**-40, halves to the even one as everywhere."""
    scaled = x * UNIT
    size = tl.abs(scaled)
    # Adding 2**23 leaves no room behind the point, and the hardware rounds.
    size = tl.where(size < WHOLE, (size + WHOLE) - WHOLE, size).to(tl.int64)
    return tl.where(scaled < 0, -size, size)


@triton.jit
def added(part, known, tiles, EXPERTS: tl.constexpr, W: tl.constexpr, HOW: tl.constexpr):
    """[W]: the tiles of one row put together, int64 votes or int32 marks."""
    at = tl.arange(0, 8)
    if HOW == "best":
        found = tl.full((W,), NEVER, tl.int64)
    elif HOW == "sum":
        found = tl.full((W,), 0, tl.int64)
    else:
        found = tl.full((W,), 0, tl.int32)
    for start in range(0, tiles, 8):
        there = (start + at < tiles)[:, None] & known[None, :]
        place = part[None, :] + (start + at)[:, None] * EXPERTS
        if HOW == "best":
            found = tl.maximum(found, tl.max(tl.load(place, mask=there, other=NEVER), axis=0))
        elif HOW == "sum":
            found += tl.sum(tl.load(place, mask=there, other=0), axis=0)
        else:
            found = tl.maximum(found, tl.max(tl.load(place, mask=there, other=0), axis=0))
    return found


@triton.jit
def elect(
    votes,  # [W] int64, or fp64
    safe,
    known,
    count,
    least,
    tau,
    MASS: tl.constexpr,
    EXPERTS: tl.constexpr,
    W: tl.constexpr,
):
    """Mask [W]: the safe, then those with most votes until as many have seats as the rule says."""
    place = tl.arange(0, W)
    candidate = known & ~safe
    protected = tl.sum(safe.to(tl.int32), axis=0)
    FLOATS: tl.constexpr = votes.dtype == tl.float64
    key = double_order(votes) if FLOATS else votes
    key = tl.where(candidate, key, NEVER)
    order = tl.sort(key, descending=True)
    seats = count
    if MASS:
        none = tl.zeros_like(votes)
        inside = place < EXPERTS - protected
        value = tl.where(inside, order_double(order) if FLOATS else order, none)
        at_first = tl.sum(tl.where(safe, votes, none), axis=0)
        held = (at_first + tl.cumsum(value, axis=0)).to(tl.float64)
        all_votes = (at_first + tl.sum(value, axis=0)).to(tl.float64)
        enough = tau.to(tl.int64).to(tl.float64, bitcast=True) * all_votes
        below = tl.sum((inside & (held < enough)).to(tl.int32), axis=0)
        # The safe alone may hold enough: then nobody joins them, unless ``least`` says so.
        short = (protected == 0) | (at_first.to(tl.float64) < enough)
        seats = tl.maximum(tl.where(short, protected + below + 1, 1), least)
    seats = tl.minimum(tl.maximum(seats - protected, 0), EXPERTS - protected)
    return safe | first(key, candidate, seats, order, place)


@triton.jit
def repaired(liked, plain, votes, eps, EXPERTS: tl.constexpr, W: tl.constexpr):
    """Mask [W]: ``liked``, the largest of ``plain`` that it lacks coming back one by one, each for
    the weakest newcomer, until it holds (1 - eps) of the votes that ``plain`` holds."""
    place = tl.arange(0, W)
    lacking, newcomer = plain & ~liked, liked & ~plain
    none = tl.zeros_like(votes)
    gain = tl.where(lacking, votes, NEVER)
    loss = tl.where(newcomer, -votes, NEVER)
    back, out = tl.sort(gain, descending=True), tl.sort(loss, descending=True)
    swap = tl.where(back > NEVER, back, none) + tl.where(out > NEVER, out, none)
    held = tl.sum(tl.where(liked, votes, none), axis=0)
    whole = tl.sum(tl.where(plain, votes, none), axis=0).to(tl.float64)
    floor = whole * (1.0 - eps.to(tl.int64).to(tl.float64, bitcast=True))
    after = (held + tl.cumsum(swap, axis=0)).to(tl.float64)
    swaps = tl.min(tl.where(after >= floor, place + 1, W), axis=0)
    swaps = tl.where(held.to(tl.float64) >= floor, 0, swaps)
    returned = first(gain, lacking, swaps, back, place)
    return (liked | returned) & ~first(loss, newcomer, swaps, out, place)
