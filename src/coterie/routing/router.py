"""``route``: the one top-k routing that all policies share; policies differ in their masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from coterie import ops
from coterie.errors import ConfigError, CoterieError, NonFiniteLogitsError
from coterie.ops import top_ids, top_mask
from coterie.routing.reuse import reuse_coresets
from coterie.values import CoresetRule, Policy, Routing, Scores, expert_mask

VOTE_UNIT = 2.0**40
"""One vote in integer units, in which any order of summation gives the same result."""


@dataclass(frozen=True)
class KernelRouting:
    """The arguments of ``ops.route``: a policy's choice for these scores in plain numbers."""

    scores: Scores  # merged into one sequence if rows share a coreset
    rule: CoresetRule | None = None  # None: the unmodified model
    vote_weight: Tensor | None = None  # [S, N] fp32; None: 1 for every token


@runtime_checkable
class KernelPolicy(Protocol):
    """A policy with a kernel form that routes as its mask does."""

    def kernel_rule(self, scores: Scores, k: int) -> KernelRouting | None:
        """The kernel form, or None if only the mask can express the policy."""
        ...


def route(scores: Scores, policy: Policy) -> Routing:
    """The top-k experts of each token among those that ``policy`` lets it use."""
    return _route_by_kernel(scores, policy) or route_by_mask(scores, policy)


def route_by_mask(scores: Scores, policy: Policy) -> Routing:
    """``route`` in plain torch from the policy's mask: the reference for kernels."""
    scores = check_finite(scores)
    scores = replace(scores, admitted=admitted_experts(scores))
    scores = replace(scores, vanilla_ids=vanilla_ids(scores))
    mask = policy_mask(policy, scores)
    reuse = None
    if scores.previous_coresets is not None:
        reuse = reuse_coresets(
            scores.previous_coresets, coreset_of(scores, mask), vanilla_votes(scores)
        )
        mask = reuse.coresets.unsqueeze(1)
    # A mask of one element allows every expert: the unmodified model.
    ids = vanilla_ids(scores) if mask.numel() == 1 else select_topk(scores, mask)
    return Routing(
        topk_ids=ids.flatten(0, 1),
        topk_weights=combine_weights(scores, ids).flatten(0, 1),
        used=expert_mask(ids.flatten(), scores.router.experts),
        vanilla_ids=vanilla_ids(scores).flatten(0, 1),
        coreset_reuse=reuse,
    )


def policy_mask(policy: Policy, scores: Scores) -> Tensor:
    """The policy's mask: bool, [S, N, E] or 1 in place of any of these.

    Raises ConfigError that names the policy if it fails or returns anything else.
    """
    name = f"layer {scores.layer}: policy {type(policy).__name__}"
    try:
        mask = policy.eligible(scores, scores.router.k)
    except (CoterieError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        returned = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ConfigError(f"{name}: `eligible` must return a bool tensor, not {returned}")
    sizes = tuple(scores.logits.shape)
    if mask.ndim != 3 or any(a not in (1, b) for a, b in zip(mask.shape, sizes, strict=True)):
        raise ConfigError(
            f"{name}: `eligible` returned the shape {list(mask.shape)}; it must be "
            f"{list(sizes)} (sequences, tokens, experts), or 1 in place of any of these"
        )
    return mask


def coreset_of(scores: Scores, mask: Tensor) -> Tensor:
    """[S, E]: the experts that a policy's ``mask`` allows to all tokens of a row.

    If the mask allows every expert, the coreset is the union of the tokens' own experts.
    """
    rows, _, experts = scores.logits.shape
    if mask.numel() == 1:
        return expert_mask(vanilla_ids(scores).flatten(1), experts)
    if mask.shape[1] != 1:
        raise ConfigError(
            f"layer {scores.layer}: `reuse_tolerance` reuses coresets, and this policy elects "
            "none: each token has its own mask"
        )
    return mask[:, 0].expand(rows, experts)


def vanilla_votes(scores: Scores) -> Tensor:
    """[S, E] int64: the engine's voters' probability of their own experts (DES, Eq. 6), in
    ``VOTE_UNIT``. Coreset reuse depends on these votes, whatever the policy's own votes are."""
    votes = scores.probability.gather(-1, vanilla_ids(scores))
    if scores.voters is not None:
        votes = votes * ops.vote_weights(scores.voters, None).unsqueeze(-1)
    units = (votes * VOTE_UNIT).round().to(torch.int64).flatten(1)
    rows, _, experts = scores.logits.shape
    empty = torch.zeros(rows, experts, dtype=torch.int64, device=votes.device)
    return empty.scatter_add_(-1, vanilla_ids(scores).flatten(1), units)


def vanilla_ids(scores: Scores) -> Tensor:
    """R[n], [S, N, k]: the unmodified model's top-k ids of token n, best first."""
    return select_topk(scores, None) if scores.vanilla_ids is None else scores.vanilla_ids


def select_topk(scores: Scores, mask: Tensor | None, k: int | None = None) -> Tensor:
    """Ids [S, N, k] of each token's best experts inside ``mask``; -1 if there are too few.

    ``k`` defaults to that of the router. Groups, or the experts that a block admits, are selected
    from the unmasked scores, as the model does. The best allowed experts inside come first, then
    those outside. Masking before that step could select experts that the mask forbids.
    """
    k = scores.router.k if k is None else k
    dropped = _dropped_mask(scores)  # [S, N, E] or None
    if mask is None:
        return top_ids(scores.selection_scores, k, tier=dropped)
    mask = mask.expand(scores.selection_scores.shape)
    tier = (~mask).to(torch.uint8) * 2
    if dropped is not None:
        tier = tier + (dropped & mask).to(torch.uint8)
    ids = top_ids(scores.selection_scores, k, tier=tier)
    return ids.where(mask.gather(-1, ids), -1)


def admitted_experts(scores: Scores) -> Tensor | None:
    """[S, N, E]: the ``capacity`` experts with the best score of any token in the token's block.

    None without a capacity. Blocks lie at multiples of ``block`` positions; the window may hold
    parts of them.
    """
    router = scores.router
    if router.capacity == 0 or scores.admitted is not None:
        return scores.admitted
    score, size = scores.selection_scores, router.block
    rows, tokens, experts = score.shape
    offset = torch.zeros(rows, 1, dtype=torch.int64, device=score.device)
    if scores.starts is not None:
        offset = scores.starts.unsqueeze(1) % size
    block = (offset + torch.arange(tokens, device=score.device)) // size  # [S, N], from 0 on
    block = block.unsqueeze(-1).expand_as(score)
    best = score.new_full((rows, (tokens + size - 2) // size + 1, experts), -torch.inf)
    best = best.scatter_reduce(1, block, score, "amax")
    return top_mask(best, router.capacity).gather(1, block)


def combine_weights(scores: Scores, ids: Tensor) -> Tensor:
    """The weights of ``ids`` [S, N, k] by the family's rule; 0 for an id of -1."""
    router, is_none = scores.router, ids < 0
    weights = scores.gate_weights.gather(-1, ids.clamp(min=0)).masked_fill(is_none, 0.0)
    if router.renormalise:
        # One by one, as the kernels add: the order decides the last bit.
        total = reduce(torch.add, weights.unbind(-1)).unsqueeze(-1) + router.epsilon
        weights = (weights / total).where(total != 0, _logit_weights(scores, ids))
    weights = weights if router.scale == 1.0 else weights * router.scale
    return scale_experts(scores, ids, weights)


def scale_experts(scores: Scores, ids: Tensor, weights: Tensor) -> Tensor:
    """The weights of ``ids``, times the model's scale of each expert if it has one."""
    if scores.expert_scale is None:
        return weights
    return weights * scores.expert_scale[ids.clamp(min=0)]


def _logit_weights(scores: Scores, ids: Tensor) -> Tensor:
    """The softmax of the logits of ``ids``: the weights where all probabilities are 0 in fp32."""
    logits = scores.logits.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    return torch.softmax(logits, dim=-1).masked_fill(ids < 0, 0.0)


def check_finite(scores: Scores) -> Scores:
    """The same scores; on a CPU raises NonFiniteLogitsError that names the layer.

    On a GPU a check would wait for the device. There all logits of such a token become NaN, and so
    do its weights and the model's logits; the reader of the logits raises.
    """
    if scores.logits.device.type != "cpu":
        nan_if_not_finite = (scores.logits * 0).sum(dim=-1, keepdim=True)
        return replace(scores, logits=scores.logits + nan_if_not_finite)
    if not bool(torch.isfinite(scores.logits).all()):
        raise NonFiniteLogitsError(
            f"layer {scores.layer}: router logits are NaN or infinite; "
            "check the weights, or run in a wider dtype"
        )
    return scores


def _route_by_kernel(scores: Scores, policy: Policy) -> Routing | None:
    """None if the policy has no kernel form, or the device has no kernel for it."""
    if not _is_kernel_policy(policy):
        return None
    kernel_routing = policy.kernel_rule(scores, scores.router.k)
    if kernel_routing is None:
        return None
    routing = ops.route(kernel_routing.scores, kernel_routing.rule, kernel_routing.vote_weight)
    if routing is None or scores.expert_scale is None:
        return routing
    weights = scale_experts(scores, routing.topk_ids, routing.topk_weights)
    return replace(routing, topk_weights=weights)


def _is_kernel_policy(policy: Policy) -> TypeGuard[KernelPolicy]:
    return _implements_kernel_policy(type(policy))


@cache  # a protocol check takes half as long as a kernel
def _implements_kernel_policy(policy_type: type) -> bool:
    return issubclass(policy_type, KernelPolicy)


def _dropped_mask(scores: Scores) -> Tensor | None:
    """Mask [S, N, E] of the experts that the model drops before top-k; None if it keeps all."""
    router = scores.router
    if (admitted := admitted_experts(scores)) is not None:
        return ~admitted
    if router.topk_groups >= router.groups:
        return None
    # [S, N, groups, E / groups]
    group_scores = scores.selection_scores.unflatten(-1, (router.groups, -1))
    group_rank = group_scores.gather(-1, top_ids(group_scores, 2)).sum(dim=-1)
    kept_groups = top_mask(group_rank, router.topk_groups)
    return ~kept_groups.repeat_interleave(router.experts // router.groups, dim=-1)
