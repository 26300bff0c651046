"""DiffusionGemma: an encoder and a decoder over one set of weights, and canvases of random noise.

A dense network stands beside the experts of each layer. Sliding and full attention differ in their
heads and in RoPE.
"""

from __future__ import annotations

from collections.abc import Mapping

from coterie.families.common import (
    EXPERT_FORMAT_KEY,
    check_supported,
    dense_format,
    expert_count,
    experts_per_token,
    has_packed_experts,
    layer_count,
    stored_format,
)
from coterie.families.config import ModelConfig
from coterie.families.family import Family, FamilyDefaults
from coterie.families.names import ENCODER_DECODER_NAMES
from coterie.model.spec import AttentionSpec, ModelSpec
from coterie.values import NO_MASK, RouterSpec

CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "<|turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content }}<turn|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n<|channel>thought\n<channel|>{% endif %}"
)
SLIDING, FULL = "sliding_attention", "full_attention"
OTHER_KEYS = ("boi_token_id", "eoi_token_id", "image_token_id", "vision_config")
"""Top-level keys about images, which are not supported."""


def read_spec(config: ModelConfig) -> ModelSpec:
    """The spec of a config; raises ConfigError, with the key, if the family does not support it."""
    text = config.section("text_config")
    check_supported(config)
    _check_supported(text)
    for key in OTHER_KEYS:
        config.get(key)
    config.allow_only("tie_word_embeddings", True)
    attention = _layer_attention(text)
    experts = expert_count(text)
    k = experts_per_token(text, experts, "top_k_experts")
    form, hidden = stored_format(config, EXPERT_FORMAT_KEY), text.size("hidden_size")
    spec = ModelSpec(
        vocabulary=text.size("vocab_size"),
        hidden=hidden,
        layers=len(attention),
        heads=text.size("num_attention_heads"),
        kv_heads=attention[0].kv_heads,
        head_dim=attention[0].head_dim,
        rotary_dim=attention[0].rotary_dim,
        rope_theta=attention[0].rope_theta,
        norm_epsilon=text.number("rms_norm_eps"),
        dense_width=0,
        expert_width=text.size("moe_intermediate_size"),
        shared_width=text.size("intermediate_size"),
        moe=(True,) * len(attention),
        router=RouterSpec(experts, k, "softmax", renormalise=True),
        expert_bias=False,
        tie_embeddings=True,
        max_length=text.size("max_position_embeddings"),
        layer_attention=attention,
        activation="gelu-tanh",
        embedding_scale=hidden**0.5,
        logit_cap=text.number("final_logit_softcapping"),
        parallel_dense=True,
        self_conditioning=text.size("intermediate_size"),
        block=config.size("canvas_length"),
        expert_format=form,
        dense_format=dense_format(config),
        panels=has_packed_experts(config, form),
    )
    text.check_unknown_keys()
    config.check_unknown_keys()
    return spec


def _check_supported(text: ModelConfig) -> None:
    check_supported(text)
    text.allow_only("hidden_activation", "gelu_pytorch_tanh")
    text.allow_only("tie_word_embeddings", True)
    text.allow_only("use_bidirectional_attention", "vision", None)


def _layer_attention(text: ModelConfig) -> tuple[AttentionSpec, ...]:
    """The attention of each layer, from ``layer_types`` and the sizes of full layers."""
    count, types = layer_count(text), text.get("layer_types")
    if not isinstance(types, list) or len(types) != count or not {*types} <= {SLIDING, FULL}:
        raise text.error("layer_types", f"is not a list of {count} times {SLIDING} or {FULL}")
    ropes = {name: text.section("rope_parameters").section(name) for name in {*types}}
    layers = tuple(
        _attention(kind, ropes[kind], *_head_sizes(text, layer, kind), text=text)
        for layer, kind in enumerate(types)
    )
    for rope in ropes.values():
        rope.check_unknown_keys()
    heads = text.size("num_attention_heads")
    if any(heads % layer.kv_heads for layer in layers):
        raise text.error("num_attention_heads", f"is {heads}, no multiple of the KV heads")
    return layers


def _head_sizes(text: ModelConfig, layer: int, kind: str) -> tuple[int, int]:
    """Head size and KV heads of a layer.

    ``per_layer_config`` holds those of single layers; older configs have two keys for all full
    layers.
    """
    head_dim, kv_heads = text.size("head_dim"), text.size("num_key_value_heads")
    full_head_dim = text.optional_size("global_head_dim")
    full_kv_heads = text.optional_size("num_global_key_value_heads")
    if kind == FULL:
        head_dim, kv_heads = full_head_dim or head_dim, full_kv_heads or kv_heads
    single_layers = text.get("per_layer_config")
    if not isinstance(single_layers, Mapping) or str(layer) not in single_layers:
        return head_dim, kv_heads
    own = text.section("per_layer_config").section(str(layer))
    sizes = own.optional_size("head_dim"), own.optional_size("num_key_value_heads")
    own.check_unknown_keys()
    return sizes[0] or head_dim, sizes[1] or kv_heads


def _attention(
    kind: str, rope: ModelConfig, head_dim: int, kv_heads: int, *, text: ModelConfig
) -> AttentionSpec:
    if head_dim % 2:
        raise text.error("head_dim", f"is {head_dim}; RoPE needs an even number")
    rope.allow_only("rope_type", "default" if kind == SLIDING else "proportional")
    fraction = rope.number("partial_rotary_factor", 1.0)
    if kind == SLIDING and fraction != 1.0:
        raise rope.error("partial_rotary_factor", f"is {fraction} in {SLIDING}")
    return AttentionSpec(
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        rope_theta=rope.number("rope_theta"),
        rope_angles=int(fraction * head_dim // 2) if kind == FULL else 0,
        window=text.size("sliding_window") if kind == SLIDING else 0,
        scale=1.0,
        norms_values=True,
        keys_are_values=kind == FULL,
    )


FAMILY = Family(
    name="diffusion-gemma",
    title="DiffusionGemma",
    architecture="DiffusionGemmaForBlockDiffusion",
    model_types=("diffusion_gemma",),
    read_spec=read_spec,
    tensor_names=ENCODER_DECODER_NAMES,
    defaults=FamilyDefaults(
        block=256,
        block_causal=False,
        kv_cache="encoder",
        unmask="renoise",
        mask_id=NO_MASK,
        eos_ids=(1, 106, 50),
        chat_template=CHAT_TEMPLATE,
        hidden_span=("<|channel>", "<channel|>"),
    ),
)
