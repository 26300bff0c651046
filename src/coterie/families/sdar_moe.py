"""SDAR-30B-A3B: Qwen3's mixture of experts, block-causal in small blocks."""

from __future__ import annotations

from dataclasses import replace

from coterie.errors import quote
from coterie.families.common import (
    check_supported,
    expert_count,
    experts_per_token,
    layer_count,
    model_spec,
    read_block_size,
)
from coterie.families.config import ModelConfig
from coterie.families.family import Family, FamilyDefaults
from coterie.families.names import SPLIT_QKV_NAMES
from coterie.model.spec import ModelSpec
from coterie.values import RouterSpec

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_spec(config: ModelConfig) -> ModelSpec:
    """The spec of a config; raises ConfigError, with the key, if the family does not support it."""
    check_supported(config)
    experts = expert_count(config)
    router = RouterSpec(
        experts=experts,
        k=experts_per_token(config, experts),
        activation="softmax",
        renormalise=config.flag("norm_topk_prob", False),
    )
    return model_spec(
        config,
        router,
        moe=_moe_layers(config, layer_count(config)),
        dense_width="intermediate_size",
        expert_width="moe_intermediate_size",
    )


def read_defaults(config: ModelConfig, defaults: FamilyDefaults) -> FamilyDefaults:
    """The block of the checkpoint, with as many denoising steps as it has tokens."""
    defaults = read_block_size(config, defaults)
    return replace(defaults, unmask=f"dynamic:p=0.95,steps={defaults.block}")


def _moe_layers(config: ModelConfig, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: every ``decoder_sparse_step``-th, except ``mlp_only_layers``."""
    step = config.optional_size("decoder_sparse_step") or 1
    mlp_only = config.get("mlp_only_layers")
    dense = [] if mlp_only is None else mlp_only
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise config.error("mlp_only_layers", f"is {quote(mlp_only)}, not a list of layer numbers")
    if out_of_range := [layer for layer in dense if not 0 <= layer < layers]:
        raise config.error("mlp_only_layers", f"names layer {out_of_range[0]} of {layers}")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


FAMILY = Family(
    name="sdar-moe",
    title="SDAR-MoE",
    architecture="SDARMoeForCausalLM",
    model_types=("sdar_moe",),
    read_spec=read_spec,
    tensor_names=SPLIT_QKV_NAMES,
    defaults=FamilyDefaults(
        block=4,
        block_causal=True,
        kv_cache="block-causal",
        unmask="dynamic:p=0.95,steps=4",
        mask_id=151669,
        eos_ids=(151643, 151645),
        chat_template=CHAT_TEMPLATE,
    ),
    read_defaults=read_defaults,
)
