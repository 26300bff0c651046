"""The published tensor names of a family, and the target of each tensor."""

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
    """Published name -> target, for every tensor that a checkpoint of this model must have.

    A layer's experts are three tensors [E, ...] in ``stacked`` checkpoints, else three per expert.
    A quantised weight is two tensors. Packed experts are one tensor per layer.
    """
    targets = dict(_outer_targets(names, spec))
    for layer in range(spec.layers):
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
    yield "model.norm.weight", TensorTarget("norm", (spec.hidden,))
    if not spec.tie_embeddings:
        yield "lm_head.weight", TensorTarget("head", (spec.vocabulary, spec.hidden))


def _attention_targets(names: TensorNames, spec: ModelSpec, layer: int) -> TargetPairs:
    source, weight = f"model.layers.{layer}", f"layers.{layer}"
    attention = f"{source}.{names.attention}"
    width, hidden, head = spec.heads * spec.head_dim, (spec.hidden,), (spec.head_dim,)
    yield f"{source}.input_layernorm.weight", TensorTarget(f"{weight}.attention_norm", hidden)
    yield (
        f"{source}.post_attention_layernorm.weight",
        TensorTarget(f"{weight}.feed_forward_norm", hidden),
    )
    yield f"{attention}.{names.query_norm}.weight", TensorTarget(f"{weight}.query_norm", head)
    yield f"{attention}.{names.key_norm}.weight", TensorTarget(f"{weight}.key_norm", head)
    yield f"{attention}.{names.out}.weight", TensorTarget(f"{weight}.out", (spec.hidden, width))
    for name, rows in zip(names.qkv, _qkv_rows(names, spec), strict=True):
        shape = (rows.stop - rows.start, spec.hidden)
        yield f"{attention}.{name}.weight", TensorTarget(f"{weight}.qkv", shape, (rows,))


def _qkv_rows(names: TensorNames, spec: ModelSpec) -> tuple[slice, ...]:
    if len(names.qkv) == 1:
        return (slice(0, spec.qkv_rows),)
    keys = spec.heads * spec.head_dim
    values = keys + spec.kv_heads * spec.head_dim
    return slice(0, keys), slice(keys, values), slice(values, spec.qkv_rows)


def _feed_forward_targets(
    names: TensorNames, spec: ModelSpec, layer: int, *, stacked: bool
) -> TargetPairs:
    source, weight = f"model.layers.{layer}", f"layers.{layer}"
    hidden, experts = spec.hidden, spec.router.experts
    if not spec.moe[layer]:
        yield from _mlp_targets(f"{source}.mlp", f"{weight}.dense", hidden, spec.dense_width)
        return
    yield f"{source}.mlp.gate.weight", TensorTarget(f"{weight}.gate", (experts, hidden))
    if spec.expert_bias:
        yield f"{source}.{names.gate_bias}", TensorTarget(f"{weight}.gate_bias", (experts,))
    if spec.shared_width:
        shared = f"{source}.{names.shared}"
        yield from _mlp_targets(shared, f"{weight}.shared", hidden, spec.shared_width)
    experts_source, experts_weight = f"{source}.mlp.experts", f"{weight}.experts"
    if spec.panels:
        packed = f"{experts_weight}.{PACKED_NAME}"
        yield packed_name(layer), TensorTarget(packed, packed_shape(spec), dtype=torch.uint8)
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
