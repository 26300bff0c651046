"""Logits of random checkpoints against transformers' models of the same layers, in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from model_strategies import gemma_keys, logits_in_parts, part_bounds, random_tokens, sizes
from peer_process import SEEDS, PeerProcess, fresh
from safetensors.torch import save_file
from torch import Tensor

from coterie.lab.parity.canvas import CASES, canvas_deviations
from coterie.loading.load import load_model
from coterie.testing import random_tensors, tiny_config, write_checkpoint

pytestmark = pytest.mark.peers

TOLERANCE = 4e-6  # of the largest logit
GEMMA_TOLERANCE = 5e-5  # its attention has no scale: errors of rounding grow with the scores
MIN_MARGIN = 1e-5  # scores of experts may differ by less than this between two programs

Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]  # config and weights


@st.composite
def sdar_moe_keys(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(sizes())
    layers = range(keys["num_hidden_layers"])
    return keys | {
        "hidden_size": draw(st.sampled_from((27, 32, 40))),
        "moe_intermediate_size": draw(st.sampled_from((5, 16))),
        "norm_topk_prob": draw(st.booleans()),
        "mlp_only_layers": draw(st.lists(st.sampled_from(layers), max_size=len(layers) - 1)),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-5))),
        "rope_theta": draw(st.sampled_from((1e4, 1e6))),
    }


def qwen3_moe(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    return config | {"model_type": "qwen3_moe"}, dict(tensors)


@st.composite
def llada_moe_keys(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(sizes())
    return keys | {
        "hidden_size": keys["num_attention_heads"] * keys["head_dim"],
        "expert_intermediate_size": draw(st.sampled_from((5, 16))),
        "moe_layer_freq": [1] * keys["num_hidden_layers"],
        "rope_theta": draw(st.sampled_from((1e4, 5e4))),
    }


def olmoe(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    changes = {
        "model_type": "olmoe",
        "intermediate_size": config["expert_intermediate_size"],
        "norm_topk_prob": False,
    }
    return config | changes, dict(tensors)


@st.composite
def llada2_keys(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(sizes())
    groups, size = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    kept = draw(st.integers(1, groups))
    return keys | {
        "hidden_size": draw(st.sampled_from((27, 32, 40))),
        "num_experts": groups * size,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw(st.integers(1, kept * size)),
        "first_k_dense_replace": draw(st.integers(0, keys["num_hidden_layers"] - 1)),
        "num_shared_experts": draw(st.integers(1, 2)),
        "moe_intermediate_size": draw(st.sampled_from((5, 16))),
        "routed_scaling_factor": draw(st.sampled_from((1.0, 2.5))),
    }


def glm4_moe(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    """LLaDA2's checkpoint under GLM4-MoE's names; one expert per token keeps its sigmoid."""
    changes = {
        "model_type": "glm4_moe",
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": config["num_shared_experts"],
        "norm_topk_prob": config["num_experts_per_tok"] > 1,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
    }
    heads, kv_heads, dim = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    rows = [count * dim for count in (heads, kv_heads, kv_heads)]
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "query_key_value" not in name:
            split[name] = tensor
            continue
        for projection, part in zip("qkv", tensor.split(rows), strict=True):
            split[name.replace("query_key_value", f"{projection}_proj")] = part
    return config | changes, {glm4_name(name): tensor for name, tensor in split.items()}


def glm4_name(name: str) -> str:
    for ours, theirs in GLM4_NAMES.items():
        name = name.replace(ours, theirs)
    return name


GLM4_NAMES = {
    "word_embeddings": "embed_tokens",
    ".attention.": ".self_attn.",
    "dense.weight": "o_proj.weight",
    "query_layernorm": "q_norm",
    "key_layernorm": "k_norm",
    "gate.expert_bias": "gate.e_score_correction_bias",
}
COUNTERPARTS: dict[str, tuple[st.SearchStrategy[dict[str, Any]], Callable[..., Checkpoint]]] = {
    "sdar-moe": (sdar_moe_keys(), qwen3_moe),
    "llada-moe": (llada_moe_keys(), olmoe),
    "llada2": (llada2_keys(), glm4_moe),
}


@pytest.mark.parametrize("family", COUNTERPARTS)
@given(st.data())
@fresh(30)
def test_a_random_checkpoint_has_the_logits_of_transformers(
    family: str,
    huggingface: PeerProcess,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    """LLaDA-MoE in one forward of full attention, the others by blocks over a cache."""
    strategy, counterpart = COUNTERPARTS[family]
    keys, length, seed = data.draw(st.tuples(strategy, st.integers(1, 40), SEEDS))
    block = 0 if family == "llada-moe" else data.draw(st.sampled_from((1, 2, 4, 16, 64)))
    bounds = data.draw(part_bounds(length, block)) if block else [0, length]
    ours, theirs = (tmp_path_factory.mktemp(name) for name in ("ours", "theirs"))
    model = load_model(write_checkpoint(ours, family, seed, **keys), dtype=torch.float32)
    config = tiny_config(family, **keys)
    write(theirs, *counterpart(config, random_tensors(config, seed)))
    tokens = random_tokens(length, seed)
    reply = huggingface.call("logits", folder=str(theirs), tokens=tokens.tolist(), block=block)
    assume(reply["margin"] > MIN_MARGIN)
    logits = logits_in_parts(model, tokens, bounds, block)
    assert deviation(logits, reply["logits"]) <= TOLERANCE


VISION = {  # of the image encoder, which transformers needs and text does not
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 8,
}
NO_ACCEPTANCE = {"logits": [[0.0]], "entropy": [0.0], "accepted_by_bound": {}}


def transformers_gemma_keys() -> st.SearchStrategy[dict[str, Any]]:
    """Transformers' last layer is always full, and its windows of 1 keep the whole prompt.

    Under a low cap, the largest logit would not show how large the numbers before it are.
    """
    keys = gemma_keys(last_layer=["full_attention"], least_window=2)
    return keys.map(lambda values: values | {"final_logit_softcapping": 50.0})


@given(transformers_gemma_keys(), st.integers(1, 30), SEEDS)
@fresh(30)
def test_a_random_diffusion_gemma_has_the_logits_of_transformers(
    huggingface: PeerProcess,
    tmp_path_factory: pytest.TempPathFactory,
    keys: dict[str, Any],
    length: int,
    seed: int,
) -> None:
    """Two steps, the second with self-conditioning."""
    folder, theirs = (tmp_path_factory.mktemp(name) for name in ("ours", "theirs"))
    write_checkpoint(folder, "diffusion-gemma", seed, **keys)
    config = tiny_config("diffusion-gemma", **keys)
    write(theirs, config | {"vision_config": VISION}, random_tensors(config, seed))
    tokens = random_tokens(length + 2 * keys["canvas_length"], seed)
    prompt, *canvases = tokens.split([length, *(keys["canvas_length"],) * 2])
    case: dict[str, object] = {"prompt": prompt.tolist(), "temperature": 0.7}
    reply = huggingface.call(
        "canvas", folder=str(theirs), canvases=[canvas.tolist() for canvas in canvases], **case
    )
    assume(reply["margin"] > MIN_MARGIN)
    for step, (canvas, logits) in enumerate(zip(canvases, reply["logits"], strict=True), start=1):
        case |= {f"canvas_{step}": canvas.tolist(), f"logits_{step}": logits}
    cases = {"cases": [case], "entropy_acceptance": NO_ACCEPTANCE}
    (folder / CASES).write_text(json.dumps(cases))
    errors = [each.max_error for each in canvas_deviations(folder) if "logits" in each.name]
    largest = torch.tensor(reply["logits"]).abs().amax(dim=(1, 2))
    assert bool((torch.tensor(errors) <= GEMMA_TOLERANCE * largest).all())


def deviation(ours: Tensor, theirs: list[list[float]]) -> float:
    """The largest error, as a share of the largest logit."""
    expected = torch.tensor(theirs)
    assert ours.shape == expected.shape
    return float((ours - expected).abs().max() / expected.abs().max())


def write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
