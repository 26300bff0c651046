"""Sizes of random models to draw from, as keys of their configs, and their logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from coterie.loading.load import Model
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.routing import Vanilla
from coterie.values import Window

VOCABULARY = 96
LAYER_KINDS = ("sliding_attention", "full_attention")


def random_tokens(count: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits_in_parts(model: Model, tokens: Tensor, bounds: Sequence[int], block: int) -> Tensor:
    """Logits [N, V] of one sequence, in forwards over a cache from each bound to the next."""
    cache = KVCache.allocate(model.spec, 1, len(tokens), dtype=torch.float32)
    parts = []
    for start, stop in pairwise(bounds):
        window = Window(torch.tensor([start]), stop - start, torch.tensor([stop]), block)
        context = ForwardContext(window, cache, Vanilla())
        parts.append(model.transformer(tokens[None, start:stop], context))
    return torch.cat(parts)


@st.composite
def part_bounds(draw: st.DrawFn, length: int, block: int) -> list[int]:
    """Bounds of forwards that compute whole blocks, of which the last may be unfinished."""
    inner = range(block, length, block)
    return [0, *(bound for bound in inner if draw(st.booleans())), length]


@st.composite
def sizes(draw: st.DrawFn, *, head_dims: Sequence[int] = (4, 8, 12, 20)) -> dict[str, Any]:
    """Keys that families other than DiffusionGemma share."""
    kv_heads, experts = draw(st.integers(1, 3)), draw(st.integers(4, 20))
    return {
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from(head_dims)),
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(4, experts))),
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def gemma_keys(
    draw: st.DrawFn, *, last_layer: Sequence[str] = LAYER_KINDS, least_window: int = 1
) -> dict[str, Any]:
    """Keys of DiffusionGemma, with one of these kinds as the last layer."""
    types = [draw(st.sampled_from(LAYER_KINDS)) for _ in range(draw(st.integers(0, 3)))]
    types.append(draw(st.sampled_from(last_layer)))
    heads, experts = draw(st.sampled_from((2, 4, 6))), draw(st.integers(2, 20))
    divisors = st.sampled_from([n for n in (1, 2, 3) if heads % n == 0])
    full = {"head_dim": draw(st.sampled_from((8, 16, 24))), "num_key_value_heads": draw(divisors)}
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1000000.0,
            "partial_rotary_factor": draw(st.sampled_from((0.25, 0.5, 1.0))),
        },
    }
    return {
        "num_hidden_layers": len(types),
        "layer_types": types,
        "rope_parameters": {kind: rope[kind] for kind in {*types}},
        "num_attention_heads": heads,
        "num_key_value_heads": draw(divisors),
        "head_dim": draw(st.sampled_from((4, 8, 12))),
        "per_layer_config": {
            str(layer): full for layer, kind in enumerate(types) if kind == "full_attention"
        },
        "sliding_window": draw(st.integers(least_window, 24)),
        "num_experts": experts,
        "top_k_experts": draw(st.integers(1, min(5, experts))),
        "intermediate_size": draw(st.sampled_from((9, 24))),
        "moe_intermediate_size": draw(st.sampled_from((5, 16))),
        "final_logit_softcapping": draw(st.sampled_from((5.0, 30.0))),
        "canvas_length": draw(st.integers(1, 12)),
    }
