"""Routing of one layer's blocks by a policy: the same election and choice as in the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.routing import Vanilla, route
from coterie.sglang.live_blocks import LiveBlocks
from coterie.values import Policy, RouterSpec, Routing, Scores, expert_mask


@dataclass(frozen=True)
class LayerRouter:
    """The router of one layer, as the engine knows it."""

    layer: int
    moe_index: int  # the index of the layer among those that route
    spec: RouterSpec
    bias: Tensor | None  # [E]


@dataclass(frozen=True)
class BlockRouting:
    """The experts of all tokens, and the scores and the routing of the rows under the policy."""

    ids: Tensor  # [S * N, k] int32; on a GPU -1 is no expert
    weights: Tensor  # [S * N, k] fp32
    scores: Scores
    routing: Routing


def route_blocks(
    logits: Tensor, router: LayerRouter, blocks: LiveBlocks, policy: Policy
) -> BlockRouting:
    """The experts of logits [S * N, E]: by ``policy`` in routed rows, else by the model itself."""
    scores = Scores(
        logits=logits.float().view(*blocks.masked.shape, -1),
        router=router.spec,
        bias=None if router.bias is None else router.bias.float(),
        voters=blocks.voters,
        progress=blocks.progress,
        layer=router.layer,
        moe_index=router.moe_index,
    )
    routing = route(scores, policy)
    vanilla = route(replace(scores, voters=None, progress=None), Vanilla())
    is_routed = blocks.routed.repeat_interleave(blocks.masked.shape[1]).unsqueeze(-1)
    ids = torch.where(is_routed, routing.topk_ids, vanilla.topk_ids)
    weights = torch.where(is_routed, routing.topk_weights, vanilla.topk_weights)
    if ids.device.type == "cpu":
        ids = fill_ids(ids, router.spec.experts)
    return BlockRouting(ids.to(torch.int32), weights, scores, routing)


def fill_ids(ids: Tensor, experts: int) -> Tensor:
    """The ids [T, k], with unused experts of the token in place of -1.

    SGLang's GPU kernels skip -1, but its CPU path computes k different experts for every token.
    """
    unused_first = expert_mask(ids, experts).byte().argsort(dim=-1, stable=True)
    is_none = ids < 0
    index = (is_none.cumsum(-1) - 1).clamp(min=0)
    return ids.where(~is_none, unused_first.gather(-1, index))
