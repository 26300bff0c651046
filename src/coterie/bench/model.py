"""A whole random model of a published shape: nothing is downloaded, nothing is packed twice.

Its experts are a few random ones, over and over, each in memory of its own and in the form in which
it runs. Its gates are bent until a block uses as many experts together as the published model does.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from coterie import ops
from coterie.bench.routings import bend_for
from coterie.bench.shapes import Published
from coterie.engine.load import Model, free_memory
from coterie.experts.store import Resident
from coterie.model.spec import ModelSpec
from coterie.model.transformer import build
from coterie.model.weights import bytes_kept, kept_wide, shapes
from coterie.naming import CoterieError
from coterie.ops import cpu
from coterie.quant import FORMATS, QTensor, quantise
from coterie.text.codec import Numbers
from coterie.values import Panels, Slab

Experts: TypeAlias = Literal["fp32", "bf16", "int8", "int4"]

FEW = 2  # different experts in a slab
COMMON = 0.5  # of a token's direction: what all tokens share, which the gates' bend listens to
QUIET = 0.02  # what a layer adds, beside what comes in: random layers shall not drown the tokens
POOL = (1 << 24) + 43  # random numbers that all weights are cut from; no width divides it
CHUNK = 1 << 24


def random_model(
    shape: Published,
    experts: Experts = "bf16",
    *,
    layers: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Model:
    """The first ``layers`` of such a model, everything but the experts in bf16 (fp32 with "fp32").

    Needs little more memory than its weights; raises CoterieError where there is too little. A
    prompt is ids, for it has no tokenizer.
    """
    where, cut = device or torch.device("cpu"), shape.cut(layers)
    form = FORMATS.get(experts)
    dtype = torch.float32 if experts == "fp32" else torch.bfloat16
    spec = replace(cut.spec, expert_format=form)
    _check_room(cut, bytes_kept(spec, dtype), where)
    draw = torch.Generator().manual_seed(seed)
    slab = some_experts(spec, experts, draw, where)
    stores = {layer: repeated(slab, spec.router.experts) for layer in spec.moe_layers}
    bend = bend_for(spec.router, cut.unique)
    weights = _weights(spec, bend, draw, dtype=dtype, device=where)
    defaults = shape.family.defaults
    ends = tuple(token for token in defaults.eos_ids if token < spec.vocabulary)
    return Model(
        name=f"random {shape.title}",
        family=shape.family,
        transformer=build(spec, weights, Resident(stores)),
        codec=Numbers(spec.vocabulary),
        mask_id=min(defaults.mask_id, spec.vocabulary - 1),
        eos_ids=ends or (spec.vocabulary - 2,),
    )


def some_experts(
    spec: ModelSpec, experts: Experts, draw: torch.Generator, device: torch.device
) -> Slab:
    """A slab of a few random experts, as they run fastest here."""
    hidden, width = spec.hidden, spec.expert_width
    up = torch.randn(FEW, 2 * width, hidden, generator=draw) * hidden**-0.5
    down = torch.randn(FEW, hidden, width, generator=draw) * width**-0.5 * QUIET

    def kept(weight: Tensor) -> Tensor | QTensor:
        if experts in FORMATS:
            return _moved(quantise(weight, FORMATS[experts]), device)
        return weight.to(device, torch.float32 if experts == "fp32" else torch.bfloat16)

    return ops.prepare(Slab(kept(up), kept(down), torch.arange(FEW, device=device)))


def repeated(slab: Slab, experts: int) -> Slab:
    """So many experts, those of ``slab`` over and over, each in memory of its own."""
    gate_up, down = slab.gate_up, slab.down
    slots = torch.arange(experts, device=slab.slot_of.device)
    if isinstance(gate_up, Panels) and isinstance(down, Panels):
        # Gate, up and down share their memory.
        packed = cpu.memory(experts, gate_up.packed.shape[1])
        _fill(packed, gate_up.packed)
        return Slab(_over(gate_up, packed), _over(down, packed), slots)
    return Slab(_repeated(gate_up, experts), _repeated(down, experts), slots)


def _repeated(weight: Tensor | QTensor | Panels, experts: int) -> Tensor | QTensor:
    assert not isinstance(weight, Panels)  # those of a slab come in pairs
    if isinstance(weight, QTensor):
        q, scales = (_repeated(part, experts) for part in (weight.q, weight.scales))
        assert isinstance(q, Tensor)
        assert isinstance(scales, Tensor)
        return replace(weight, q=q, scales=scales)
    whole = weight.new_empty(experts, *weight.shape[1:])
    _fill(whole, weight)
    return whole


def _over(weight: Panels, packed: Tensor) -> Panels:
    return replace(weight, packed=packed, shape=(len(packed), *weight.shape[1:]))


def _fill(to: Tensor, few: Tensor) -> None:
    """The first axis of ``few`` over and over, without a copy in between."""
    for first in range(0, len(to), len(few)):
        part = to[first : first + len(few)]
        part.copy_(few[: len(part)])


def _moved(weight: QTensor, device: torch.device) -> QTensor:
    return replace(weight, q=weight.q.to(device), scales=weight.scales.to(device))


def _weights(
    spec: ModelSpec, bend: float, draw: torch.Generator, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Everything but the routed experts."""
    pool = torch.randn(POOL, generator=draw)
    shared = torch.randn(spec.hidden, generator=draw)
    shared /= shared.square().mean().sqrt()  # what all tokens have in common, of unit size
    found: dict[str, Tensor] = {}
    start = 0
    for name, shape in shapes(spec).items():
        if ".experts." in name:
            continue
        what = torch.float32 if kept_wide(name) else dtype
        weight = torch.empty(shape, dtype=what, device=device)
        _cut(weight, pool, start, scale=_scale(name, shape))
        start += prod(shape)
        if name == "embedding":
            weight.mul_((1 - COMMON**2) ** 0.5).add_((COMMON * shared).to(device, dtype))
        elif name.endswith(".gate"):
            weight.copy_(bent(weight.cpu(), shared, bend, draw))
        found[name] = weight
    return found


def bent(gate: Tensor, shared: Tensor, bend: float, draw: torch.Generator) -> Tensor:
    """A gate [E, H] whose logits differ by 1 from token to token and by ``bend`` from expert to
    expert: it hears what tokens share only as how wanted each expert is."""
    alone = gate - (gate @ shared)[:, None] * shared / shared.square().sum()
    wanted = torch.randn(len(gate), generator=draw) * bend
    common = wanted[:, None] * shared / shared.square().sum() / COMMON
    return alone / (1 - COMMON**2) ** 0.5 + common


def _scale(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a weight's numbers; 0 = all of them are 1."""
    if len(shape) == 1:
        return 1e-3 if "bias" in name else 0.0
    if name == "embedding":
        return 1.0
    adds = name.endswith((".out", ".down"))
    return shape[-1] ** -0.5 * (QUIET if adds else 1.0)


def _cut(weight: Tensor, pool: Tensor, start: int, *, scale: float) -> None:
    """Numbers of the pool from ``start`` on, over and over."""
    flat = weight.view(-1)
    if not scale:
        flat.fill_(1.0)
        return
    done = 0
    while done < len(flat):
        at = (start + done) % len(pool)
        size = min(len(flat) - done, len(pool) - at, CHUNK)
        flat[done : done + size].copy_(pool[at : at + size])
        done += size
    flat.mul_(scale)


def _check_room(shape: Published, needed: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and needed > free:
        raise CoterieError(
            f"{shape.title} with {shape.spec.layers} layers needs {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; --layers cuts it, --dtype int8 shrinks it"
        )
