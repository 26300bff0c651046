"""Routing by one call. The activation is torch's own, so that every bit that votes is."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from coterie.ops.cpu.library import VOTE_KINDS, RouteArgs, load_library
from coterie.values import CoresetReuse, CoresetRule, PreviousCoresets, Routing, Scores

STATUS_OK = 0
SPLIT_VOTES = ("weight", "margin")
"""Votes that each token splits: torch adds up the parts, whose order decides the last bit."""
VANILLA_RULE = CoresetRule()


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
    vanilla_ids = torch.empty(rows * tokens, router.k, dtype=torch.int64)
    ids = vanilla_ids if rule is None else torch.empty_like(vanilla_ids)
    weights, used = torch.empty(vanilla_ids.shape), torch.empty(experts, dtype=torch.bool)
    p, effective_rule = scores.probability, rule or VANILLA_RULE
    reuse = None if previous is None else _allocate_reuse(previous)
    voter_weight = None if previous is None else _as_float(scores.voters)
    args = RouteArgs(
        logits=scores.logits.data_ptr(),
        p=p.data_ptr(),
        bias=_address(scores.bias),
        voice=_address(vote_weight),
        resident=_address(scores.resident),
        ids=ids.data_ptr(),
        own=vanilla_ids.data_ptr(),
        weights=weights.data_ptr(),
        used=used.data_ptr(),
        before=None if previous is None else previous.coresets.data_ptr(),
        say=_address(voter_weight),
        coresets=None if reuse is None else reuse.coresets.data_ptr(),
        stayed=None if reuse is None else reuse.reused.data_ptr(),
        lost=None if reuse is None else reuse.vote_loss.data_ptr(),
        mass=effective_rule.mass,
        lam=effective_rule.resident_bonus,
        eps=effective_rule.max_vote_loss,
        drift=0.0 if previous is None else previous.reuse_tolerance,
        scale=router.scale,
        epsilon=router.epsilon,
        stride=p.stride(1) if tokens > 1 else p.stride(0),
        sequences=rows,
        tokens=tokens,
        experts=experts,
        k=router.k,
        groups=router.groups,
        kept=min(router.topk_groups, router.groups),
        renormalise=router.renormalise,
        biased=router.biased_weight,
        vote=VOTE_KINDS.index(effective_rule.vote),
        first=effective_rule.union,
        count=effective_rule.count,
        least=effective_rule.min_experts,
        protect=effective_rule.protect,
        most=effective_rule.max_experts,
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
    """Where the kernel writes what came of them."""
    rows = len(previous.coresets)
    return CoresetReuse(
        torch.empty_like(previous.coresets),
        torch.empty(rows, dtype=torch.bool),
        torch.empty(rows, dtype=torch.float64),
    )


def _as_float(voters: Tensor | None) -> Tensor | None:
    return None if voters is None else voters.float().contiguous()


def _supports(scores: Scores, vote_weight: Tensor | None) -> bool:
    """Whether all of it lies in memory as the kernel reads it, and nobody asks for a gradient."""
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


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
