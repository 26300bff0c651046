"""LLaDA-MoE-7B-A1B: softmax router without renormalising, attention in both directions."""

from __future__ import annotations

from coterie.families import config as reading
from coterie.families.config import Config
from coterie.families.family import Defaults, Family
from coterie.families.names import SPLIT
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
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    layers = config.size("num_hidden_layers")
    if hidden % heads:
        raise config.error("num_attention_heads", f"is {heads}, no divisor of hidden_size {hidden}")
    dim = hidden // heads
    moe = _moe_layers(config, layers)
    biased = config.flag("moe_router_enable_expert_bias", False)
    spec = ModelSpec(
        vocabulary=config.size("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=reading.key_value_heads(config, heads),
        head_dim=dim,
        rotary_dim=reading.rotary_dim(config, dim, default=1.0),
        rope_theta=config.number("rope_theta"),
        norm_epsilon=config.number("rms_norm_eps"),
        dense_width=_dense_width(config, moe),
        expert_width=config.size("expert_intermediate_size"),
        shared_width=config.optional_size("shared_expert_intermediate_size", least=0) or 0,
        moe=moe,
        router=_router(config, biased=biased),
        expert_bias=biased,
        tied=config.flag("tie_word_embeddings", False),
        max_length=config.size("max_position_embeddings"),
    )
    config.finish()
    return spec


def _refuse_other_models(config: Config) -> None:
    config.only("attention_bias", False)
    config.only("use_sliding_window", False)
    config.only("qk_layernorm", True)
    # The released code never renormalises and never scales, whatever its config says.
    config.only("norm_topk_prob", False, None)
    config.only("routed_scaling_factor", 1, None)
    config.only("hidden_act", "silu")
    config.only("moe_router_score_function", "softmax")
    for key in ("rope_scaling", "clip_qkv", "router_num_group", "router_topk_group"):
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


def _dense_width(config: Config, moe: tuple[bool, ...]) -> int:
    stated = config.optional_size("dense_intermediate_size")
    if stated is None and not all(moe):
        raise config.error("dense_intermediate_size", "is missing, and some layers are dense")
    return stated if stated is not None and not all(moe) else 0


def _router(config: Config, *, biased: bool) -> RouterSpec:
    experts = config.size("num_experts")
    return RouterSpec(
        experts=experts,
        k=reading.chosen_experts(config, experts),
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
