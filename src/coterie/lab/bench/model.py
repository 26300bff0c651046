"""Random models of published shapes, for benchmarks without a download.

A few random experts are repeated, each copy in its own memory and in the kernels' format. Router
gates are skewed so that a block uses as many experts as in the published model.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from coterie import ops
from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import ConfigError
from coterie.lab.bench.routings import find_skew
from coterie.lab.bench.shapes import ModelShape, find_shape
from coterie.loading.free_memory import free_memory
from coterie.loading.load import Model
from coterie.model.spec import ModelSpec
from coterie.model.transformer import build
from coterie.model.weights import HEAD, is_always_fp32, quant_format, weight_bytes, weight_shapes
from coterie.offload.resident_store import ResidentExpertStore
from coterie.ops import cpu
from coterie.quantization import FORMATS, QTensor, parse_dense_format, quantize
from coterie.tokenizer.tokenizer import IdTokenizer
from coterie.values import PackedExperts, Slab

ExpertDtype: TypeAlias = Literal["fp32", "bf16", "int8", "int4"]

RANDOM_DTYPES: tuple[ExpertDtype, ...] = get_args(ExpertDtype)
DISTINCT_EXPERTS = 2  # random experts of a slab
# Weight of the direction that all embeddings share; gates read popularity from it.
SHARED_FRACTION = 0.5
RESIDUAL_SCALE = 0.02  # scale of a layer's output, so that random layers do not hide the tokens
POOL_SIZE = (1 << 24) + 43  # random numbers that all weights are cut from; no width divides it


def random_model(
    shape: ModelShape,
    expert_dtype: ExpertDtype = "bf16",
    *,
    layers: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    dense_dtype: str | None = None,
) -> Model:
    """A random model of the first ``layers`` layers.

    Other weights are bf16 (fp32 if the experts are), and dense matrices are as in the shape, or of
    ``dense_dtype``. The model has no tokenizer, so prompts are token ids. Raises ConfigError if
    there is too little memory for the weights.
    """
    target_device, truncated = device or torch.device("cpu"), shape.truncate(layers)
    expert_format = FORMATS.get(expert_dtype)
    dtype = other_dtype(expert_dtype)
    spec = replace(truncated.spec, expert_format=expert_format)
    if dense_dtype is not None:
        spec = replace(spec, dense_format=parse_dense_format(dense_dtype))
    _check_memory(truncated, weight_bytes(spec, dtype), target_device)
    generator = torch.Generator().manual_seed(seed)
    slab = random_experts(spec, expert_dtype, generator, target_device)
    stores = {layer: repeat_experts(slab, spec.router.experts) for layer in spec.moe_layers}
    skew = find_skew(spec.router, truncated.unique_experts)
    weights = _random_weights(spec, skew, generator, dtype=dtype, device=target_device)
    defaults = shape.family.defaults
    eos_ids = tuple(token for token in defaults.eos_ids if token < spec.vocabulary)
    store = ResidentExpertStore(stores)
    return Model(
        name=f"random {shape.title}",
        family=shape.family,
        transformer=build(spec, weights, store),
        tokenizer=IdTokenizer(spec.vocabulary),
        mask_id=min(defaults.mask_id, spec.vocabulary - 1),
        eos_ids=eos_ids or (spec.vocabulary - 2,),
        store=store,
    )


def other_dtype(expert_dtype: ExpertDtype) -> torch.dtype:
    """The dtype of all weights but the experts, and of experts that are not quantised."""
    return torch.float32 if expert_dtype == "fp32" else torch.bfloat16


def random_experts(
    spec: ModelSpec, expert_dtype: ExpertDtype, generator: torch.Generator, device: torch.device
) -> Slab:
    """A slab of a few random experts in the kernels' format."""
    hidden, width = spec.hidden, spec.expert_width
    up = torch.randn(DISTINCT_EXPERTS, 2 * width, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(DISTINCT_EXPERTS, hidden, width, generator=generator)
    return make_experts_slab(up, down * (width**-0.5 * RESIDUAL_SCALE), expert_dtype, device)


def make_experts_slab(
    gate_up: Tensor, down: Tensor, expert_dtype: ExpertDtype, device: torch.device
) -> Slab:
    """A slab of experts, from fp32 weights, in the kernels' format."""

    def convert(weight: Tensor) -> Tensor | QTensor:
        if expert_dtype in FORMATS:
            return quantize(weight.to(device), FORMATS[expert_dtype])
        return weight.to(device, other_dtype(expert_dtype))

    slots = torch.arange(len(gate_up), device=device)
    return ops.prepare(Slab(convert(gate_up), convert(down), slots))


def repeat_experts(slab: Slab, num_experts: int) -> Slab:
    """A slab of ``num_experts`` copies of the experts of ``slab``, each in its own memory."""
    gate_up, down = slab.gate_up, slab.down
    slots = torch.arange(num_experts, device=slab.slot_of.device)
    copied = slots % len(slab.slot_of)
    if isinstance(gate_up, PackedExperts) and isinstance(down, PackedExperts):
        # Gate, up and down share one buffer.
        packed = cpu.allocate(num_experts, gate_up.packed.shape[1])
        torch.index_select(gate_up.packed, 0, copied, out=packed)
        return Slab(_with_packed(gate_up, packed), _with_packed(down, packed), slots)
    assert not isinstance(gate_up, PackedExperts)  # packed weights come in pairs
    assert not isinstance(down, PackedExperts)
    return Slab(gate_up[copied], down[copied], slots)


def _with_packed(weight: PackedExperts, packed: Tensor) -> PackedExperts:
    return replace(weight, packed=packed, shape=(len(packed), *weight.shape[1:]))


def _random_weights(
    spec: ModelSpec,
    skew: float,
    generator: torch.Generator,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """All weights but the routed experts."""
    pool = torch.randn(POOL_SIZE, generator=generator)
    shared = torch.randn(spec.hidden, generator=generator)
    shared /= shared.square().mean().sqrt()  # the direction that all tokens share, of unit size
    weights: dict[str, Tensor] = {}
    start = 0
    for name, shape in weight_shapes(spec).items():
        if ".experts." in name:
            continue
        weight_dtype = torch.float32 if is_always_fp32(name) else dtype
        weight = torch.empty(shape, dtype=weight_dtype, device=device)
        _fill_from_pool(weight, pool, start, scale=_init_std(name, shape))
        start += prod(shape)
        if name == "embedding":
            weight.mul_((1 - SHARED_FRACTION**2) ** 0.5).add_(
                (SHARED_FRACTION * shared).to(device, dtype)
            )
        elif name.endswith(".gate"):
            weight.copy_(skewed_gate(weight.cpu(), shared, skew, generator))
        elif name.endswith(".gate_norm"):
            weight.fill_(spec.hidden**0.5)  # the router's input then has unit size
        form = quant_format(spec, name)
        if form is None or name == HEAD:
            weights[name] = weight
        if form is not None:
            quantized = quantize(weight, form)
            weights |= {f"{name}.q": quantized.q, f"{name}.scales": quantized.scales}
    return weights


def skewed_gate(gate: Tensor, shared: Tensor, skew: float, generator: torch.Generator) -> Tensor:
    """A gate [E, H] with logits that vary by 1 over tokens and by ``skew`` over experts.

    These are standard deviations. The shared direction of all tokens sets an expert's popularity.
    """
    independent = gate - (gate @ shared)[:, None] * shared / shared.square().sum()
    popularity = torch.randn(len(gate), generator=generator) * skew
    common = popularity[:, None] * shared / shared.square().sum() / SHARED_FRACTION
    return independent / (1 - SHARED_FRACTION**2) ** 0.5 + common


def _init_std(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a weight; 0 for a weight of ones."""
    if len(shape) == 1:
        return 1e-3 if "bias" in name else 0.0
    if name == "embedding":
        return 1.0
    writes_residual = name.endswith((".out", ".down"))
    return shape[-1] ** -0.5 * (RESIDUAL_SCALE if writes_residual else 1.0)


def _fill_from_pool(weight: Tensor, pool: Tensor, start: int, *, scale: float) -> None:
    """Fills a weight with the pool's numbers from ``start``, repeated."""
    flat = weight.view(-1)
    if not scale:
        flat.fill_(1.0)
        return
    filled = 0
    while filled < len(flat):
        offset = (start + filled) % len(pool)
        size = min(len(flat) - filled, len(pool) - offset)
        flat[filled : filled + size].copy_(pool[offset : offset + size])
        filled += size
    flat.mul_(scale)


def _check_memory(shape: ModelShape, required: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and required > free:
        raise ConfigError(
            f"{shape.title} with {shape.spec.layers} layers needs {required / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; reduce `layers` or use `dtype` int8"
        )


def random_engine(
    shape: str, dtype: str, layers: int | None, device: str, dense_dtype: str | None = None
) -> Engine:
    """A random model that samples: its likeliest token is the same at every position, and a block
    of equal tokens uses k experts only."""
    if dtype not in RANDOM_DTYPES:
        raise ConfigError(f"`expert_dtype={dtype}` with `shape`; known: {', '.join(RANDOM_DTYPES)}")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"`device={device}` with `shape`: random models run on a CPU")
    model = random_model(find_shape(shape), dtype, layers=layers, dense_dtype=dense_dtype)
    generation = GenerationConfig.for_family(model.defaults).replace(
        early_stop="off", temperature=1.0
    )
    return Engine(model, generation=generation)
