"""LLaDA-MoE-7B-A1B: softmax router without renormalisation, bidirectional attention."""

from __future__ import annotations

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
    "{% if message.role == 'user' %}<role>HUMAN</role>"
    "{% elif message.role == 'system' %}<role>SYSTEM</role>"
    "{% else %}<role>ASSISTANT</role>"
    "{% endif %}{{ message.content }}<|role_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def read_spec(config: ModelConfig) -> ModelSpec:
    """The spec of a config; raises ConfigError, with the key, if the family does not support it."""
    _check_supported(config)
    has_bias = config.flag("moe_router_enable_expert_bias", False)
    return model_spec(
        config,
        _router(config, has_bias=has_bias),
        moe=_moe_layers(config, layer_count(config)),
        dense_width="dense_intermediate_size",
        expert_width="expert_intermediate_size",
        shared_width=config.optional_size("shared_expert_intermediate_size", minimum=0) or 0,
        expert_bias=has_bias,
        has_head_dim_key=False,
    )


def _check_supported(config: ModelConfig) -> None:
    check_supported(config)
    config.allow_only("qk_layernorm", True)
    # The released code never renormalises and never scales, whatever its config says.
    config.allow_only("norm_topk_prob", False, None)
    config.allow_only("routed_scaling_factor", 1, None)
    config.allow_only("moe_router_score_function", "softmax")
    for key in ("clip_qkv", "router_num_group", "router_topk_group"):
        config.allow_only(key, None)


def _moe_layers(config: ModelConfig, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: ``moe_layer_freq`` is 0 or 1 per layer; absent = all."""
    frequencies = config.get("moe_layer_freq")
    if frequencies is None:
        return (True,) * layers
    if not isinstance(frequencies, list) or any(
        type(x) is not int or x not in (0, 1) for x in frequencies
    ):
        raise config.error("moe_layer_freq", f"is {quote(frequencies)}, not a list of 0 and 1")
    if len(frequencies) != layers:
        raise config.error("moe_layer_freq", f"lists {len(frequencies)} of {layers} layers")
    return tuple(bool(x) for x in frequencies)


def _router(config: ModelConfig, *, has_bias: bool) -> RouterSpec:
    experts = expert_count(config)
    return RouterSpec(
        experts=experts,
        k=experts_per_token(config, experts),
        activation="softmax",
        renormalise=False,
        biased_weight=has_bias,
    )


FAMILY = Family(
    name="llada-moe",
    title="LLaDA-MoE",
    architecture="LLaDAMoEModelLM",
    model_types=("llada", "lladamoe", "llada_moe"),
    read_spec=read_spec,
    tensor_names=SPLIT_QKV_NAMES,
    defaults=FamilyDefaults(
        block=32,
        block_causal=False,
        kv_cache="dual:before=16,after=16",
        unmask="threshold:p=0.9",
        mask_id=156895,
        eos_ids=(156892,),
        chat_template=CHAT_TEMPLATE,
    ),
    read_defaults=read_block_size,
)
