"""LLaDA2.0, 2.1 and 2.2, mini and flash: sigmoid router with bias and groups, block-causal."""

from __future__ import annotations

from coterie.families import config as reading
from coterie.families.config import Config
from coterie.families.family import Defaults, Family
from coterie.families.names import FUSED
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
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    layers = config.size("num_hidden_layers")
    dim = reading.head_dim(config, hidden, heads)
    dense = config.optional_size("first_k_dense_replace", least=0) or 0
    if dense > layers:
        raise config.error("first_k_dense_replace", f"is {dense} of {layers} layers")
    spec = ModelSpec(
        vocabulary=config.size("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=reading.key_value_heads(config, heads),
        head_dim=dim,
        rotary_dim=reading.rotary_dim(config, dim, default=None),
        rope_theta=config.number("rope_theta"),
        norm_epsilon=config.number("rms_norm_eps"),
        dense_width=_dense_width(config, dense),
        expert_width=config.size("moe_intermediate_size"),
        shared_width=_shared_width(config),
        moe=tuple(layer >= dense for layer in range(layers)),
        router=_router(config),
        expert_bias=config.flag("moe_router_enable_expert_bias", True),
        tied=config.flag("tie_word_embeddings", False),
        max_length=config.size("max_position_embeddings"),
        capacity=config.optional_size("expert_capacity") or 0,
    )
    config.finish()
    return spec


def _refuse_other_models(config: Config) -> None:
    for key in ("use_qkv_bias", "use_bias", "norm_head", "norm_softmax", "use_sliding_window"):
        config.only(key, False)
    config.only("using_split_qkv_in_self_attention", False)
    config.only("use_qk_norm", True)
    config.only("use_rmsnorm", True)
    config.only("norm_topk_prob", True)
    config.only("hidden_act", "silu")
    config.only("score_function", "sigmoid")
    config.only("router_dtype", "fp32", "float32", None)
    config.only("rope_scaling", None)
    config.only("num_nextn_predict_layers", 0, None)


def _dense_width(config: Config, dense: int) -> int:
    stated = config.optional_size("intermediate_size")
    if dense and stated is None:
        raise config.error("intermediate_size", "is missing, and the first layers are dense")
    return stated if stated is not None and dense else 0


def _shared_width(config: Config) -> int:
    """Shared experts act as one network of their summed width."""
    each = config.size("moe_intermediate_size")
    stated = config.optional_size("moe_shared_expert_intermediate_size")
    if stated not in (None, each):
        raise config.error("moe_shared_expert_intermediate_size", f"is {stated}, not {each}")
    return each * (config.optional_size("num_shared_experts", least=0) or 0)


def _router(config: Config) -> RouterSpec:
    experts = config.size("num_experts")
    k = reading.chosen_experts(config, experts)
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
