"""Logits of random checkpoints against transformers' models of the same layers, in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from model_strategies import logits_in_parts, part_bounds, random_tokens, sizes
from peer_process import PeerProcess
from safetensors.torch import save_file
from torch import Tensor

from coterie.loading.load import load_model
from coterie.testing import random_tensors, tiny_config, write_checkpoint

pytestmark = pytest.mark.peers

TOLERANCE = 4e-6  # of the largest logit
MIN_MARGIN = 1e-5  # scores of experts may differ by less than this between two programs
WORKER = Path(__file__).parent / "huggingface_worker.py"
FRESH = settings(
    max_examples=30,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SEEDS = st.integers(0, 2**32 - 1)

Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]  # config and weights


@pytest.fixture(scope="module")
def peer() -> Iterator[PeerProcess]:
    process = PeerProcess("transformers", WORKER)
    yield process
    process.close()


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
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for ours, theirs in GLM4_NAMES.items():
            name = name.replace(ours, theirs)
        if "query_key_value" in name:
            parts = zip("qkv", tensor.split(rows), strict=True)
            renamed |= {name.replace("query_key_value", f"{x}_proj"): part for x, part in parts}
        else:
            renamed[name] = tensor
    return config | changes, renamed


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
@given(st.data(), st.integers(1, 40), SEEDS)
@FRESH
def test_a_random_checkpoint_has_the_logits_of_transformers(
    family: str,
    peer: PeerProcess,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    length: int,
    seed: int,
) -> None:
    """LLaDA-MoE in one forward of full attention, the others by blocks over a cache."""
    strategy, counterpart = COUNTERPARTS[family]
    keys = data.draw(strategy)
    block = 0 if family == "llada-moe" else data.draw(st.sampled_from((1, 2, 4, 16, 64)))
    bounds = data.draw(part_bounds(length, block)) if block else [0, length]
    ours, theirs = (tmp_path_factory.mktemp(name) for name in ("ours", "theirs"))
    model = load_model(write_checkpoint(ours, family, seed, **keys), dtype=torch.float32)
    config = tiny_config(family, **keys)
    write(theirs, *counterpart(config, random_tensors(config, seed)))
    tokens = random_tokens(length, seed)
    reply = peer.call("logits", folder=str(theirs), tokens=tokens.tolist(), block=block)
    assume(reply["margin"] > MIN_MARGIN)
    logits = logits_in_parts(model, tokens, bounds, block)
    assert deviation(logits, reply["logits"]) <= TOLERANCE


def deviation(ours: Tensor, theirs: list[list[float]]) -> float:
    """The largest error, as a share of the largest logit."""
    expected = torch.tensor(theirs)
    assert ours.shape == expected.shape
    return float((ours - expected).abs().max() / expected.abs().max())


def write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
