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

from coterie.bench.needs import Blocks, Cached, Needs, Part, cached, floor, needs_of
from coterie.bench.timing import once
from coterie.engine.load import Model
from coterie.model.cache import Cache
from coterie.model.step import Step
from coterie.model.transformer import Transformer
from coterie.naming import CoterieError
from coterie.results import Measure
from coterie.routing import check_layers, parse_policy
from coterie.telemetry import Null, Tracing
from coterie.values import Window

DRAWS = 4  # blocks that take turns
STEPS = 8  # forwards that fill a block
READ = "read"
Tell = Callable[[float, str], None]
Wanted = int | Literal["block"]


@dataclass(frozen=True)
class Line:
    """One policy: what a forward uses (means over blocks), and samples in seconds.

    ``limit`` are seconds of the plain read in the same turns, ``floor`` of reading or arithmetic,
    part by part whichever takes longer.
    """

    policy: str
    experts: float
    bytes: float
    parts: Mapping[Part, float]
    flops: Mapping[Part, float]
    seconds: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)

    @property
    def times_limit(self) -> float:
        """How many times as long as the read a forward takes: the median over turns."""
        return statistics.median(a / b for a, b in zip(self.seconds, self.limit, strict=True))

    @property
    def times_floor(self) -> float:
        """How many times as long as the floor a forward takes: the median over turns."""
        return statistics.median(a / b for a, b in zip(self.seconds, self.floor, strict=True))

    def measures(self) -> list[Measure]:
        works = ((READ, self.limit), ("floor", self.floor), ("forward", self.seconds))
        return [
            Measure(f"{self.policy} {name}", "ms", tuple(second * 1e3 for second in taken))
            for name, taken in works
        ]

    def facts(self) -> dict[str, object]:
        limit = statistics.median(self.limit)
        return {
            "policy": self.policy,
            "experts_per_layer": self.experts,
            "bytes": self.bytes,
            "bytes_of_parts": dict(self.parts),
            "flops_of_parts": dict(self.flops),
            "read_gb_per_s": self.bytes / limit / 1e9,
            "read_ms": limit * 1e3,
            "floor_ms": statistics.median(self.floor) * 1e3,
            "forward_ms": statistics.median(self.seconds) * 1e3,
            "times_read_limit": self.times_limit,
            "times_floor": self.times_floor,
        }


@dataclass(frozen=True)
class Found:
    """All policies, and what the arithmetic ran at meanwhile: operations a second, by kind."""

    lines: list[Line]
    logits: tuple[int, ...]  # that the forwards of a turn made
    rates: dict[str, list[float]]

    def measures(self) -> list[Measure]:
        arithmetic = [
            Measure(f"arithmetic of {kind}", "GFLOP/s", tuple(rate / 1e9 for rate in taken))
            for kind, taken in self.rates.items()
        ]
        return [measure for line in self.lines for measure in line.measures()] + arithmetic


@dataclass(frozen=True)
class _Drawn:
    """A block under a policy: the experts it uses by layer, bool [E], its bytes and pairs."""

    tokens: Tensor
    step: Step
    used: dict[int, Tensor]
    parts: dict[Part, float]
    pairs: int  # of a token and an expert


@torch.inference_mode()
def time_forward(
    model: Model,
    policies: Sequence[str],
    *,
    tokens: int = 32,
    context: int = 512,
    wanted: Wanted = "block",
    turns: int = 10,
    threads: int = 1,
    seed: int = 7,
    tell: Tell = lambda share, doing: None,
) -> Found:
    """Policies take turns, each with reads of just the bytes that its forwards need.

    A sample is the mean over the forwards of a turn: one that makes ``wanted`` logits, or those
    that fill a block.
    """
    torch.set_num_threads(threads)
    transformer = model.transformer
    blocks = random_blocks(model, tokens, context, seed)
    needs = needs_of(transformer, blocks)
    clock = _Clock(transformer, needs, cached(transformer, tokens))
    logits = fillings(wanted, tokens)
    works: list[tuple[Line, list[_Drawn]]] = []
    for policy in policies:
        tell(0.0, f"a first forward of {policy}")
        drawn = [_drawn(transformer, needs, blocks, number, policy) for number in range(DRAWS)]
        works.append((_line(policy, needs, drawn, statistics.fmean(logits)), drawn))
    found = Found([line for line, _ in works], logits, {kind: [] for kind in clock.alone.works})
    draw = random.Random(0)
    for turn in range(turns):
        draw.shuffle(works)
        for line, drawn in works:
            clock.take(found, line, drawn[turn % DRAWS :] + drawn)
            tell(turn / turns, "taking turns")
    tell(1.0, "taking turns")
    return found


def fillings(wanted: Wanted, tokens: int) -> tuple[int, ...]:
    """How many positions each forward answers: of a block, those that are masked still."""
    if wanted != "block":
        if not 1 <= wanted <= tokens:
            raise CoterieError(f"{wanted} logits of a block of {tokens}; it has 1 to {tokens}")
        return (wanted,)
    steps = min(STEPS, tokens)
    return tuple(tokens - number * tokens // steps for number in range(steps))


@dataclass(frozen=True)
class _Clock:
    """What all samples are taken with."""

    transformer: Transformer
    needs: Needs
    alone: Cached

    def take(self, found: Found, line: Line, drawn: Sequence[_Drawn]) -> None:
        """One sample: a read and a forward for every count of logits, block after block."""
        rates, device = self.alone.rates(), self.transformer.device
        for kind, rate in rates.items():
            found.rates[kind].append(rate)
        limits, floors, taken = [], [], []
        for number, count in enumerate(found.logits):
            block = drawn[number % DRAWS]
            step = replace(block.step, wanted=torch.arange(count, device=device))
            limit = once(partial(self.needs.read, block.used), device)
            taken.append(once(partial(self.transformer, block.tokens, step), device))
            limits.append(limit)
            operations = self.needs.operations(block.pairs, count)
            bandwidth = sum(block.parts.values()) / limit
            least = floor(block.parts, operations, bandwidth=bandwidth, rates=rates)
            floors.append(max(limit, least))  # equal but for rounding where nothing multiplies long
        line.limit.append(statistics.fmean(limits))
        line.floor.append(statistics.fmean(floors))
        line.seconds.append(statistics.fmean(taken))


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


def _drawn(
    transformer: Transformer, needs: Needs, blocks: Blocks, number: int, policy: str
) -> _Drawn:
    """Runs the block once, which also wakes what the first forward needs."""
    chosen = parse_policy(policy)
    check_layers(chosen, len(transformer.spec.moe_layers))
    step = Step(blocks.window, blocks.cache, chosen, Null(), forward=(0,))
    trace = Tracing()
    transformer(blocks.tokens[number], replace(step, recorder=trace))
    used = {layer: routing.used.cpu() for layer, _, routing in trace.routings}
    pairs = sum(int((routing.ids >= 0).sum()) for _, _, routing in trace.routings)
    parts: dict[Part, float] = {"experts": needs.experts(used), **needs.parts}
    return _Drawn(blocks.tokens[number], step, used, parts, pairs)


def _line(policy: str, needs: Needs, drawn: Sequence[_Drawn], logits: float) -> Line:
    counts = statistics.fmean(float(mask.sum()) for each in drawn for mask in each.used.values())
    parts: dict[Part, float] = {
        **drawn[0].parts,
        "experts": statistics.fmean(d.parts["experts"] for d in drawn),
    }
    pairs = statistics.fmean(each.pairs for each in drawn)
    flops = needs.operations(pairs, logits)
    return Line(policy, counts, sum(parts.values()), parts, flops)
