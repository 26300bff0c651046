"""One shared ``route``: constrain, select, weigh, count. Policies differ in the mask they give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from coterie import ops
from coterie.errors import CoterieError
from coterie.ops import top_ids, top_mask
from coterie.routing.reuse import reuse_coresets
from coterie.values import CoresetRule, Policy, RouterSpec, Routing, Scores, expert_mask

VOTE_UNIT = 2.0**40
"""Of a vote: votes are counted in whole numbers of its parts, so that any order of them adds up
to the same."""


@dataclass(frozen=True)
class KernelRouting:
    """A policy's word on these scores in plain numbers: what ``ops.route`` is asked."""

    scores: Scores  # those that elect together: as one sequence, where rows share a coreset
    rule: CoresetRule | None = None  # None: the unmodified model
    vote_weight: Tensor | None = None  # [S, N] fp32; None: everybody 1


@runtime_checkable
class KernelPolicy(Protocol):
    """A policy that kernels can follow: its ruling routes as its mask does."""

    def kernel_rule(self, scores: Scores, k: int) -> KernelRouting | None:
        """None where only the mask can say it."""
        ...


def route(scores: Scores, policy: Policy) -> Routing:
    """Each token's best experts among those ``policy`` lets it use; never an expert outside."""
    return _route_by_kernel(scores, policy) or route_by_mask(scores, policy)


def route_by_mask(scores: Scores, policy: Policy) -> Routing:
    """``route`` in plain torch from what the policy finds eligible: the truth about it."""
    scores = check_finite(scores)
    scores = replace(scores, vanilla_ids=vanilla_ids(scores))
    mask = policy.eligible(scores, scores.router.k)
    reuse = None
    if scores.previous_coresets is not None:
        reuse = reuse_coresets(
            scores.previous_coresets, coreset_of(scores, mask), vanilla_votes(scores)
        )
        mask = reuse.coresets.unsqueeze(1)
    # A mask of one element can only say "everybody": the unmodified model, already chosen.
    ids = vanilla_ids(scores) if mask.numel() == 1 else select_topk(scores, mask)
    return Routing(
        topk_ids=ids.flatten(0, 1),
        topk_weights=combine_weights(scores, ids).flatten(0, 1),
        used=expert_mask(ids.flatten(), scores.router.experts),
        vanilla_ids=vanilla_ids(scores).flatten(0, 1),
        coreset_reuse=reuse,
    )


def coreset_of(scores: Scores, mask: Tensor) -> Tensor:
    """[S, E]: whom a policy's ``mask`` lets every token of a row use; of "everybody", all that the
    tokens take."""
    rows, _, experts = scores.logits.shape
    if mask.numel() == 1:
        return expert_mask(vanilla_ids(scores).flatten(1), experts)
    if mask.shape[1] != 1:
        raise CoterieError(
            f"layer {scores.layer}: drift keeps coresets, and this policy elects none: each token "
            "has a mask of its own"
        )
    return mask[:, 0].expand(rows, experts)


def vanilla_votes(scores: Scores) -> Tensor:
    """[S, E] int64: the router's probability of the engine's voters' own experts, in UNITs of a
    vote (DES, Eq. 6), whatever a policy's own votes are; by these a coreset stays or goes."""
    votes = scores.probability.gather(-1, vanilla_ids(scores))
    if scores.voters is not None:
        votes = votes * ops.vote_weights(scores.voters, None).unsqueeze(-1)
    units = (votes * VOTE_UNIT).round().to(torch.int64).flatten(1)
    rows, _, experts = scores.logits.shape
    empty = torch.zeros(rows, experts, dtype=torch.int64, device=votes.device)
    return empty.scatter_add_(-1, vanilla_ids(scores).flatten(1), units)


def vanilla_ids(scores: Scores) -> Tensor:
    """R[n], [S, N, k]: what token n takes in the unmodified model, best first by rank."""
    return select_topk(scores, None) if scores.vanilla_ids is None else scores.vanilla_ids


def select_topk(scores: Scores, mask: Tensor | None, k: int | None = None) -> Tensor:
    """Ids [S, N, k] of every token's best experts inside ``mask``; -1 where there are too few.

    Without ``k``, as many as the router takes.

    Groups are chosen from the unrestricted scores, as the model does; then come the best allowed
    experts inside these groups, then those outside. (Masking before the group step would drop
    groups, and could then choose experts that the mask forbids.)
    """
    k = scores.router.k if k is None else k
    dropped = _dropped_group_mask(scores)  # [S, N, E] or None
    if mask is None:
        return top_ids(scores.selection_scores, k, tier=dropped)
    mask = mask.expand(scores.selection_scores.shape)
    tier = (~mask).to(torch.uint8) * 2
    if dropped is not None:
        tier = tier + (dropped & mask).to(torch.uint8)
    ids = top_ids(scores.selection_scores, k, tier=tier)
    return ids.where(mask.gather(-1, ids), -1)


def combine_weights(scores: Scores, ids: Tensor) -> Tensor:
    """What multiplies the outputs of ``ids`` [S, N, k]: the family's own rule; 0 where id is -1."""
    router = scores.router
    weights = scores.gate_weights.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    if router.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + router.epsilon)
    return weights if router.scale == 1.0 else weights * router.scale


def check_finite(scores: Scores) -> Scores:
    """The same scores, or an error that names the layer whose logits are not numbers.

    Asking an accelerator would stall it. There, such a token's logits all become NaN, which its
    weights and then the model's logits inherit, so that whoever reads these can raise.
    """
    if scores.logits.device.type != "cpu":
        nan_if_not_finite = (scores.logits * 0).sum(dim=-1, keepdim=True)
        return replace(scores, logits=scores.logits + nan_if_not_finite)
    if not bool(torch.isfinite(scores.logits).all()):
        raise CoterieError(
            f"layer {scores.layer}: router logits are NaN or infinite; "
            "check the weights, or run in a wider dtype"
        )
    return scores


def _route_by_kernel(scores: Scores, policy: Policy) -> Routing | None:
    """None where the policy, the device or the rule has none."""
    kernel_routing = (
        policy.kernel_rule(scores, scores.router.k) if _is_kernel_policy(policy) else None
    )
    return (
        None
        if kernel_routing is None
        else ops.route(kernel_routing.scores, kernel_routing.rule, kernel_routing.vote_weight)
    )


def _is_kernel_policy(policy: Policy) -> TypeGuard[KernelPolicy]:
    return _implements_kernel_policy(type(policy))


@cache  # asking a protocol takes as long as half a kernel
def _implements_kernel_policy(policy_type: type) -> bool:
    return issubclass(policy_type, KernelPolicy)


def _dropped_group_mask(scores: Scores) -> Tensor | None:
    """Mask [S, N, E] of the experts whose group the model drops; None without group limits."""
    router: RouterSpec = scores.router
    if router.topk_groups >= router.groups:
        return None
    group_scores = scores.selection_scores.unflatten(
        -1, (router.groups, -1)
    )  # [S, N, groups, E / groups]
    group_rank = group_scores.gather(-1, top_ids(group_scores, 2)).sum(dim=-1)
    kept_groups = top_mask(group_rank, router.topk_groups)
    return ~kept_groups.repeat_interleave(router.experts // router.groups, dim=-1)
