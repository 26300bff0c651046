"""The official tensor names of a family, and where each tensor goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from coterie.model.spec import ModelSpec
from coterie.model.weights import PACKED_NAME, TensorTarget, packed_shape, quantised_parts
from coterie.quantization import QuantFormat

TargetPairs = Iterator[tuple[str, TensorTarget]]


@dataclass(frozen=True)
class TensorNames:
    """What differs between the families' names; the rest is the same for all.

    ``qkv`` is one fused tensor or three, in the order query, key, value.
    """

    embedding: str
    attention: str
    qkv: tuple[str, ...]
    out: str
    query_norm: str
    key_norm: str
    gate_bias: str
    shared: str


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


def weight_map(names: TensorNames, spec: ModelSpec, *, stacked: bool) -> dict[str, TensorTarget]:
    """Official name -> place, for every tensor a checkpoint of this model must hold.

    ``stacked`` checkpoints hold a layer's experts as three tensors [E, ...], the others as three
    for each expert; of a quantised weight, its two parts. Packed experts are one tensor a layer.
    """
    targets = dict(_outer_targets(names, spec))
    for layer in range(spec.layers):
        targets |= dict(_attention_targets(names, spec, layer))
        targets |= dict(_feed_forward_targets(names, spec, layer, stacked=stacked))
    form = spec.expert_format
    if form is None or spec.panels:
        return targets
    return {
        stored_name: stored_target
        for name, target in targets.items()
        for stored_name, stored_target in (
            quantised_targets(form, name, target) if is_expert(target) else [(name, target)]
        )
    }


def is_stacked(tensors: set[str]) -> bool:
    """Does a checkpoint with these tensor names hold its experts stacked."""
    suffixes = (".mlp.experts.gate_proj", ".mlp.experts.gate_proj.q")
    return any(name.endswith(suffixes) for name in tensors)


def quantised_targets(form: QuantFormat, name: str, target: TensorTarget) -> TargetPairs:
    """What a quantised checkpoint holds in place of the expert's weight of this name."""
    for part, (shape, dtype) in quantised_parts(form, target.shape).items():
        yield f"{name}.{part}", TensorTarget(f"{target.weight}.{part}", shape, target.region, dtype)


def packed_name(layer: int) -> str:
    """The tensor that holds all packed experts of a layer."""
    return f"model.layers.{layer}.mlp.experts.{PACKED_NAME}"


def layer_of(target: TensorTarget) -> int:
    """Whose weight goes here, where it is a layer's."""
    return int(target.weight.split(".")[1])


def is_expert(target: TensorTarget) -> bool:
    """Does a routed expert's weight go here."""
    return ".experts." in target.weight


def _outer_targets(names: TensorNames, spec: ModelSpec) -> TargetPairs:
    yield names.embedding, TensorTarget("embedding", (spec.vocabulary, spec.hidden))
    yield "model.norm.weight", TensorTarget("norm", (spec.hidden,))
    if not spec.tie_embeddings:
        yield "lm_head.weight", TensorTarget("head", (spec.vocabulary, spec.hidden))


def _attention_targets(names: TensorNames, spec: ModelSpec, layer: int) -> TargetPairs:
    source_prefix, weight_prefix = f"model.layers.{layer}", f"layers.{layer}"
    block = f"{source_prefix}.{names.attention}"
    yield (
        f"{source_prefix}.input_layernorm.weight",
        TensorTarget(f"{weight_prefix}.attention_norm", (spec.hidden,)),
    )
    yield (
        f"{source_prefix}.post_attention_layernorm.weight",
        TensorTarget(f"{weight_prefix}.feed_forward_norm", (spec.hidden,)),
    )
    yield (
        f"{block}.{names.query_norm}.weight",
        TensorTarget(f"{weight_prefix}.query_norm", (spec.head_dim,)),
    )
    yield (
        f"{block}.{names.key_norm}.weight",
        TensorTarget(f"{weight_prefix}.key_norm", (spec.head_dim,)),
    )
    width = spec.heads * spec.head_dim
    yield f"{block}.{names.out}.weight", TensorTarget(f"{weight_prefix}.out", (spec.hidden, width))
    for name, rows in zip(names.qkv, _qkv_rows(names, spec), strict=True):
        shape = (rows.stop - rows.start, spec.hidden)
        yield f"{block}.{name}.weight", TensorTarget(f"{weight_prefix}.qkv", shape, (rows,))


def _qkv_rows(names: TensorNames, spec: ModelSpec) -> tuple[slice, ...]:
    if len(names.qkv) == 1:
        return (slice(0, spec.qkv_rows),)
    keys = spec.heads * spec.head_dim
    values = keys + spec.kv_heads * spec.head_dim
    return slice(0, keys), slice(keys, values), slice(values, spec.qkv_rows)


def _feed_forward_targets(
    names: TensorNames, spec: ModelSpec, layer: int, *, stacked: bool
) -> TargetPairs:
    source_prefix, weight_prefix = f"model.layers.{layer}", f"layers.{layer}"
    hidden, experts = spec.hidden, spec.router.experts
    if not spec.moe[layer]:
        yield from _mlp_targets(
            f"{source_prefix}.mlp", f"{weight_prefix}.dense", hidden, spec.dense_width
        )
        return
    yield (
        f"{source_prefix}.mlp.gate.weight",
        TensorTarget(f"{weight_prefix}.gate", (experts, hidden)),
    )
    if spec.expert_bias:
        yield (
            f"{source_prefix}.{names.gate_bias}",
            TensorTarget(f"{weight_prefix}.gate_bias", (experts,)),
        )
    if spec.shared_width:
        yield from _mlp_targets(
            f"{source_prefix}.{names.shared}", f"{weight_prefix}.shared", hidden, spec.shared_width
        )
    if spec.panels:
        target = TensorTarget(
            f"{weight_prefix}.experts.{PACKED_NAME}", packed_shape(spec), dtype=torch.uint8
        )
        yield packed_name(layer), target
        return
    if stacked:
        yield from _stacked_targets(
            f"{source_prefix}.mlp.experts", f"{weight_prefix}.experts", spec
        )
        return
    for expert in range(experts):
        prefix = f"{source_prefix}.mlp.experts.{expert}"
        yield from _mlp_targets(
            prefix, f"{weight_prefix}.experts", hidden, spec.expert_width, (expert,)
        )


def _mlp_targets(
    source_prefix: str,
    weight_prefix: str,
    hidden: int,
    width: int,
    expert_index: tuple[int, ...] = (),
) -> TargetPairs:
    """Gate, up and down of one network; gate rows come first in the fused weight."""
    gate_up, gate, up = f"{weight_prefix}.gate_up", slice(0, width), slice(width, 2 * width)
    yield (
        f"{source_prefix}.gate_proj.weight",
        TensorTarget(gate_up, (width, hidden), (*expert_index, gate)),
    )
    yield (
        f"{source_prefix}.up_proj.weight",
        TensorTarget(gate_up, (width, hidden), (*expert_index, up)),
    )
    yield (
        f"{source_prefix}.down_proj.weight",
        TensorTarget(f"{weight_prefix}.down", (hidden, width), expert_index),
    )


def _stacked_targets(source_prefix: str, weight_prefix: str, spec: ModelSpec) -> TargetPairs:
    """A whole layer's experts in three tensors."""
    experts, hidden, width = spec.router.experts, spec.hidden, spec.expert_width
    all_experts, gate_up = slice(0, experts), f"{weight_prefix}.gate_up"
    gate, up = slice(0, width), slice(width, 2 * width)
    yield (
        f"{source_prefix}.gate_proj",
        TensorTarget(gate_up, (experts, width, hidden), (all_experts, gate)),
    )
    yield (
        f"{source_prefix}.up_proj",
        TensorTarget(gate_up, (experts, width, hidden), (all_experts, up)),
    )
    yield (
        f"{source_prefix}.down_proj",
        TensorTarget(f"{weight_prefix}.down", (experts, hidden, width)),
    )
