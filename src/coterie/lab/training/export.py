"""Writes a network as a checkpoint in the official LLaDA2 layout."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from coterie.checkpoints.source import find_folder
from coterie.files import atomic_write, atomic_write_json
from coterie.lab.training.network import NetworkShape, TrainingNetwork
from coterie.strict_json import read_object


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


def hf_config(shape: NetworkShape) -> dict[str, object]:
    """The official keys of ``config.json``, which omit the mask id."""
    shipped = read_object(find_folder(None, ()) / "config.json")
    del shipped["mask_token_id"]
    return {
        **shipped,
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
