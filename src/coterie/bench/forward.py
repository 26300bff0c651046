"""A whole forward of a random model, timed beside a plain read of the bytes that it needs."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from coterie.bench.reading import Weight, memory_of, read_rows, rows_of
from coterie.bench.timing import once
from coterie.engine.load import Model
from coterie.model.cache import Cache
from coterie.model.moe import Dense, MoE
from coterie.model.step import Step
from coterie.model.transformer import Transformer
from coterie.naming import CoterieError
from coterie.results import Measure
from coterie.routing import check_layers, parse_policy
from coterie.telemetry import Null, Tracing
from coterie.values import Slab, Window

DRAWS = 4  # blocks that take turns
READ = "read"
ONE = torch.ones(1, dtype=torch.bool)
Part = Literal["experts", "attention", "shared", "dense", "router", "head", "keys and values"]
Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Needs:
    """The bytes of one forward by part, and the memory in which they lie.

    ``slabs``: each layer's experts, of which a forward reads those it uses; ``whole``: all that is
    read whatever the routing.
    """

    slabs: dict[int, list[Slab | Tensor]]
    sizes: dict[int, int]  # bytes of one expert, by layer
    whole: list[Slab | Tensor]
    parts: Mapping[Part, int]  # of all but the experts

    def experts(self, used: dict[int, Tensor]) -> int:
        """Bytes of the experts used (by layer, bool [E])."""
        return sum(size * int(used[layer].sum()) for layer, size in self.sizes.items())

    def read(self, used: dict[int, Tensor]) -> None:
        """Read all of it once."""
        for layer, rows in self.slabs.items():
            read_rows(rows, used[layer])
        read_rows(self.whole, ONE)


@dataclass(frozen=True)
class Line:
    """One policy: what a forward uses (means over blocks), and samples in seconds.

    ``limit`` are seconds of the plain read in the same turns.
    """

    policy: str
    experts: float
    bytes: float
    parts: dict[str, float]
    seconds: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)

    @property
    def times_limit(self) -> float:
        """How many times as long as the read a forward takes: the median over turns."""
        return statistics.median(a / b for a, b in zip(self.seconds, self.limit, strict=True))

    def measures(self) -> list[Measure]:
        return [
            Measure(f"{self.policy} {name}", "ms", tuple(second * 1e3 for second in taken))
            for name, taken in ((READ, self.limit), ("forward", self.seconds))
        ]

    def facts(self) -> dict[str, object]:
        limit = statistics.median(self.limit)
        return {
            "policy": self.policy,
            "experts_per_layer": self.experts,
            "bytes": self.bytes,
            "bytes_of_parts": self.parts,
            "read_gb_per_s": self.bytes / limit / 1e9,
            "read_ms": limit * 1e3,
            "forward_ms": statistics.median(self.seconds) * 1e3,
            "times_read_limit": self.times_limit,
        }


@dataclass(frozen=True)
class Blocks:
    """Random blocks behind a context of random keys; ``visible`` positions are looked at."""

    tokens: list[Tensor]  # each [1, N]
    window: Window
    cache: Cache


@torch.inference_mode()
def time_forward(
    model: Model,
    policies: Sequence[str],
    *,
    tokens: int = 32,
    context: int = 512,
    turns: int = 20,
    threads: int = 1,
    seed: int = 7,
    tell: Tell = lambda share, doing: None,
) -> list[Line]:
    """Policies take turns, each with a read of just the bytes that its forward needs."""
    torch.set_num_threads(threads)
    transformer = model.transformer
    blocks = random_blocks(model, tokens, context, seed)
    needs = needs_of(transformer, blocks)
    works = []
    for policy in policies:
        tell(0.0, f"a first forward of {policy}")
        steps = [_step(blocks, policy, transformer) for _ in blocks.tokens]
        used = [
            _used(transformer, block, step)
            for block, step in zip(blocks.tokens, steps, strict=True)
        ]
        works.append((_line(policy, needs, used), steps, used))
    draw, device = random.Random(0), transformer.device
    for turn in range(turns + 1):
        draw.shuffle(works)
        for line, steps, used in works:
            number = turn % DRAWS
            block, step = blocks.tokens[number], steps[number]
            limit = once(partial(needs.read, used[number]), device)
            taken = once(partial(transformer, block, step), device)
            if turn:
                line.limit.append(limit)
                line.seconds.append(taken)
        tell((turn + 1) / (turns + 1), "taking turns")
    found = {line.policy: line for line, _, _ in works}
    return [found[policy] for policy in policies]


def random_blocks(model: Model, tokens: int, context: int, seed: int) -> Blocks:
    """Blocks without masks, whose tokens the router can tell apart."""
    spec, transformer = model.spec, model.transformer
    causal = model.family.defaults.block if model.family.defaults.block_causal else 0
    start = context if not causal else -(-context // causal) * causal
    if start + tokens > spec.max_length:
        raise CoterieError(
            f"a context of {context} and {tokens} tokens need {start + tokens} positions; "
            f"the model has {spec.max_length}"
        )
    draw = torch.Generator().manual_seed(seed)
    cache = Cache.allocate(
        spec, 1, start + tokens, dtype=transformer.dtype, device=transformer.device
    )
    for kept in (*cache.keys, *cache.values):
        kept[:, :, :start] = torch.randn(kept[:, :, :start].shape, generator=draw).to(kept)
    ids = torch.randint(0, model.mask_id, (DRAWS, 1, tokens), generator=draw)
    window = Window(
        torch.tensor([start]),
        tokens,
        torch.tensor([start + tokens]),
        causal if tokens > causal else 0,
    )
    return Blocks([each.to(transformer.device) for each in ids], window, cache)


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
            (slab,) = half.store.serve(number, everybody)
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
    return Needs(slabs, expert, rows_of(flat), sizes)


def _step(blocks: Blocks, policy: str, transformer: Transformer) -> Step:
    chosen = parse_policy(policy)
    check_layers(chosen, len(transformer.spec.moe_layers))
    return Step(blocks.window, blocks.cache, chosen, Null(), forward=(0,))


def _used(transformer: Transformer, tokens: Tensor, step: Step) -> dict[int, Tensor]:
    """By layer, the experts that this block uses, bool [E]."""
    trace = Tracing()
    transformer(tokens, replace(step, recorder=trace))
    return {layer: routing.used.cpu() for layer, _, routing in trace.routings}


def _line(policy: str, needs: Needs, used: Sequence[dict[int, Tensor]]) -> Line:
    experts = statistics.fmean(needs.experts(each) for each in used)
    counts = statistics.fmean(float(mask.sum()) for each in used for mask in each.values())
    rest = sum(needs.parts.values())
    return Line(policy, counts, experts + rest, {"experts": experts, **needs.parts})
