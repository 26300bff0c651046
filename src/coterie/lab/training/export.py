"""Writes a network as a checkpoint in the official LLaDA2 layout."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save

from coterie.errors import CheckpointError
from coterie.files import atomic_write, atomic_write_json
from coterie.lab.training.network import NetworkShape, TrainingNetwork


def save_network(network: TrainingNetwork, folder: Path, **token_ids: int) -> None:
    """Write ``config.json`` and ``model.safetensors``: bf16 weights and fp32 selection biases.

    ``token_ids`` are further keys of ``config.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: weight.to(torch.float32 if name.endswith("expert_bias") else torch.bfloat16).clone(
            memory_format=torch.contiguous_format
        )
        for name, weight in network.checkpoint_tensors().items()
    }
    atomic_write(folder / "model.safetensors", save(tensors, {"format": "pt"}))
    atomic_write_json(folder / "config.json", {**hf_config(network.shape), **token_ids})


def load_network(network: TrainingNetwork, folder: Path) -> None:
    """Read a checkpoint of the same shape into a network; raises CheckpointError for another."""
    tensors = load_file(folder / "model.safetensors")
    views = network.checkpoint_tensors()
    if tensors.keys() != views.keys():
        raise CheckpointError(
            f"{folder}: tensors differ: {sorted(tensors.keys() ^ views.keys())[:3]}"
        )
    for name, view in views.items():
        view.copy_(tensors[name])


def hf_config(shape: NetworkShape) -> dict[str, object]:
    """The official keys of ``config.json``, which omit the mask id."""
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "hidden_act": "silu",
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_bias": False,
        "norm_head": False,
        "tie_word_embeddings": False,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "output_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "rope_scaling": None,
        "output_router_logits": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "norm_softmax": False,
        "use_rmsnorm": True,
        "using_split_qkv_in_self_attention": False,
        "dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.dense_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "first_k_dense_replace": shape.dense_layers,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.k,
        "n_group": shape.groups,
        "topk_group": shape.topk_groups,
        "moe_intermediate_size": shape.expert_width,
        "num_shared_experts": shape.shared_experts,
        "routed_scaling_factor": shape.routed_scale,
        "partial_rotary_factor": shape.rotary_fraction,
        "rotary_dim": int(shape.head_dim * shape.rotary_fraction),
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.epsilon,
        "max_position_embeddings": shape.max_length,
        "pad_token_id": shape.vocab_size - 1,
    }
