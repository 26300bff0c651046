"""Times one layer of experts of a large model's true shape on this CPU, and writes a record.

Weights are random; tokens choose as a skewed router does (84 of 256 experts for 32 of them), and
each policy routes the same scores. In every turn the kernels, a plain read of the same bytes (what
the memory allows) and, in bf16, torch's grouped product take their time one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from coterie.bench.routings import bend_for, skewed
from coterie.bench.shapes import LARGE, Shape
from coterie.ops import cpu, grouped
from coterie.quant import FORMATS, QTensor, quantise
from coterie.results import Measure, record, write_record
from coterie.routing import parse_policy, route
from coterie.values import Routing, Slab

POLICIES = {
    "LLaDA2.0-mini": ("vanilla", "des-vote:beta=0.15", "des-vote:beta=0.1"),
    "LLaDA-MoE": ("vanilla", "des-vote:beta=0.6", "des-vote:beta=0.4"),
}
DRAWS = 4  # routings that take turns, so that no expert stays in a cache
SEED = 7


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    if not cpu.ready():
        return 1
    measures, facts = [], []
    for shape in LARGE:
        for kind in asked.format or ("bf16", "int8", "int4"):
            for made, fact in timed(shape, kind, asked.tokens, asked.turns):
                measures += made
                facts.append(fact)
                tell(fact)
    content = record(
        "layer on a CPU",
        ["scripts/layer", *words],
        measures,
        facts={"tokens": asked.tokens, "threads": torch.get_num_threads(), "layers": facts},
    )
    print(write_record(asked.out, content))
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/layer", description=__doc__)
    parser.add_argument("--format", action="append", choices=("bf16", "int8", "int4"))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def timed(
    shape: Shape, kind: str, tokens: int, turns: int
) -> list[tuple[list[Measure], dict[str, object]]]:
    """For each policy its samples, and what they come to."""
    plain = weights(shape)
    packed = cpu.pack(plain if kind == "bf16" else quantised(plain, kind))
    draw = torch.Generator().manual_seed(SEED)
    x = torch.randn(tokens, shape.hidden, generator=draw).bfloat16()
    bend = bend_for(shape.router, shape.unique)
    scores = [skewed(shape.router, tokens, bend, draw) for _ in range(DRAWS)]
    found = []
    for policy in POLICIES[shape.name]:
        routings = [route(one, parse_policy(policy)) for one in scores]
        works: dict[str, Callable[[Routing], object]] = {
            "read": lambda routing: cpu.read(packed, routing.used),
            "ours": lambda routing: cpu.run_experts(x, routing, packed),
        }
        if kind == "bf16":
            works["grouped"] = lambda routing: grouped.run_experts(x, routing, plain)
        samples = {name: [] for name in works}
        for turn in range(turns + DRAWS):
            for name, work in works.items():
                began = time.perf_counter()
                work(routings[turn % DRAWS])
                if turn >= DRAWS:
                    samples[name].append((time.perf_counter() - began) * 1e3)
        experts = statistics.fmean(int(routing.used.sum()) for routing in routings)
        size = experts * packed.gate_up.nbytes / shape.router.experts
        found.append(summed_up((shape.name, kind, policy), experts, size, samples))
    return found


def summed_up(
    labels: tuple[str, str, str], experts: float, size: float, samples: dict[str, list[float]]
) -> tuple[list[Measure], dict[str, object]]:
    """``labels``: shape, format, policy. ``size`` bytes are read for so many ``experts``."""
    median = {name: statistics.median(taken) for name, taken in samples.items()}
    pairs = zip(samples["read"], samples["ours"], strict=True)
    fact = {
        **dict(zip(("shape", "format", "policy"), labels, strict=True)),
        "experts": experts,
        "bytes": size,
        "read_gb_per_s": size / median["read"] / 1e6,
        "share_of_read_limit": statistics.median(read / ours for read, ours in pairs),
        "grouped_over_ours": median["grouped"] / median["ours"] if "grouped" in median else None,
        "ours_ms": median["ours"],
        "load": os.getloadavg()[0],
    }
    label = " ".join(labels)
    return [Measure(f"{label} {name}", "ms", tuple(t)) for name, t in samples.items()], fact


def weights(shape: Shape) -> Slab:
    """bf16, a few random experts over and over: what is read matters, not what it says."""
    draw = torch.Generator().manual_seed(SEED)
    experts, few = shape.router.experts, 8
    up = (torch.randn(few, 2 * shape.width, shape.hidden, generator=draw) * 0.02).bfloat16()
    down = (torch.randn(few, shape.hidden, shape.width, generator=draw) * 0.02).bfloat16()
    times = (experts // few, 1, 1)
    return Slab(up.repeat(times), down.repeat(times), torch.arange(experts))


def quantised(slab: Slab, kind: str) -> Slab:
    """The first expert in that format, over and over."""
    form = FORMATS[kind]

    def one(weight: torch.Tensor) -> QTensor:
        first, count = quantise(weight[:1].float(), form), len(weight)
        return QTensor(
            first.q.repeat(count, 1, 1), first.scales.repeat(count, 1, 1), form, weight.shape[-1]
        )

    return Slab(one(slab.gate_up), one(slab.down), slab.slot_of)


def tell(fact: dict[str, object]) -> None:
    ratio = fact["grouped_over_ours"]
    peer = "" if ratio is None else f", {ratio:.1f} x as fast as grouped_mm"
    print(
        f"{fact['shape']:14} {fact['format']:5} {fact['policy']:20} {fact['experts']:5.1f} experts "
        f"{fact['ours_ms']:7.2f} ms, {fact['share_of_read_limit']:.0%} of the read limit at "
        f"{fact['read_gb_per_s']:.0f} GB/s{peer}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
