"""The feed-forward part of a layer: a dense network, or a router with experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from coterie import ops
from coterie.model.forward_context import ForwardContext
from coterie.model.spec import ModelSpec
from coterie.routing import route
from coterie.values import (
    Activation,
    ExpertRequest,
    ExpertStore,
    Matrix,
    Routing,
    Scores,
    join_routings,
)


class FeedForward(Protocol):
    """x [B, W, H] -> [B, W, H]; importance [B, W] only if the policy needs it."""

    def __call__(self, x: Tensor, context: ForwardContext, importance: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Dense:
    """A gated network: down(activation(gate(x)) * up(x))."""

    gate_up: Matrix  # [2 I, H], gate rows first
    down: Matrix  # [H, I]
    activation: Activation = "silu"

    def __call__(self, x: Tensor, context: ForwardContext, importance: Tensor | None) -> Tensor:
        del context, importance
        return self.apply(x)

    def apply(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., H] -> [..., H], plus ``residual`` (fp32, same number of elements)."""
        return ops.gated_mlp(x, self.gate_up, self.down, residual, activation=self.activation)


@dataclass(frozen=True)
class MoE:
    """A router, experts served by a store, and optionally a shared expert.

    A layer with ``norms`` gets the residual stream: the router and the experts each read it through
    a norm of their own. Without ``norms`` both read the layer's input.
    """

    spec: ModelSpec
    layer: int
    gate: Matrix  # [E, H] fp32
    bias: Tensor | None  # [E] fp32, for selection
    shared: Dense | None
    store: ExpertStore
    norms: tuple[Tensor, Tensor] | None = None  # of the router (fp32) and of the experts, [H] each
    expert_scale: Tensor | None = None  # [E] fp32, multiplied into the weights

    def __call__(self, x: Tensor, context: ForwardContext, importance: Tensor | None) -> Tensor:
        router_input = x
        if self.norms is not None:
            router_input, x = self._normed_inputs(x, *self.norms)
        scores = self._router_scores(router_input, context, importance)
        routing = _route(scores, context)
        if context.coresets is not None and routing.coreset_reuse is not None:
            context.coresets.set_current(scores.moe_index, routing.coreset_reuse)
        context.recorder.on_moe_input(self.layer, x)
        context.recorder.on_routed(self.layer, scores, routing)
        return self.apply(x, routing, scores)

    def apply(self, x: Tensor, routing: Routing, scores: Scores | None = None) -> Tensor:
        """[B, W, H] -> [B, W, H] under any routing, including the shared expert.

        A store that evicts by votes needs ``scores``.
        """
        flat = x.flatten(0, 1)
        out: Tensor | None = None
        for slab in self.store.serve(self.layer, ExpertRequest(routing.used, routing, scores)):
            part = ops.run_experts(flat, routing, slab, self.spec.activation)
            out = part if out is None else out.add_(part)
        if out is None:  # no expert is used
            out = torch.zeros(flat.shape, dtype=torch.float32, device=x.device)
        if self.shared is None:
            return out.to(x.dtype).view_as(x)
        return self.shared.apply(x, out)

    def _normed_inputs(
        self, x: Tensor, router_norm: Tensor, expert_norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The input of the router, in fp32, and that of the experts."""
        epsilon = self.spec.norm_epsilon
        router_input = ops.rms_norm(x.float(), router_norm, epsilon)
        return router_input, ops.rms_norm(x, expert_norm, epsilon)

    def _router_scores(
        self, x: Tensor, context: ForwardContext, importance: Tensor | None
    ) -> Scores:
        moe_index, coresets = sum(self.spec.moe[: self.layer]), context.coresets
        slots = self.store.capacity
        return Scores(
            logits=ops.linear(x, self.gate, dtype=torch.float32),
            router=self.spec.router,
            bias=self.bias,
            expert_scale=self.expert_scale,
            voters=context.voters,
            progress=context.progress,
            importance=importance,
            resident=self.store.resident(self.layer),
            slots=None if slots is None else min(slots, self.spec.router.experts),
            previous_coresets=None if coresets is None else coresets.previous_coresets(moe_index),
            layer=self.layer,
            moe_index=moe_index,
            forward_indices=context.forward,
            starts=context.window.start.to(x.device) if self.spec.router.capacity else None,
        )


def _route(scores: Scores, context: ForwardContext) -> Routing:
    """The routing of a forward; the tokens of a finished block are routed on their own."""
    count, commit_policy = context.committed, context.commit_policy
    if not count or commit_policy is None:
        return route(scores, context.policy)
    finished = replace(scores.positions(0, count), voters=None, previous_coresets=None)
    live = replace(scores.positions(count), voters=None)
    return join_routings(
        scores.logits.shape[0], route(finished, commit_policy), route(live, context.policy)
    )
