"""Writes a network as a checkpoint in the official LLaDA2 layout."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from coterie.checkpoints.source import find_folder
from coterie.files import atomic_write, atomic_write_json
from coterie.keys import keys_of
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
    config = read_object(find_folder(None, ()) / "config.json")  # of the embedded model
    del config["mask_token_id"]
    for attribute, key in keys_of(NetworkShape).items():
        config |= dict.fromkeys(key.aliases, getattr(shape, attribute))
    rotary = int(shape.head_dim * shape.rotary_fraction)
    return {**config, "rotary_dim": rotary, "pad_token_id": shape.vocab_size - 1}
