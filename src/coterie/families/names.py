"""The published tensor names of a family, and the target of each tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from coterie.model.spec import ModelSpec
from coterie.model.weights import (
    PACKED_NAME,
    TensorTarget,
    packed_shape,
    quantised_parts,
    weight_shapes,
)
from coterie.quantization import QuantFormat

TargetPairs = Iterator[tuple[str, TensorTarget]]


@dataclass(frozen=True)
class TensorNames:
    """The tensor names that differ between families.

    ``qkv`` is one fused tensor, or three in the order query, key, value.
    """

    embedding: str
    attention: str
    qkv: tuple[str, ...]
    out: str
    query_norm: str
    key_norm: str
    gate_bias: str
    shared: str
    stem: str = "model"  # of layers, the final norm and self-conditioning
    vectors: tuple[tuple[str, str], ...] = (  # of a layer, and their weights
        ("input_layernorm.weight", "attention_norm"),
        ("post_attention_layernorm.weight", "feed_forward_norm"),
    )
    scale_stems: tuple[str, ...] = ()  # of the scales of passes that encode, and of others
    gate: str = "mlp.gate.weight"
    experts: str = "mlp.experts"
    fused_gate_up: bool = False  # stacked experts have one tensor for gate and up
    skipped: tuple[str, ...] = ()  # starts of names that are no part of the language model


FUSED_QKV_NAMES = TensorNames(
    embedding="model.word_embeddings.weight",
    attention="attention",
    qkv=("query_key_value",),
    out="dense",
    query_norm="query_layernorm",
    key_norm="key_layernorm",
    gate_bias="mlp.gate.expert_bias",
    shared="mlp.shared_experts",
)
SPLIT_QKV_NAMES = TensorNames(
    embedding="model.embed_tokens.weight",
    attention="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="o_proj",
    query_norm="q_norm",
    key_norm="k_norm",
    gate_bias="mlp.expert_bias",
    shared="shared_expert",
)
ENCODER_DECODER_NAMES = replace(
    SPLIT_QKV_NAMES,
    embedding="model.decoder.embed_tokens.weight",
    shared="mlp",
    stem="model.decoder",
    vectors=(
        ("input_layernorm.weight", "attention_norm"),
        ("post_attention_layernorm.weight", "attention_post_norm"),
        ("pre_feedforward_layernorm.weight", "dense_norm"),
        ("post_feedforward_layernorm_1.weight", "dense_post_norm"),
        ("pre_feedforward_layernorm_2.weight", "expert_norm"),
        ("post_feedforward_layernorm_2.weight", "expert_post_norm"),
        ("post_feedforward_layernorm.weight", "feed_forward_post_norm"),
        ("router.scale", "gate_norm"),
        ("router.per_expert_scale", "expert_scale"),
    ),
    scale_stems=("model.encoder.language_model", "model.decoder"),
    gate="router.proj.weight",
    experts="experts",
    fused_gate_up=True,
    skipped=("model.encoder.vision_tower.", "model.encoder.embed_vision."),
)


def weight_map(names: TensorNames, spec: ModelSpec, *, stacked: bool) -> dict[str, TensorTarget]:
    """Published name -> target, for every tensor that a checkpoint of this model must have.

    A layer's experts are three tensors [E, ...] in ``stacked`` checkpoints, else three per expert.
    A quantised weight is two tensors. Packed experts are one tensor per layer.
    """
    targets = dict(_outer_targets(names, spec))
    shapes = weight_shapes(spec)
    for layer in range(spec.layers):
        targets |= dict(_vector_targets(names, layer, shapes))
        targets |= dict(_attention_targets(names, spec, layer))
        targets |= dict(_feed_forward_targets(names, spec, layer, stacked=stacked))
    form = spec.expert_format
    if form is None or spec.panels:
        return targets
    stored: dict[str, TensorTarget] = {}
    for name, target in targets.items():
        stored |= quantised_targets(form, name, target) if is_expert(target) else {name: target}
    return stored


def is_stacked(tensors: set[str]) -> bool:
    """Whether a checkpoint with these tensor names has stacked experts."""
    suffixes = (".mlp.experts.gate_proj", ".mlp.experts.gate_proj.q")
    return any(name.endswith(suffixes) for name in tensors)


def quantised_targets(form: QuantFormat, name: str, target: TensorTarget) -> TargetPairs:
    """The two tensors of a quantised expert weight of this name."""
    for part, (shape, dtype) in quantised_parts(form, target.shape).items():
        yield f"{name}.{part}", TensorTarget(f"{target.weight}.{part}", shape, target.region, dtype)


def packed_name(layer: int) -> str:
    """The name of the tensor with all packed experts of a layer."""
    return f"model.layers.{layer}.mlp.experts.{PACKED_NAME}"


def layer_of(target: TensorTarget) -> int:
    """The layer of a target that belongs to one."""
    return int(target.weight.split(".")[1])


def is_expert(target: TensorTarget) -> bool:
    """Whether the target is a weight of a routed expert."""
    return ".experts." in target.weight


def _outer_targets(names: TensorNames, spec: ModelSpec) -> TargetPairs:
    yield names.embedding, TensorTarget("embedding", (spec.vocabulary, spec.hidden))
    yield f"{names.stem}.norm.weight", TensorTarget("norm", (spec.hidden,))
    if not spec.tie_embeddings:
        yield "lm_head.weight", TensorTarget("head", (spec.vocabulary, spec.hidden))
    if spec.self_conditioning:
        source, weight = f"{names.stem}.self_conditioning", "self_conditioning"
        yield f"{source}.pre_norm.weight", TensorTarget(f"{weight}.norm", (spec.hidden,))
        yield from _mlp_targets(source, f"{weight}.dense", spec.hidden, spec.self_conditioning)


def _vector_targets(
    names: TensorNames, layer: int, shapes: Mapping[str, tuple[int, ...]]
) -> TargetPairs:
    """The norms and scales of a layer."""
    for name, vector in names.vectors:
        weight = f"layers.{layer}.{vector}"
        yield f"{names.stem}.layers.{layer}.{name}", TensorTarget(weight, shapes[weight])
    for index, stem in enumerate(names.scale_stems):
        target = TensorTarget(f"layers.{layer}.scales", (1,), (slice(index, index + 1),))
        yield f"{stem}.layers.{layer}.layer_scalar", target


def _attention_targets(names: TensorNames, spec: ModelSpec, layer: int) -> TargetPairs:
    weight = f"layers.{layer}"
    attention = f"{names.stem}.layers.{layer}.{names.attention}"
    head_dim = spec.attention[layer].head_dim
    width, head = spec.heads * head_dim, (head_dim,)
    yield f"{attention}.{names.query_norm}.weight", TensorTarget(f"{weight}.query_norm", head)
    yield f"{attention}.{names.key_norm}.weight", TensorTarget(f"{weight}.key_norm", head)
    yield f"{attention}.{names.out}.weight", TensorTarget(f"{weight}.out", (spec.hidden, width))
    for name, rows in zip(names.qkv, _qkv_rows(names, spec, layer), strict=False):
        shape = (rows.stop - rows.start, spec.hidden)
        yield f"{attention}.{name}.weight", TensorTarget(f"{weight}.qkv", shape, (rows,))


def _qkv_rows(names: TensorNames, spec: ModelSpec, layer: int) -> tuple[slice, ...]:
    """The rows of each projection; none of values if the keys are the values."""
    attention, stop = spec.attention[layer], spec.qkv_rows(layer)
    if len(names.qkv) == 1:
        return (slice(0, stop),)
    keys = spec.heads * attention.head_dim
    values = keys + attention.kv_heads * attention.head_dim
    rows = slice(0, keys), slice(keys, values), slice(values, stop)
    return rows[:2] if attention.keys_are_values else rows


def _feed_forward_targets(
    names: TensorNames, spec: ModelSpec, layer: int, *, stacked: bool
) -> TargetPairs:
    source, weight = f"{names.stem}.layers.{layer}", f"layers.{layer}"
    hidden, experts = spec.hidden, spec.router.experts
    if not spec.moe[layer]:
        yield from _mlp_targets(f"{source}.mlp", f"{weight}.dense", hidden, spec.dense_width)
        return
    yield f"{source}.{names.gate}", TensorTarget(f"{weight}.gate", (experts, hidden))
    if spec.expert_bias:
        yield f"{source}.{names.gate_bias}", TensorTarget(f"{weight}.gate_bias", (experts,))
    if spec.shared_width:
        shared = f"{source}.{names.shared}"
        yield from _mlp_targets(shared, f"{weight}.shared", hidden, spec.shared_width)
    experts_source, experts_weight = f"{source}.{names.experts}", f"{weight}.experts"
    if spec.panels:
        packed = f"{experts_weight}.{PACKED_NAME}"
        yield packed_name(layer), TensorTarget(packed, packed_shape(spec), dtype=torch.uint8)
    elif names.fused_gate_up:
        yield from _fused_targets(experts_source, experts_weight, spec)
    elif stacked:
        yield from _stacked_targets(experts_source, experts_weight, spec)
    else:
        for expert in range(experts):
            prefix = f"{experts_source}.{expert}"
            yield from _mlp_targets(prefix, experts_weight, hidden, spec.expert_width, (expert,))


def _mlp_targets(
    source: str, weight: str, hidden: int, width: int, expert_index: tuple[int, ...] = ()
) -> TargetPairs:
    """Gate, up and down of one network; gate rows are first in the fused weight."""
    shape = (width, hidden)
    for name, rows in (("gate_proj", slice(0, width)), ("up_proj", slice(width, 2 * width))):
        target = TensorTarget(f"{weight}.gate_up", shape, (*expert_index, rows))
        yield f"{source}.{name}.weight", target
    yield f"{source}.down_proj.weight", TensorTarget(f"{weight}.down", shape[::-1], expert_index)


def _fused_targets(source: str, weight: str, spec: ModelSpec) -> TargetPairs:
    """The two tensors of a layer's stacked experts, if gate and up are one."""
    experts, hidden, width = spec.router.experts, spec.hidden, spec.expert_width
    gate_up = TensorTarget(f"{weight}.gate_up", (experts, 2 * width, hidden))
    yield f"{source}.gate_up_proj", gate_up
    yield f"{source}.down_proj", TensorTarget(f"{weight}.down", (experts, hidden, width))


def _stacked_targets(source: str, weight: str, spec: ModelSpec) -> TargetPairs:
    """The three tensors of a layer's stacked experts."""
    experts, hidden, width = spec.router.experts, spec.hidden, spec.expert_width
    for name, rows in (("gate_proj", slice(0, width)), ("up_proj", slice(width, 2 * width))):
        region = (slice(0, experts), rows)
        yield (
            f"{source}.{name}",
            TensorTarget(f"{weight}.gate_up", (experts, width, hidden), region),
        )
    yield f"{source}.down_proj", TensorTarget(f"{weight}.down", (experts, hidden, width))
