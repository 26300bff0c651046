"""Tiny random checkpoints of each family, on disk or in memory, in the official layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from coterie.families import Family, ModelConfig, detect_family
from coterie.families.names import weight_map
from coterie.model.checkpoint import INDEX_FILE, SINGLE_FILE
from coterie.model.spec import ModelSpec
from coterie.model.transformer import Transformer, build
from coterie.model.weights import allocate, slabs
from coterie.offload.resident_store import ResidentExpertStore

Json = bool | int | float | str | None | list[int] | list[str] | Mapping[str, "Json"]

COMMON_CONFIG: dict[str, Json] = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "eos_token_id": 94,
}
FAMILY_CONFIGS: dict[str, dict[str, Json]] = {
    "llada2": {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "head_dim": 8,
        "partial_rotary_factor": 0.5,
        "intermediate_size": 48,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "num_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "routed_scaling_factor": 2.5,
    },
    "llada-moe": {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "expert_intermediate_size": 16,
        "dense_intermediate_size": 48,
        "moe_layer_freq": [1, 1, 1],
        "norm_topk_prob": None,
        "moe_router_score_function": "softmax",
    },
    "sdar-moe": {
        "architectures": ["SDARMoeForCausalLM"],
        "model_type": "sdar_moe",
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "diffusion-gemma": {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": "float32",
        "canvas_length": 8,
        "tie_word_embeddings": True,
        "eos_token_id": 94,
        "text_config": {
            "hidden_activation": "gelu_pytorch_tanh",
            "use_bidirectional_attention": None,
            "final_logit_softcapping": 30.0,
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 24,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "per_layer_config": {"2": {"head_dim": 16, "num_key_value_heads": 1}},
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 6,
            "num_experts": 16,
            "top_k_experts": 4,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 1000000.0,
                    "partial_rotary_factor": 0.25,
                },
            },
        },
    },
}
FAMILY_CONFIGS["llada2.2"] = FAMILY_CONFIGS["llada2"] | {
    "expert_capacity": 8,
    "block_size": 32,
    "delete_token_id": 92,
    "split_token_id": 93,
}


def tiny_config(family: str, **overrides: Json) -> dict[str, Json]:
    """A small config of a key of ``FAMILY_CONFIGS``, with some keys overridden.

    The mask token, if there is one, is the last of the vocabulary. Keys of a ``text_config`` are
    overridden there.
    """
    family_config = FAMILY_CONFIGS[family]
    text = family_config.get("text_config")
    if isinstance(text, Mapping):
        inner = {key: value for key, value in overrides.items() if key in text}
        outer = {key: value for key, value in overrides.items() if key not in text}
        return {**family_config, "text_config": {**text, **inner}, **outer}
    config = COMMON_CONFIG | family_config | overrides
    vocabulary = config["vocab_size"]
    return {"mask_token_id": vocabulary - 1 if isinstance(vocabulary, int) else None} | config


def read_spec(config: Mapping[str, Json]) -> tuple[Family, ModelSpec]:
    """The family and spec of a config in memory."""
    source = ModelConfig(Path("config.json"), config)
    family = detect_family(source)
    return family, family.read_spec(source)


def write_checkpoint(
    folder: Path,
    family: str,
    seed: int = 0,
    *,
    shards: int = 1,
    stacked: bool = False,
    dtype: torch.dtype = torch.float32,
    **overrides: Json,
) -> Path:
    """Writes config and random weights of a tiny model; ``overrides`` replace config keys.

    Several shards get an index. ``stacked`` stores the experts of a layer as three tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **overrides)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = random_tensors(config, seed, stacked=stacked, dtype=dtype)
    if shards == 1:
        save_file(tensors, folder / SINGLE_FILE)
        return folder
    names = list(tensors)
    files = {
        name: f"layer-{index % shards}-ep-0-of-1.safetensors" for index, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def random_tensors(
    config: Mapping[str, Json],
    seed: int,
    *,
    stacked: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its official name; both layouts have the same values."""
    family, spec = read_spec(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _random_tensor(name, target.shape, generator).to(dtype)
        for name, target in weight_map(family.tensor_names, spec, stacked=False).items()
    }
    return _stack_experts(tensors, spec) if stacked and not _are_stacked(tensors) else tensors


def random_transformer(
    spec: ModelSpec, seed: int = 0, *, dtype: torch.dtype = torch.float32
) -> Transformer:
    """A transformer with random weights on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    weights = allocate(spec, dtype, torch.device("cpu"))
    for name, weight in weights.items():
        weight.copy_(_random_tensor(name, tuple(weight.shape), generator))
    return build(spec, weights, ResidentExpertStore(slabs(spec, weights)))


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values that keep the hidden state near unit size and the router's choices close."""
    noise = torch.randn(shape, generator=generator)
    if "bias" in name:
        return noise * 0.05
    if len(shape) == 1:
        return 1 + 0.1 * noise
    if "embed" in name:
        return noise
    return noise * shape[-1] ** -0.5 * (2.0 if name.endswith((".gate", ".gate.weight")) else 1.0)


def _are_stacked(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the family has no other layout than stacked experts."""
    return any(name.endswith(".experts.gate_up_proj") for name in tensors)


def _stack_experts(tensors: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    stacked = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for layer in spec.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        for part in ("gate_proj", "up_proj", "down_proj"):
            weights = [tensors[f"{prefix}.{e}.{part}.weight"] for e in range(spec.router.experts)]
            stacked[f"{prefix}.{part}"] = torch.stack(weights)
    return stacked
