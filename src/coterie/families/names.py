"""The official tensor names of a family, and where each tensor goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from coterie.model.spec import ModelSpec
from coterie.model.weights import PACKED, Place, packed_shape, parts
from coterie.quant import Format

Mapping = Iterator[tuple[str, Place]]


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


FUSED = TensorNames(
    embedding="model.word_embeddings.weight",
    attention="attention",
    qkv=("query_key_value",),
    out="dense",
    query_norm="query_layernorm",
    key_norm="key_layernorm",
    gate_bias="mlp.gate.expert_bias",
    shared="mlp.shared_experts",
)
SPLIT = TensorNames(
    embedding="model.embed_tokens.weight",
    attention="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="o_proj",
    query_norm="q_norm",
    key_norm="k_norm",
    gate_bias="mlp.expert_bias",
    shared="shared_expert",
)


def weight_map(names: TensorNames, spec: ModelSpec, *, stacked: bool) -> dict[str, Place]:
    """Official name -> place, for every tensor a checkpoint of this model must hold.

    ``stacked`` checkpoints hold a layer's experts as three tensors [E, ...], the others as three
    for each expert; of a quantised weight, its two parts. Packed experts are one tensor a layer.
    """
    places = dict(_around(names, spec))
    for layer in range(spec.layers):
        places |= dict(_attention(names, spec, layer))
        places |= dict(_feed_forward(names, spec, layer, stacked=stacked))
    form = spec.expert_format
    if form is None or spec.panels:
        return places
    return {
        stored: at
        for name, place in places.items()
        for stored, at in (quantised(form, name, place) if is_expert(place) else [(name, place)])
    }


def is_stacked(tensors: set[str]) -> bool:
    """Does a checkpoint with these tensor names hold its experts stacked."""
    ends = (".mlp.experts.gate_proj", ".mlp.experts.gate_proj.q")
    return any(name.endswith(ends) for name in tensors)


def quantised(form: Format, name: str, place: Place) -> Mapping:
    """What a quantised checkpoint holds in place of the expert's weight of this name."""
    for part, (shape, dtype) in parts(form, place.shape).items():
        yield f"{name}.{part}", Place(f"{place.target}.{part}", shape, place.region, dtype)


def packed_name(layer: int) -> str:
    """The tensor that holds all packed experts of a layer."""
    return f"model.layers.{layer}.mlp.experts.{PACKED}"


def layer_of(place: Place) -> int:
    """Whose weight goes here, where it is a layer's."""
    return int(place.target.split(".")[1])


def is_expert(place: Place) -> bool:
    """Does a routed expert's weight go here."""
    return ".experts." in place.target


def _around(names: TensorNames, spec: ModelSpec) -> Mapping:
    yield names.embedding, Place("embedding", (spec.vocabulary, spec.hidden))
    yield "model.norm.weight", Place("norm", (spec.hidden,))
    if not spec.tied:
        yield "lm_head.weight", Place("head", (spec.vocabulary, spec.hidden))


def _attention(names: TensorNames, spec: ModelSpec, layer: int) -> Mapping:
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    block = f"{theirs}.{names.attention}"
    yield f"{theirs}.input_layernorm.weight", Place(f"{ours}.attention_norm", (spec.hidden,))
    yield (
        f"{theirs}.post_attention_layernorm.weight",
        Place(f"{ours}.feed_forward_norm", (spec.hidden,)),
    )
    yield f"{block}.{names.query_norm}.weight", Place(f"{ours}.query_norm", (spec.head_dim,))
    yield f"{block}.{names.key_norm}.weight", Place(f"{ours}.key_norm", (spec.head_dim,))
    width = spec.heads * spec.head_dim
    yield f"{block}.{names.out}.weight", Place(f"{ours}.out", (spec.hidden, width))
    for name, rows in zip(names.qkv, _qkv_rows(names, spec), strict=True):
        shape = (rows.stop - rows.start, spec.hidden)
        yield f"{block}.{name}.weight", Place(f"{ours}.qkv", shape, (rows,))


def _qkv_rows(names: TensorNames, spec: ModelSpec) -> tuple[slice, ...]:
    if len(names.qkv) == 1:
        return (slice(0, spec.qkv_rows),)
    keys = spec.heads * spec.head_dim
    values = keys + spec.kv_heads * spec.head_dim
    return slice(0, keys), slice(keys, values), slice(values, spec.qkv_rows)


def _feed_forward(names: TensorNames, spec: ModelSpec, layer: int, *, stacked: bool) -> Mapping:
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    hidden, experts = spec.hidden, spec.router.experts
    if not spec.moe[layer]:
        yield from _network(f"{theirs}.mlp", f"{ours}.dense", hidden, spec.dense_width)
        return
    yield f"{theirs}.mlp.gate.weight", Place(f"{ours}.gate", (experts, hidden))
    if spec.expert_bias:
        yield f"{theirs}.{names.gate_bias}", Place(f"{ours}.gate_bias", (experts,))
    if spec.shared_width:
        yield from _network(f"{theirs}.{names.shared}", f"{ours}.shared", hidden, spec.shared_width)
    if spec.panels:
        at = Place(f"{ours}.experts.{PACKED}", packed_shape(spec), dtype=torch.uint8)
        yield packed_name(layer), at
        return
    if stacked:
        yield from _stack(f"{theirs}.mlp.experts", f"{ours}.experts", spec)
        return
    for expert in range(experts):
        prefix = f"{theirs}.mlp.experts.{expert}"
        yield from _network(prefix, f"{ours}.experts", hidden, spec.expert_width, (expert,))


def _network(theirs: str, ours: str, hidden: int, width: int, at: tuple[int, ...] = ()) -> Mapping:
    """Gate, up and down of one network; gate rows come first in the fused weight."""
    gate_up, gate, up = f"{ours}.gate_up", slice(0, width), slice(width, 2 * width)
    yield f"{theirs}.gate_proj.weight", Place(gate_up, (width, hidden), (*at, gate))
    yield f"{theirs}.up_proj.weight", Place(gate_up, (width, hidden), (*at, up))
    yield f"{theirs}.down_proj.weight", Place(f"{ours}.down", (hidden, width), at)


def _stack(theirs: str, ours: str, spec: ModelSpec) -> Mapping:
    """A whole layer's experts in three tensors."""
    experts, hidden, width = spec.router.experts, spec.hidden, spec.expert_width
    every, gate_up = slice(0, experts), f"{ours}.gate_up"
    gate, up = slice(0, width), slice(width, 2 * width)
    yield f"{theirs}.gate_proj", Place(gate_up, (experts, width, hidden), (every, gate))
    yield f"{theirs}.up_proj", Place(gate_up, (experts, width, hidden), (every, up))
    yield f"{theirs}.down_proj", Place(f"{ours}.down", (experts, hidden, width))
