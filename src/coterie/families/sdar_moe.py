"""SDAR-30B-A3B: Qwen3's mixture of experts, block-causal in small blocks."""

from __future__ import annotations

from coterie.families import config as reading
from coterie.families.config import Config
from coterie.families.family import Defaults, Family
from coterie.families.names import SPLIT
from coterie.model.spec import ModelSpec
from coterie.values import RouterSpec

TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read(config: Config) -> ModelSpec:
    """Raise a CoterieError that names the key when the config is not one this family can be."""
    _refuse_other_models(config)
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    layers = config.size("num_hidden_layers")
    dim = reading.head_dim(config, hidden, heads)
    moe = _moe_layers(config, layers)
    experts = config.size("num_experts")
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
        expert_width=config.size("moe_intermediate_size"),
        shared_width=0,
        moe=moe,
        router=RouterSpec(
            experts=experts,
            k=reading.chosen_experts(config, experts),
            activation="softmax",
            renormalise=config.flag("norm_topk_prob", False),
        ),
        expert_bias=False,
        tied=config.flag("tie_word_embeddings", False),
        max_length=config.size("max_position_embeddings"),
    )
    config.finish()
    return spec


def _refuse_other_models(config: Config) -> None:
    config.only("attention_bias", False)
    config.only("use_sliding_window", False)
    config.only("hidden_act", "silu")
    config.only("rope_scaling", None)


def _moe_layers(config: Config, layers: int) -> tuple[bool, ...]:
    """Every ``decoder_sparse_step``-th layer has experts, but for those in ``mlp_only_layers``."""
    step = config.optional_size("decoder_sparse_step") or 1
    listed = config.get("mlp_only_layers")
    dense = [] if listed is None else listed
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise config.error("mlp_only_layers", f"is {listed!r}, not a list of layer numbers")
    if outside := [layer for layer in dense if not 0 <= layer < layers]:
        raise config.error("mlp_only_layers", f"names layer {outside[0]} of {layers}")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _dense_width(config: Config, moe: tuple[bool, ...]) -> int:
    stated = config.optional_size("intermediate_size")
    if stated is None and not all(moe):
        raise config.error("intermediate_size", "is missing, and some layers are dense")
    return stated if stated is not None and not all(moe) else 0


FAMILY = Family(
    name="sdar-moe",
    title="SDAR-MoE",
    architecture="SDARMoeForCausalLM",
    model_types=("sdar_moe",),
    read=read,
    names=SPLIT,
    defaults=Defaults(
        block=4,
        block_causal=True,
        plan="block-causal",
        unmask="dynamic:p=0.95,steps=4",
        mask_id=151669,
        eos_ids=(151643, 151645),
        template=TEMPLATE,
    ),
)
