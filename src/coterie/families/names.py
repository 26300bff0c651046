"""The published tensor names of a family, and the target of each tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from coterie.model.spec import ModelSpec
from coterie.model.weights import (
    HEAD,
    PACKED_NAME,
    TensorTarget,
    packed_shape,
    quant_format,
    weight_shapes,
)
from coterie.quantization import QuantFormat

Region = tuple[int | slice, ...]
NamedParts = Iterator[tuple[str, str, Region]]
"""The published name of a tensor, the weight that it belongs to, and its part of that weight."""


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
    shapes = weight_shapes(spec)
    parts = [*_outer_parts(names, spec)]
    for layer in range(spec.layers):
        parts += _vector_parts(names, layer)
        parts += _attention_parts(names, spec, layer)
        parts += _feed_forward_parts(names, spec, layer)
        if spec.moe[layer] and not spec.panels:
            parts += _expert_parts(names, spec, layer, stacked=stacked)
    targets = {
        name: TensorTarget(weight, _shape_of(shapes[weight], region), region)
        for name, weight, region in parts
    }
    stored: dict[str, TensorTarget] = {}
    for name, target in targets.items():
        form = quant_format(spec, target.weight)
        if form is None or target.weight == HEAD:
            stored[name] = target
        if form is not None:
            stored |= quantised_targets(form, name, target)
    if spec.panels:
        return stored | {packed_name(layer): _packed(spec, layer) for layer in spec.moe_layers}
    return stored


def is_stacked(tensors: set[str]) -> bool:
    """Whether a checkpoint with these tensor names has stacked experts."""
    suffixes = (".mlp.experts.gate_proj", ".mlp.experts.gate_proj.q")
    return any(name.endswith(suffixes) for name in tensors)


def quantised_targets(
    form: QuantFormat, name: str, target: TensorTarget
) -> Iterator[tuple[str, TensorTarget]]:
    """The two tensors of a quantised weight of this name."""
    for part, (shape, dtype) in form.parts(target.shape).items():
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


def _packed(spec: ModelSpec, layer: int) -> TensorTarget:
    weight = f"layers.{layer}.experts.{PACKED_NAME}"
    return TensorTarget(weight, packed_shape(spec), dtype=torch.uint8)


def _shape_of(shape: tuple[int, ...], region: Region) -> tuple[int, ...]:
    """The shape of a region of a weight."""
    spans = (part.stop - part.start for part in region if isinstance(part, slice))
    return (*spans, *shape[len(region) :])


def _outer_parts(names: TensorNames, spec: ModelSpec) -> NamedParts:
    yield names.embedding, "embedding", ()
    yield f"{names.stem}.norm.weight", "norm", ()
    if not spec.tie_embeddings:
        yield "lm_head.weight", "head", ()
    if spec.self_conditioning:
        source, weight = f"{names.stem}.self_conditioning", "self_conditioning"
        yield f"{source}.pre_norm.weight", f"{weight}.norm", ()
        yield from _mlp_parts(source, f"{weight}.dense", spec.self_conditioning)


def _vector_parts(names: TensorNames, layer: int) -> NamedParts:
    """The norms and scales of a layer."""
    for name, vector in names.vectors:
        yield f"{names.stem}.layers.{layer}.{name}", f"layers.{layer}.{vector}", ()
    for index, stem in enumerate(names.scale_stems):
        name = f"{stem}.layers.{layer}.layer_scalar"
        yield name, f"layers.{layer}.scales", (slice(index, index + 1),)


def _attention_parts(names: TensorNames, spec: ModelSpec, layer: int) -> NamedParts:
    weight = f"layers.{layer}"
    attention = f"{names.stem}.layers.{layer}.{names.attention}"
    yield f"{attention}.{names.query_norm}.weight", f"{weight}.query_norm", ()
    yield f"{attention}.{names.key_norm}.weight", f"{weight}.key_norm", ()
    yield f"{attention}.{names.out}.weight", f"{weight}.out", ()
    for name, rows in zip(names.qkv, _qkv_rows(names, spec, layer), strict=False):
        yield f"{attention}.{name}.weight", f"{weight}.qkv", (rows,)


def _qkv_rows(names: TensorNames, spec: ModelSpec, layer: int) -> tuple[slice, ...]:
    """The rows of each projection; none of values if the keys are the values."""
    attention, stop = spec.attention[layer], spec.qkv_rows(layer)
    if len(names.qkv) == 1:
        return (slice(0, stop),)
    keys = spec.heads * attention.head_dim
    values = keys + attention.kv_heads * attention.head_dim
    rows = slice(0, keys), slice(keys, values), slice(values, stop)
    return rows[:2] if attention.keys_are_values else rows


def _feed_forward_parts(names: TensorNames, spec: ModelSpec, layer: int) -> NamedParts:
    """All but the experts."""
    source, weight = f"{names.stem}.layers.{layer}", f"layers.{layer}"
    if not spec.moe[layer]:
        yield from _mlp_parts(f"{source}.mlp", f"{weight}.dense", spec.dense_width)
        return
    yield f"{source}.{names.gate}", f"{weight}.gate", ()
    if spec.expert_bias:
        yield f"{source}.{names.gate_bias}", f"{weight}.gate_bias", ()
    if spec.shared_width:
        yield from _mlp_parts(f"{source}.{names.shared}", f"{weight}.shared", spec.shared_width)


def _expert_parts(names: TensorNames, spec: ModelSpec, layer: int, *, stacked: bool) -> NamedParts:
    source, weight = f"{names.stem}.layers.{layer}.{names.experts}", f"layers.{layer}.experts"
    experts, width = spec.router.experts, spec.expert_width
    if not (stacked or names.fused_gate_up):
        for expert in range(experts):
            yield from _mlp_parts(f"{source}.{expert}", weight, width, (expert,))
        return
    if names.fused_gate_up:
        yield f"{source}.gate_up_proj", f"{weight}.gate_up", ()
    else:
        for name, rows in _gate_up_rows(width):
            yield f"{source}.{name}", f"{weight}.gate_up", (slice(0, experts), rows)
    yield f"{source}.down_proj", f"{weight}.down", ()


def _mlp_parts(source: str, weight: str, width: int, expert_index: Region = ()) -> NamedParts:
    """Gate, up and down of one network."""
    for name, rows in _gate_up_rows(width):
        yield f"{source}.{name}.weight", f"{weight}.gate_up", (*expert_index, rows)
    yield f"{source}.down_proj.weight", f"{weight}.down", expert_index


def _gate_up_rows(width: int) -> tuple[tuple[str, slice], ...]:
    """The rows of both projections in the fused weight: those of the gate are first."""
    return ("gate_proj", slice(0, width)), ("up_proj", slice(width, 2 * width))
