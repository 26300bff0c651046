"""The weights of a transformer: names, shapes and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from coterie.model.spec import ModelSpec
from coterie.ops.packed_layout import slab_of_packed
from coterie.quantization import QuantFormat
from coterie.values import Slab

PACKED_NAME = "packed"
HEAD, MAPPED_HEAD = "head", "head.mapped"  # as in its file, in place of a copy
DENSE_MATRICES = (
    *(".qkv", ".out", ".dense.gate_up", ".dense.down"),
    *(".shared.gate_up", ".shared.down"),
)
"""The last parts of the names of dense matrices, besides the head."""
PARALLEL_VECTORS = (
    *("attention_norm", "attention_post_norm", "dense_norm", "dense_post_norm"),
    *("expert_post_norm", "feed_forward_post_norm", "scales"),
)
"""The vectors of a layer with a dense network beside its experts, besides those of its parts."""


@dataclass(frozen=True)
class TensorTarget:
    """The target of a checkpoint tensor of this shape: a region of one weight."""

    weight: str
    shape: tuple[int, ...]
    region: tuple[int | slice, ...] = ()
    dtype: torch.dtype | None = None  # required in the checkpoint; None = any float


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every weight; ``layers.3.experts.gate_up`` and ``.down`` form the layer's slab.

    Quantised weights have their unquantised shapes here; see ``loaded_tensors``.
    """
    shapes = {"embedding": (spec.vocabulary, spec.hidden), "norm": (spec.hidden,)}
    if not spec.tie_embeddings:
        shapes[HEAD] = (spec.vocabulary, spec.hidden)
    if spec.self_conditioning:
        shapes["self_conditioning.norm"] = (spec.hidden,)
        shapes |= _mlp_shapes("self_conditioning.dense", spec.hidden, spec.self_conditioning)
    for layer in range(spec.layers):
        for name, shape in (
            _attention_shapes(spec, layer) | _feed_forward_shapes(spec, layer)
        ).items():
            shapes[f"layers.{layer}.{name}"] = shape
    return shapes


def is_always_fp32(name: str) -> bool:
    """Whether a weight is fp32 in every dtype: the router decides on small differences."""
    return name.endswith((".gate", ".gate_bias", ".gate_norm", ".expert_scale"))


def quant_format(spec: ModelSpec, name: str) -> QuantFormat | None:
    """The format of a weight that is quantised; None for others."""
    if ".experts." in name:
        return spec.expert_format
    return spec.dense_format if name == HEAD or name.endswith(DENSE_MATRICES) else None


def weight_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of all weights; those that are not quantised have this dtype."""
    return sum(
        prod(shape) * stored_dtype.itemsize
        for _, shape, stored_dtype in loaded_tensors(spec, dtype)
    )


def expert_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of one routed expert."""
    tensor_sizes = (
        prod(shape) * stored_dtype.itemsize
        for name, shape, stored_dtype in loaded_tensors(spec, dtype)
        if name.startswith(f"layers.{spec.moe_layers[0]}.experts.")
    )
    return sum(tensor_sizes) // spec.router.experts if spec.moe_layers else 0


def loaded_tensors(
    spec: ModelSpec, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor in memory.

    A quantised weight consists of two tensors; a layer's packed experts are one tensor. A
    quantised head is also there as it was, because its rows decide between the best tokens.
    """
    for name, shape in weight_shapes(spec).items():
        if spec.panels and ".experts." in name:
            if name.endswith(".gate_up"):
                prefix = name.removesuffix(".gate_up")
                yield f"{prefix}.{PACKED_NAME}", packed_shape(spec), torch.uint8
            continue
        form = quant_format(spec, name)
        if form is None or name == HEAD:
            yield name, shape, torch.float32 if is_always_fp32(name) else dtype
        if form is not None:
            for part, (part_shape, part_dtype) in form.parts(shape).items():
                yield f"{name}.{part}", part_shape, part_dtype


def packed_shape(spec: ModelSpec) -> tuple[int, int]:
    """The shape of a layer's packed experts: one row per expert."""
    return spec.router.experts, spec.expert_stride


def is_packed(weight: str) -> bool:
    """Whether this is the tensor of a layer's packed experts."""
    return weight.endswith(f".experts.{PACKED_NAME}")


def allocate(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, *, experts: bool = True
) -> dict[str, Tensor]:
    """Uninitialised memory for every weight except packed experts, which are mapped from a file.

    With ``experts`` False, for no expert.
    """
    return {
        name: torch.empty(shape, dtype=stored_dtype, device=device)
        for name, shape, stored_dtype in loaded_tensors(spec, dtype)
        if not is_packed(name) and (experts or ".experts." not in name)
    }


def slabs(spec: ModelSpec, weights: dict[str, Tensor]) -> dict[int, Slab]:
    """One slab per MoE layer, over the memory of ``weights``: expert e is in slot e."""
    return {layer: take_slab(spec, layer, dict(weights)) for layer in spec.moe_layers}


def take_slab(spec: ModelSpec, layer: int, weights: dict[str, Tensor]) -> Slab:
    """The layer's slab; its experts are removed from ``weights``."""
    prefix = f"layers.{layer}.experts."
    names = [name for name in weights if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): weights.pop(name) for name in names}
    slot_of = torch.arange(spec.router.experts, device=next(iter(tensors.values())).device)
    if not spec.panels:
        return Slab.of(tensors, spec.expert_format, slot_of)
    sizes = {"hidden": spec.hidden, "width": spec.expert_width}
    return slab_of_packed(tensors[PACKED_NAME], spec.panel_kind, slot_of, **sizes)


def _attention_shapes(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, head_dim = spec.hidden, spec.attention[layer].head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "qkv": (spec.qkv_rows(layer), hidden),
        "query_norm": (head_dim,),
        "key_norm": (head_dim,),
        "out": (hidden, spec.heads * head_dim),
    }
    if not spec.parallel_dense:
        return shapes | {"feed_forward_norm": (hidden,)}
    return shapes | {name: (2 if name == "scales" else hidden,) for name in PARALLEL_VECTORS}


def _feed_forward_shapes(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    if not spec.moe[layer]:
        return _mlp_shapes("dense", spec.hidden, spec.dense_width)
    experts, width = spec.router.experts, spec.expert_width
    shapes: dict[str, tuple[int, ...]] = {"gate": (experts, spec.hidden)}
    if spec.expert_bias:
        shapes["gate_bias"] = (experts,)
    if spec.parallel_dense:
        shapes |= {"gate_norm": (spec.hidden,), "expert_norm": (spec.hidden,)}
        shapes["expert_scale"] = (experts,)
    shapes["experts.gate_up"] = (experts, 2 * width, spec.hidden)
    shapes["experts.down"] = (experts, spec.hidden, width)
    if spec.shared_width:
        shapes |= _mlp_shapes("shared", spec.hidden, spec.shared_width)
    return shapes


def _mlp_shapes(name: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.gate_up": (2 * width, hidden), f"{name}.down": (hidden, width)}
