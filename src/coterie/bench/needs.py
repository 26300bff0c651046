"""What a forward reads and multiplies, part by part, and the least that both can take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from coterie import ops
from coterie.bench.reading import Weight, memory_of, read_rows, rows_of
from coterie.bench.timing import once
from coterie.model.cache import Cache
from coterie.model.moe import Dense, MoE
from coterie.model.transformer import Transformer
from coterie.quant import QTensor
from coterie.values import Demand, Panels, Routing, Slab, Window

Part = Literal["experts", "attention", "shared", "dense", "router", "head", "keys and values"]
Kind = Literal["matrix", "router", "experts"]

ONE = torch.ones(1, dtype=torch.bool)
ROWS = 2048  # of the matrix that stays in a cache
FEW = 4  # experts that stay there
OVER = 4  # how often they are used for one reading of the clock


@dataclass(frozen=True)
class Blocks:
    """Random blocks behind a context of random keys; ``visible`` positions are looked at."""

    tokens: list[Tensor]  # each [1, N]
    window: Window
    cache: Cache


@dataclass(frozen=True)
class Needs:
    """The bytes of one forward by part, and the memory in which they lie.

    ``slabs``: each layer's experts, of which a forward reads those it uses; ``whole``: all that is
    read whatever the routing. ``pair`` and ``logits`` are the operations of a token that meets an
    expert, and of one position's logits; ``flops`` those of the other parts.
    """

    slabs: dict[int, list[Slab | Tensor]]
    sizes: dict[int, int]  # bytes of one expert, by layer
    whole: list[Slab | Tensor]
    parts: Mapping[Part, int]  # of all but the experts
    flops: Mapping[Part, int]  # of all but the experts and the head
    pair: int
    logits: int

    def experts(self, used: dict[int, Tensor]) -> int:
        """Bytes of the experts used (by layer, bool [E])."""
        return sum(size * int(used[layer].sum()) for layer, size in self.sizes.items())

    def read(self, used: dict[int, Tensor]) -> None:
        """Read all of it once."""
        for layer, rows in self.slabs.items():
            read_rows(rows, used[layer])
        read_rows(self.whole, ONE)

    def operations(self, pairs: float, wanted: float) -> dict[Part, float]:
        """By part, with so many pairs of a token and an expert and logits of so many positions."""
        return {"experts": self.pair * pairs, **self.flops, "head": self.logits * wanted}


@dataclass(frozen=True)
class Cached:
    """Products of weights that stay in a cache: arithmetic, and next to nothing to wait for."""

    works: Mapping[Kind, tuple[Callable[[], object], float]]  # and its operations
    device: torch.device

    def rates(self) -> dict[Kind, float]:
        """Operations a second."""
        found: dict[Kind, float] = {}
        for kind, (work, flops) in self.works.items():
            work()  # now the weights are there
            found[kind] = OVER * flops / once(partial(_over, work), self.device)
        return found


def floor(
    bytes_of: Mapping[Part, float],
    operations: Mapping[Part, float],
    *,
    bandwidth: float,
    rates: Mapping[Kind, float],
) -> float:
    """Seconds: of every part, whatever takes longer of its bytes and its arithmetic."""
    return sum(
        max(size / bandwidth, operations[part] / rates[_kind(part)])
        for part, size in bytes_of.items()
    )


def cached(transformer: Transformer, tokens: int) -> Cached:
    """The model's own kinds of products, of so many tokens each."""
    spec, device = transformer.spec, transformer.device
    x = torch.randn(tokens, spec.hidden).to(device, transformer.dtype)
    works: dict[Kind, tuple[Callable[[], object], float]] = {}
    kinds: dict[Kind, torch.dtype] = {"matrix": transformer.dtype, "router": torch.float32}
    for kind, dtype in kinds.items():
        weight = ops.prepare_matrix(torch.randn(ROWS, spec.hidden).to(device, dtype))
        works[kind] = (partial(ops.linear, x, weight), 2 * tokens * ROWS * spec.hidden)
    slab = _first_slab(transformer)
    few = min(FEW, len(slab.slot_of))
    ids = torch.arange(few, device=device)
    some = Slab(_first(slab.gate_up, few), _first(slab.down, few), ids)
    everybody = ids.expand(tokens, few).contiguous()
    weights = torch.full((tokens, few), 1 / few, device=device)
    routing = Routing(everybody, weights, torch.ones_like(ids, dtype=torch.bool), everybody)
    flops = tokens * few * _pair(transformer)
    works["experts"] = (partial(ops.run_experts, x, routing, some), flops)
    return Cached(works, device)


def needs_of(transformer: Transformer, blocks: Blocks) -> Needs:
    """Everything that a forward reads; of the embedding, only the rows it looks up, left out."""
    spec = transformer.spec
    slabs: dict[int, list[Slab | Tensor]] = {}
    expert: dict[int, int] = {}
    everybody = torch.ones(spec.router.experts, dtype=torch.bool, device=transformer.device)
    parts: dict[Part, list[Weight]] = {
        name: [] for name in ("attention", "shared", "dense", "router")
    }
    for number, layer in enumerate(transformer.layers):
        parts["attention"] += [layer.attention.qkv, layer.attention.out]
        half = layer.feed_forward
        if isinstance(half, MoE):
            (slab,) = half.store.serve(number, Demand(everybody))
            held = memory_of([slab.gate_up, slab.down])
            slabs[number] = rows_of(held)
            expert[number] = sum(each.nbytes // len(each) for each in held)
            parts["router"].append(half.gate)
            if half.shared is not None:
                parts["shared"] += [half.shared.gate_up, half.shared.down]
        elif isinstance(half, Dense):
            parts["dense"] += [half.gate_up, half.down]
    parts["head"] = [transformer.head]
    parts["keys and values"] = [*blocks.cache.keys, *blocks.cache.values]
    memory: dict[Part, list[Tensor]] = {name: memory_of(held) for name, held in parts.items()}
    sizes: dict[Part, int] = {
        name: sum(each.nbytes for each in held) for name, held in memory.items() if held
    }
    flat = [each.view(1, -1) for held in memory.values() for each in held]
    flops = _flops(transformer, blocks)
    return Needs(
        slabs, expert, rows_of(flat), sizes, {part: flops[part] for part in sizes if part in flops},
        pair=_pair(transformer), logits=2 * spec.hidden * spec.vocabulary,
    )  # fmt: skip


def _flops(transformer: Transformer, blocks: Blocks) -> dict[Part, int]:
    """Two for every number of a weight and token; of attention, what the block looks at."""
    spec, tokens, moe = transformer.spec, blocks.window.width, len(transformer.spec.moe_layers)
    every = 2 * tokens * spec.hidden
    heads = spec.heads * spec.head_dim
    projected = heads + 2 * spec.kv_heads * spec.head_dim + heads
    reach = int(blocks.window.visible.max())
    return {
        "attention": every * projected * spec.layers,
        "shared": every * 3 * spec.shared_width * moe,
        "dense": every * 3 * spec.dense_width * (spec.layers - moe),
        "router": every * spec.router.experts * moe,
        "keys and values": 4 * tokens * heads * reach * spec.layers,
    }


def _pair(transformer: Transformer) -> int:
    """Operations of one token in one expert."""
    return 6 * transformer.spec.hidden * transformer.spec.expert_width


def _kind(part: Part) -> Kind:
    return part if part in ("router", "experts") else "matrix"


def _first_slab(transformer: Transformer) -> Slab:
    """Of the first layer that has experts."""
    number = transformer.spec.moe_layers[0]
    half = transformer.layers[number].feed_forward
    assert isinstance(half, MoE)
    everybody = torch.ones(
        transformer.spec.router.experts, dtype=torch.bool, device=transformer.device
    )
    return next(iter(half.store.serve(number, Demand(everybody))))


def _first(weight: Tensor | QTensor | Panels, few: int) -> Tensor | QTensor | Panels:
    if isinstance(weight, Panels):
        return replace(weight, packed=weight.packed[:few], shape=(few, *weight.shape[1:]))
    return weight[:few]


def _over(work: Callable[[], object]) -> None:
    for _ in range(OVER):
        work()
