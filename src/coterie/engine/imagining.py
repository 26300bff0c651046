"""A model behind a smaller memory than it has, which is imagined: any model can be asked so."""

from __future__ import annotations

from dataclasses import replace

import torch

from coterie.engine.memory import AUTO, Memory, Settled, settle
from coterie.experts.imagined import Imagined
from coterie.model.moe import MoE
from coterie.model.spec import ModelSpec
from coterie.model.transformer import Transformer
from coterie.model.weights import expert_bytes
from coterie.naming import CoterieError


def imagined_room(asked: Memory, spec: ModelSpec, dtype: torch.dtype) -> Settled:
    """What such a memory comes to, where an expert weighs what it weighs here.

    Raises CoterieError for less than one expert, and for what nobody can imagine: how much is free,
    what stands between, a second precision.
    """
    for what, there in (
        ("auto", asked.fast == AUTO),
        ("--host-memory", asked.host is not None),
        ("--coarse", asked.coarse is not None),
        ("--cpu-experts", asked.aside is not None),
    ):
        if there:
            raise CoterieError(
                f"{what} has no effect on a memory that is imagined; --expert-memory is a real one"
            )
    return settle(asked, spec, dtype, expert_bytes=expert_bytes(spec, dtype), free=None)


def imagine(transformer: Transformer, memory: Settled) -> tuple[Transformer, Imagined]:
    """The same weights and experts; policies are told who would be in such a memory."""
    networks = [layer.feed_forward for layer in transformer.layers]
    store = Imagined(
        next(one.store for one in networks if isinstance(one, MoE)),
        memory.experts,
        memory.slots,
        memory.asked.eviction,
        warm={} if memory.asked.warm is None else memory.asked.warm.by_layer(),
        expert_bytes=memory.expert_bytes,
        device=transformer.device,
    )
    for layer in transformer.spec.moe_layers:
        store.resident(layer)
    layers = tuple(
        replace(layer, feed_forward=replace(one, store=store)) if isinstance(one, MoE) else layer
        for layer, one in zip(transformer.layers, networks, strict=True)
    )
    return replace(transformer, layers=layers), store
