"""LLaDA2.0, 2.1 and 2.2, mini and flash: sigmoid router with bias and groups, block-causal."""

from __future__ import annotations

from coterie.families.config import Config
from coterie.families.family import Defaults, Family
from coterie.families.names import FUSED
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
    "{% if messages[0].role != 'system' %}"
    "<role>SYSTEM</role>detailed thinking off<|role_end|>"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}"
    "<role>SYSTEM</role>{{ message.content }}\ndetailed thinking off<|role_end|>"
    "{% elif message.role == 'user' %}<role>HUMAN</role>{{ message.content }}<|role_end|>"
    "{% else %}<role>ASSISTANT</role>{{ message.content }}<|role_end|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def read(config: Config) -> ModelSpec:
    """Raise a CoterieError that names the key when the config is not one this family can be."""
    _refuse_other_models(config)
    layers = layer_count(config)
    dense = config.optional_size("first_k_dense_replace", least=0) or 0
    if dense > layers:
        raise config.error("first_k_dense_replace", f"is {dense} of {layers} layers")
    return model_spec(
        config,
        _router(config),
        moe=tuple(layer >= dense for layer in range(layers)),
        dense_width="intermediate_size",
        expert_width="moe_intermediate_size",
        shared_width=_shared_width(config),
        expert_bias=config.flag("moe_router_enable_expert_bias", True),
        turning=None,
        capacity=config.optional_size("expert_capacity") or 0,
    )


def _refuse_other_models(config: Config) -> None:
    refuse_other_models(config)
    for key in ("use_qkv_bias", "use_bias", "norm_head", "norm_softmax"):
        config.only(key, False)
    config.only("using_split_qkv_in_self_attention", False)
    config.only("use_qk_norm", True)
    config.only("use_rmsnorm", True)
    config.only("norm_topk_prob", True)
    config.only("score_function", "sigmoid")
    config.only("router_dtype", "fp32", "float32", None)
    config.only("num_nextn_predict_layers", 0, None)


def _shared_width(config: Config) -> int:
    """Shared experts act as one network of their summed width."""
    each = config.size("moe_intermediate_size")
    stated = config.optional_size("moe_shared_expert_intermediate_size")
    if stated not in (None, each):
        raise config.error("moe_shared_expert_intermediate_size", f"is {stated}, not {each}")
    return each * (config.optional_size("num_shared_experts", least=0) or 0)


def _router(config: Config) -> RouterSpec:
    experts = expert_count(config)
    k = chosen_experts(config, experts)
    groups, kept = config.size("n_group"), config.size("topk_group")
    if experts % groups:
        raise config.error("n_group", f"is {groups}, no divisor of num_experts {experts}")
    if kept > groups:
        raise config.error("topk_group", f"is {kept}, more than n_group {groups}")
    size = experts // groups
    if groups > 1 and size < 2:
        raise config.error("n_group", f"leaves {size} expert a group; a group's score needs two")
    if k > kept * size:
        raise config.error("num_experts_per_tok", f"is {k}; {kept} groups of {size} hold fewer")
    return RouterSpec(
        experts=experts,
        k=k,
        activation="sigmoid",
        renormalise=k > 1,
        scale=config.number("routed_scaling_factor", 1.0),
        groups=groups,
        kept_groups=kept,
        epsilon=1e-20,
    )


FAMILY = Family(
    name="llada2",
    title="LLaDA2.x",
    architecture="LLaDA2MoeModelLM",
    model_types=("llada2_moe", "llada2_moe_veomni"),
    read=read,
    names=FUSED,
    defaults=Defaults(
        block=32,
        block_causal=True,
        plan="block-causal",
        unmask="threshold:p=0.9",
        mask_id=156895,
        eos_ids=(156892,),
        template=TEMPLATE,
    ),
)
