"""LLaDA-MoE-7B-A1B: softmax router without renormalising, attention in both directions."""

from __future__ import annotations

from coterie.families.config import Config
from coterie.families.family import Defaults, Family
from coterie.families.names import SPLIT
from coterie.families.reading import (
    chosen_experts,
    expert_count,
    layer_count,
    model_spec,
    refuse_other_models,
)
from coterie.model.spec import ModelSpec
from coterie.values import RouterSpec

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<role>HUMAN</role>"
    "{% elif message.role == 'system' %}<role>SYSTEM</role>"
    "{% else %}<role>ASSISTANT</role>"
    "{% endif %}{{ message.content }}<|role_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def read(config: Config) -> ModelSpec:
    """Raise a CoterieError that names the key when the config is not one this family can be."""
    _refuse_other_models(config)
    biased = config.flag("moe_router_enable_expert_bias", False)
    return model_spec(
        config,
        _router(config, biased=biased),
        moe=_moe_layers(config, layer_count(config)),
        dense_width="dense_intermediate_size",
        expert_width="expert_intermediate_size",
        shared_width=config.optional_size("shared_expert_intermediate_size", least=0) or 0,
        expert_bias=biased,
        own_head_dim=False,
    )


def _refuse_other_models(config: Config) -> None:
    refuse_other_models(config)
    config.only("qk_layernorm", True)
    # The released code never renormalises and never scales, whatever its config says.
    config.only("norm_topk_prob", False, None)
    config.only("routed_scaling_factor", 1, None)
    config.only("moe_router_score_function", "softmax")
    for key in ("clip_qkv", "router_num_group", "router_topk_group"):
        config.only(key, None)


def _moe_layers(config: Config, layers: int) -> tuple[bool, ...]:
    """``moe_layer_freq``: a 0 or 1 for each layer; absent = all have experts."""
    listed = config.get("moe_layer_freq")
    if listed is None:
        return (True,) * layers
    if not isinstance(listed, list) or any(type(x) is not int or x not in (0, 1) for x in listed):
        raise config.error("moe_layer_freq", f"is {listed!r}, not a list of 0 and 1")
    if len(listed) != layers:
        raise config.error("moe_layer_freq", f"lists {len(listed)} of {layers} layers")
    return tuple(bool(x) for x in listed)


def _router(config: Config, *, biased: bool) -> RouterSpec:
    experts = expert_count(config)
    return RouterSpec(
        experts=experts,
        k=chosen_experts(config, experts),
        activation="softmax",
        renormalise=False,
        biased_weight=biased,
    )


FAMILY = Family(
    name="llada-moe",
    title="LLaDA-MoE",
    architecture="LLaDAMoEModelLM",
    model_types=("llada", "lladamoe", "llada_moe"),
    read=read,
    names=SPLIT,
    defaults=Defaults(
        block=32,
        block_causal=False,
        plan="dual:before=16,after=16",
        unmask="threshold:p=0.9",
        mask_id=156895,
        eos_ids=(156892,),
        template=TEMPLATE,
    ),
)
