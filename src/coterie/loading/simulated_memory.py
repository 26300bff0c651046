"""A model behind a smaller memory than it has, which is imagined: any model can be asked so."""

from __future__ import annotations

from dataclasses import replace

import torch

from coterie.errors import CoterieError
from coterie.loading.expert_memory import (
    AUTO,
    ExpertMemoryConfig,
    ExpertMemoryPlan,
    plan_expert_memory,
)
from coterie.model.moe import MoE
from coterie.model.spec import ModelSpec
from coterie.model.transformer import Transformer
from coterie.model.weights import expert_bytes
from coterie.offload.simulated_store import SimulatedCacheStore


def plan_simulated_cache(
    config: ExpertMemoryConfig, spec: ModelSpec, dtype: torch.dtype
) -> ExpertMemoryPlan:
    """What such a memory comes to, where an expert weighs what it weighs here.

    Raises CoterieError for less than one expert, and for what nobody can imagine: how much is free,
    what stands between, a second precision.
    """
    for option, is_given in (
        ("auto", config.capacity == AUTO),
        ("--host-memory", config.host_memory is not None),
        ("--coarse", config.fallback_model is not None),
        ("--cpu-experts", config.cpu_experts is not None),
    ):
        if is_given:
            raise CoterieError(
                f"{option} has no effect on a memory that is imagined; --expert-memory is a real one"
            )
    return plan_expert_memory(
        config, spec, dtype, expert_bytes=expert_bytes(spec, dtype), free_bytes=None
    )


def simulate_cache(
    transformer: Transformer, plan: ExpertMemoryPlan
) -> tuple[Transformer, SimulatedCacheStore]:
    """The same weights and experts; policies are told who would be in such a memory."""
    feed_forwards = [layer.feed_forward for layer in transformer.layers]
    store = SimulatedCacheStore(
        next(feed_forward.store for feed_forward in feed_forwards if isinstance(feed_forward, MoE)),
        plan.experts,
        plan.slots,
        plan.config.eviction,
        warm_votes={} if plan.config.warm_start is None else plan.config.warm_start.by_layer(),
        expert_bytes=plan.expert_bytes,
        device=transformer.device,
    )
    for layer in transformer.spec.moe_layers:
        store.resident(layer)
    layers = tuple(
        replace(layer, feed_forward=replace(feed_forward, store=store))
        if isinstance(feed_forward, MoE)
        else layer
        for layer, feed_forward in zip(transformer.layers, feed_forwards, strict=True)
    )
    return replace(transformer, layers=layers), store
