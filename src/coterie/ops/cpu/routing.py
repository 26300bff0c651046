"""Routing in one kernel call. Probabilities come from torch, so that votes are bit-identical."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from coterie.checks import optional_address
from coterie.ops.cpu.library import RouteArgs, load_library
from coterie.values import VOTE_KINDS, CoresetReuse, CoresetRule, PreviousCoresets, Routing, Scores

STATUS_OK = 0
SPLIT_VOTES = ("weight", "margin")
"""Votes normalised per token; torch computes the sums, as the order decides the last bit."""
VANILLA_RULE = CoresetRule(union=1)  # not read


def route(scores: Scores, rule: CoresetRule | None, vote_weight: Tensor | None) -> Routing | None:
    """See ``ops.route``."""
    kernels, previous = load_library(), scores.previous_coresets
    if (
        kernels is None
        or not _supports(scores, vote_weight)
        or (rule is None and previous is not None)
    ):
        return None
    (rows, tokens, experts), router = scores.logits.shape, scores.router
    if experts != router.experts:
        raise ValueError(f"logits of {experts} experts for a router of {router.experts}")
    vanilla_ids = torch.empty(rows * tokens, router.k, dtype=torch.int64)
    ids = vanilla_ids if rule is None else torch.empty_like(vanilla_ids)
    weights, used = torch.empty(vanilla_ids.shape), torch.empty(experts, dtype=torch.bool)
    p, effective_rule = scores.probability, rule or VANILLA_RULE
    by_token, by_row = (rows, tokens), (rows, experts)
    reuse = None if previous is None else _allocate_reuse(previous)
    voter_weight = None if previous is None else _as_float(scores.voters)
    args = RouteArgs(
        logits=scores.logits.data_ptr(),
        p=p.data_ptr(),
        bias=optional_address(scores.bias, torch.float32, (experts,), "bias"),
        vote_weight=optional_address(vote_weight, torch.float32, by_token, "vote weights"),
        resident=optional_address(scores.resident, torch.bool, (experts,), "resident experts"),
        starts=optional_address(scores.starts, torch.int64, (rows,), "starts"),
        ids=ids.data_ptr(),
        vanilla_ids=vanilla_ids.data_ptr(),
        weights=weights.data_ptr(),
        used=used.data_ptr(),
        previous_coresets=optional_address(
            None if previous is None else previous.coresets, torch.bool, by_row, "previous coresets"
        ),
        reuse_vote_weight=optional_address(voter_weight, torch.float32, by_token, "voters"),
        coresets=None if reuse is None else reuse.coresets.data_ptr(),
        reused=None if reuse is None else reuse.reused.data_ptr(),
        vote_loss=None if reuse is None else reuse.vote_loss.data_ptr(),
        mass=effective_rule.mass,
        resident_bonus=effective_rule.resident_bonus,
        max_vote_loss=effective_rule.max_vote_loss,
        reuse_tolerance=0.0 if previous is None else previous.reuse_tolerance,
        scale=router.scale,
        epsilon=router.epsilon,
        stride=p.stride(1) if tokens > 1 else p.stride(0),
        sequences=rows,
        tokens=tokens,
        experts=experts,
        k=router.k,
        groups=router.groups,
        kept_groups=router.topk_groups,
        renormalise=router.renormalise,
        biased=router.biased_weight,
        vote=VOTE_KINDS.index(effective_rule.vote),
        union_size=min(effective_rule.union, router.k),
        count=effective_rule.count,
        min_experts=effective_rule.min_experts,
        protect=effective_rule.protect,
        max_experts=effective_rule.max_experts,
        capacity=router.capacity,
        block=router.block,
    )
    run, isa = kernels.handle.coterie_route, kernels.isa()
    if rule is not None and (rule.max_experts or not rule.union) and rule.vote in SPLIT_VOTES:
        ballots = torch.empty(scores.logits.shape)
        args.ballots = ballots.data_ptr()
        if run(isa, ctypes.byref(args)) != STATUS_OK:
            return None
        sums = ballots.sum(dim=-1)
        args.sums = sums.data_ptr()
    ok = run(isa, ctypes.byref(args)) == STATUS_OK
    return Routing(ids, weights, used, vanilla_ids, reuse) if ok else None


def _allocate_reuse(previous: PreviousCoresets) -> CoresetReuse:
    """Uninitialised output memory for the kernel."""
    rows = len(previous.coresets)
    return CoresetReuse(
        torch.empty_like(previous.coresets),
        torch.empty(rows, dtype=torch.bool),
        torch.empty(rows, dtype=torch.float64),
    )


def _as_float(voters: Tensor | None) -> Tensor | None:
    return None if voters is None else voters.float().contiguous()


def _supports(scores: Scores, vote_weight: Tensor | None) -> bool:
    """Whether dtypes and strides are those that the kernel reads, and no gradient is needed."""
    logits, resident, p = scores.logits, scores.resident, scores.probability
    rows, tokens, _ = logits.shape
    return (
        _is_plain_float(logits)
        and not logits.requires_grad
        and (scores.bias is None or _is_plain_float(scores.bias))
        and (vote_weight is None or _is_plain_float(vote_weight))
        and (resident is None or (resident.dtype == torch.bool and resident.is_contiguous()))
        and (scores.previous_coresets is None or scores.previous_coresets.coresets.is_contiguous())
        and p.stride(2) == 1
        and (rows == 1 or p.stride(0) == tokens * p.stride(1))
    )


def _is_plain_float(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()
