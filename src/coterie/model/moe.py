"""The feed-forward part of a layer: a dense network, or a router with experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coterie import ops
from coterie.model.forward_context import ForwardContext
from coterie.model.spec import ModelSpec
from coterie.routing import route
from coterie.values import ExpertRequest, ExpertStore, Matrix, Routing, Scores


class FeedForward(Protocol):
    """x [B, W, H] -> [B, W, H]; importance [B, W] only if the policy needs it."""

    def __call__(self, x: Tensor, context: ForwardContext, importance: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Dense:
    """A SwiGLU network: down(silu(gate(x)) * up(x))."""

    gate_up: Matrix  # [2 I, H], gate rows first
    down: Matrix  # [H, I]

    def __call__(self, x: Tensor, context: ForwardContext, importance: Tensor | None) -> Tensor:
        del context, importance
        return self.apply(x)

    def apply(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., H] -> [..., H], plus ``residual`` (fp32, same number of elements)."""
        return ops.swiglu(x, self.gate_up, self.down, residual)


@dataclass(frozen=True)
class MoE:
    """A router, experts served by a store, and optionally a shared expert."""

    spec: ModelSpec
    layer: int
    gate: Matrix  # [E, H] fp32
    bias: Tensor | None  # [E] fp32, for selection
    shared: Dense | None
    store: ExpertStore

    def __call__(self, x: Tensor, context: ForwardContext, importance: Tensor | None) -> Tensor:
        scores = self._router_scores(x, context, importance)
        routing = route(scores, context.policy)
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
            part = ops.run_experts(flat, routing, slab)
            out = part if out is None else out.add_(part)
        if out is None:  # no expert is used
            out = torch.zeros(flat.shape, dtype=torch.float32, device=x.device)
        if self.shared is None:
            return out.to(x.dtype).view_as(x)
        return self.shared.apply(x, out)

    def _router_scores(
        self, x: Tensor, context: ForwardContext, importance: Tensor | None
    ) -> Scores:
        ordinal, coresets = sum(self.spec.moe[: self.layer]), context.coresets
        return Scores(
            logits=ops.linear(x, self.gate, dtype=torch.float32),
            router=self.spec.router,
            bias=self.bias,
            voters=context.voters,
            progress=context.progress,
            importance=importance,
            resident=self.store.resident(self.layer),
            slots=self.store.slots(self.layer),
            previous_coresets=None if coresets is None else coresets.previous_coresets(ordinal),
            layer=self.layer,
            moe_index=ordinal,
            forward_indices=context.forward,
            starts=context.window.start.to(x.device) if self.spec.router.capacity else None,
        )
