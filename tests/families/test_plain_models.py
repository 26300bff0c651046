"""Checkpoints of many sizes against short code of their descriptions, in fp32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_models import PlainGemma, PlainLLaDA22, accepted_by_entropy
from policy_strategies import law
from safetensors.torch import load_file

from coterie.lab.parity.canvas import CASES, canvas_deviations
from coterie.loading.load import load_model
from coterie.model.cache import KVCache
from coterie.model.checkpoint import SINGLE_FILE
from coterie.model.forward_context import ForwardContext
from coterie.routing import Vanilla
from coterie.telemetry import Recorder
from coterie.testing import write_checkpoint
from coterie.values import Window

VOCABULARY = 96


def drawn(count: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


@st.composite
def llada22_keys(draw: st.DrawFn) -> dict[str, Any]:
    layers, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    experts = draw(st.integers(4, 20))
    k = draw(st.integers(1, min(4, experts)))
    return {
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from((4, 8, 12, 20))),
        "first_k_dense_replace": draw(st.integers(0, layers - 1)),
        "num_experts": experts,
        "num_experts_per_tok": k,
        "expert_capacity": draw(st.integers(k, experts)),
        "block_size": draw(st.sampled_from((1, 2, 4, 16, 64))),
        "num_shared_experts": draw(st.integers(0, 2)),
        "moe_intermediate_size": draw(st.sampled_from((5, 16))),
        "routed_scaling_factor": draw(st.sampled_from((1.0, 2.5))),
        "tie_word_embeddings": draw(st.booleans()),
    }


@given(llada22_keys(), st.integers(1, 40), st.integers(0, 9), st.data())
@law(25)
def test_llada22_of_any_size_is_its_description(
    tmp_path_factory: pytest.TempPathFactory,
    keys: dict[str, Any],
    length: int,
    seed: int,
    data: st.DataObject,
) -> None:
    """Forwards of whole blocks, and of the unfinished last one, over a cache."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), "llada2.2", seed, **keys)
    config, tensors = read_folder(folder)
    tokens, block = drawn(length, seed), keys["block_size"]
    model = load_model(folder, dtype=torch.float32, device="cpu")
    bounds = [*range(0, length, block), length]
    bounds = [0, *(b for b in bounds[1:-1] if data.draw(st.booleans())), length]
    cache = KVCache.allocate(model.spec, 1, length, dtype=torch.float32)
    parts = []
    for start, stop in pairwise(bounds):
        view = Window(torch.tensor([start]), stop - start, torch.tensor([stop]), block)
        context = ForwardContext(view, cache, Vanilla(), Recorder())
        with torch.inference_mode():
            parts.append(model.transformer(tokens[None, start:stop], context))
    expected = PlainLLaDA22(config, tensors).logits(tokens)
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-4, rtol=1e-4)


@st.composite
def gemma_keys(draw: st.DrawFn) -> dict[str, Any]:
    kinds = ("sliding_attention", "full_attention")
    types = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
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
        "sliding_window": draw(st.integers(1, 24)),
        "num_experts": experts,
        "top_k_experts": draw(st.integers(1, min(5, experts))),
        "intermediate_size": draw(st.sampled_from((9, 24))),
        "moe_intermediate_size": draw(st.sampled_from((5, 16))),
        "final_logit_softcapping": draw(st.sampled_from((5.0, 30.0))),
        "canvas_length": draw(st.integers(1, 12)),
    }


@given(gemma_keys(), st.lists(st.integers(1, 30), min_size=1, max_size=2), st.integers(0, 9))
@law(25)
def test_diffusion_gemma_of_any_size_is_its_description(
    tmp_path_factory: pytest.TempPathFactory,
    keys: dict[str, Any],
    prompts: list[int],
    seed: int,
) -> None:
    """Two steps, the second with self-conditioning, by the tool that compares reference folders."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), "diffusion-gemma", seed, **keys)
    config, tensors = read_folder(folder)
    cases = [plain_case(config, tensors, length, seed) for length in prompts]
    logits = 3 * torch.randn(9, 20, generator=torch.Generator().manual_seed(seed))
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    bounds = ("0.0", "0.7", "3.0", "100.0")
    acceptance = {
        "logits": logits.tolist(),
        "entropy": entropy.tolist(),
        "accepted_by_bound": {text: accepted_by_entropy(entropy, float(text)) for text in bounds},
    }
    (folder / CASES).write_text(json.dumps({"cases": cases, "entropy_acceptance": acceptance}))
    deviations = list(canvas_deviations(folder))
    assert len(deviations) == 2 * len(prompts) + 1 + len(bounds)
    assert [each for each in deviations if not each.within_tolerance] == []


def plain_case(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], length: int, seed: int
) -> dict[str, object]:
    plain, temperature = PlainGemma(config, tensors), 0.7
    prompt, *canvases = (drawn(n, seed + n) for n in (length, *(config["canvas_length"],) * 2))
    canvases[1] = canvases[1].roll(1)
    plain.encode(prompt)
    first = plain.decode(canvases[0], None)
    second = plain.decode(canvases[1], first / temperature)
    return {
        "prompt": prompt.tolist(),
        "canvas_1": canvases[0].tolist(),
        "canvas_2": canvases[1].tolist(),
        "logits_1": first.tolist(),
        "logits_2": second.tolist(),
        "temperature": temperature,
    }


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / SINGLE_FILE)
