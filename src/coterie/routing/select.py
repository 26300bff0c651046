"""One shared ``route``: constrain, select, weigh, count. Policies differ in the mask they give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from coterie import ops
from coterie.naming import CoterieError
from coterie.ops import top_ids, top_mask
from coterie.routing.persistent import settle
from coterie.values import Policy, RouterSpec, Routing, Rule, Scores, membership

UNIT = 2.0**40
"""Of a vote: votes are counted in whole numbers of its parts, so that any order of them adds up
to the same."""


@dataclass(frozen=True)
class Ruling:
    """A policy's word on these scores in plain numbers: what ``ops.route`` is asked."""

    scores: Scores  # those that elect together: as one sequence, where rows share a coreset
    rule: Rule | None = None  # None: the unmodified model
    voice: Tensor | None = None  # [S, N] fp32; None: everybody 1


@runtime_checkable
class Ruled(Protocol):
    """A policy that kernels can follow: its ruling routes as its mask does."""

    def ruling(self, scores: Scores, k: int) -> Ruling | None:
        """None where only the mask can say it."""
        ...


def route(scores: Scores, policy: Policy) -> Routing:
    """Each token's best experts among those ``policy`` lets it use; never an expert outside."""
    return _by_kernel(scores, policy) or route_by_mask(scores, policy)


def route_by_mask(scores: Scores, policy: Policy) -> Routing:
    """``route`` in plain torch from what the policy finds eligible: the truth about it."""
    scores = finite(scores)
    scores = replace(scores, own=own(scores))
    mask = policy.eligible(scores, scores.router.k)
    settled = None
    if scores.incumbents is not None:
        settled = settle(scores.incumbents, coreset_of(scores, mask), own_votes(scores))
        mask = settled.coresets.unsqueeze(1)
    # A mask of one element can only say "everybody": the unmodified model, already chosen.
    ids = own(scores) if mask.numel() == 1 else choose(scores, mask)
    return Routing(
        ids=ids.flatten(0, 1),
        weights=combine_weights(scores, ids).flatten(0, 1),
        used=membership(ids.flatten(), scores.router.experts),
        own=own(scores).flatten(0, 1),
        settled=settled,
    )


def coreset_of(scores: Scores, mask: Tensor) -> Tensor:
    """[S, E]: whom a policy's ``mask`` lets every token of a row use; of "everybody", all that the
    tokens take."""
    rows, _, experts = scores.logits.shape
    if mask.numel() == 1:
        return membership(own(scores).flatten(1), experts)
    if mask.shape[1] != 1:
        raise CoterieError(
            f"layer {scores.layer}: drift keeps coresets, and this policy elects none: each token "
            "has a mask of its own"
        )
    return mask[:, 0].expand(rows, experts)


def own_votes(scores: Scores) -> Tensor:
    """[S, E] int64: the router's probability of the engine's voters' own experts, in UNITs of a
    vote (DES, Eq. 6), whatever a policy's own votes are; by these a coreset stays or goes."""
    votes = scores.probability.gather(-1, own(scores))
    if scores.voters is not None:
        votes = votes * ops.voices(scores.voters, None).unsqueeze(-1)
    units = (votes * UNIT).round().to(torch.int64).flatten(1)
    rows, _, experts = scores.logits.shape
    empty = torch.zeros(rows, experts, dtype=torch.int64, device=votes.device)
    return empty.scatter_add_(-1, own(scores).flatten(1), units)


def own(scores: Scores) -> Tensor:
    """R[n], [S, N, k]: what token n takes in the unmodified model, best first by rank."""
    return choose(scores, None) if scores.own is None else scores.own


def choose(scores: Scores, mask: Tensor | None, k: int | None = None) -> Tensor:
    """Ids [S, N, k] of every token's best experts inside ``mask``; -1 where there are too few.

    Without ``k``, as many as the router takes.

    Groups are chosen from the unrestricted scores, as the model does; then come the best allowed
    experts inside these groups, then those outside. (Masking before the group step would drop
    groups, and could then choose experts that the mask forbids.)
    """
    k = scores.router.k if k is None else k
    outside = _outside_kept_groups(scores)  # [S, N, E] or None
    if mask is None:
        return top_ids(scores.rank, k, tier=outside)
    mask = mask.expand(scores.rank.shape)
    tier = (~mask).to(torch.uint8) * 2
    if outside is not None:
        tier = tier + (outside & mask).to(torch.uint8)
    ids = top_ids(scores.rank, k, tier=tier)
    return ids.where(mask.gather(-1, ids), -1)


def combine_weights(scores: Scores, ids: Tensor) -> Tensor:
    """What multiplies the outputs of ``ids`` [S, N, k]: the family's own rule; 0 where id is -1."""
    router = scores.router
    weights = scores.weight.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    if router.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + router.epsilon)
    return weights if router.scale == 1.0 else weights * router.scale


def finite(scores: Scores) -> Scores:
    """The same scores, or an error that names the layer whose logits are not numbers.

    Asking an accelerator would stall it. There, such a token's logits all become NaN, which its
    weights and then the model's logits inherit, so that whoever reads these can raise.
    """
    if scores.logits.device.type != "cpu":
        doubt = (scores.logits * 0).sum(dim=-1, keepdim=True)
        return replace(scores, logits=scores.logits + doubt)
    if not bool(torch.isfinite(scores.logits).all()):
        raise CoterieError(
            f"layer {scores.layer}: router logits are NaN or infinite; "
            "check the weights, or run in a wider dtype"
        )
    return scores


def _by_kernel(scores: Scores, policy: Policy) -> Routing | None:
    """None where the policy, the device or the rule has none."""
    told = policy.ruling(scores, scores.router.k) if _is_ruled(policy) else None
    return None if told is None else ops.route(told.scores, told.rule, told.voice)


def _is_ruled(policy: Policy) -> TypeGuard[Ruled]:
    return _rules(type(policy))


@cache  # asking a protocol takes as long as half a kernel
def _rules(kind: type) -> bool:
    return issubclass(kind, Ruled)


def _outside_kept_groups(scores: Scores) -> Tensor | None:
    """Mask [S, N, E] of the experts whose group the model drops; None without group limits."""
    router: RouterSpec = scores.router
    if router.kept_groups >= router.groups:
        return None
    grouped = scores.rank.unflatten(-1, (router.groups, -1))  # [S, N, groups, E / groups]
    best = grouped.gather(-1, top_ids(grouped, 2)).sum(dim=-1)
    kept = top_mask(best, router.kept_groups)
    return ~kept.repeat_interleave(router.experts // router.groups, dim=-1)
