"""Times experts that do not all fit into memory, on a CPU with a disk behind it.

    scripts/offload FOLDER --make     # writes the experts
    scripts/offload FOLDER            # serves them

Layers of LLaDA2.0-mini's shape in int8, of random weights, and routing that is drawn: its law is
that of "Replay drawn mini", read off the model in the package. Each policy has the store serve and
compute every layer of every forward, with 35 % of the experts in memory and reads from the disk;
beside it stand all experts in memory, and a store whose slots hold all of them. Attention, router,
shared experts and logits are not part of it. The clock that replays foretell is given the rates
measured here, of reading experts and of computing them, and held against what happened.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coterie import ops
from coterie.experts.couriers import READERS, Readers
from coterie.experts.eviction import Lru
from coterie.experts.offload import Offloaded
from coterie.experts.store import Resident
from coterie.experts.tiers import Blobs, OnDisk
from coterie.ops.cpu.kernels import memory
from coterie.ops.panels import in_panels
from coterie.planning.booking import Play
from coterie.planning.machine import Machine, clock
from coterie.planning.serving import Served, serve_trace
from coterie.planning.synthetic import MINI, Law, synthetic
from coterie.planning.trace import Trace
from coterie.quant import FORMATS, quantise
from coterie.results import Measure, record, write_record
from coterie.routing import parse_policy
from coterie.values import Demand, Panels, Slab, Store

HIDDEN, WIDTH, KIND = 2048, 512, "int8"
MINI_BYTES = dict(MINI.expert_bytes)[KIND]
SHARE = 0.35
DISTINCT = 4
FEW, MANY = 2, 32  # experts read at once, to learn the disk's rate
SLOTS = int(SHARE * MINI.experts)
LAYERS = 19  # of the whole model
DRAWN = Path("results/replay-drawn-mini.json")
PLAYS = (
    Play(parse_policy("vanilla")),
    Play(parse_policy("des-vote:beta=0.1")),
    Play(parse_policy("resident-vote:beta=0.1")),
    Play(parse_policy("resident-vote:beta=0.1"), drift=0.05),
)
ALL, AMPLE = "all in memory", "slots for all"
SUMS = "sums.json"
GB = 1e9


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    if asked.make:
        make(asked.folder, asked.layers)
        return 0
    law = Law(**json.loads(DRAWN.read_text())["facts"]["as read off"]["law"])
    shape = replace(MINI, layers=asked.layers)
    trace = synthetic(shape, law, blocks=asked.blocks, seed=7)
    bench = Bench(trace, opened(asked.folder, trace), torch.randn(MINI.tokens, HIDDEN).bfloat16())
    measures, facts = bench.everything(asked.rounds)
    told = [asked.folder.name if word == str(asked.folder) else word for word in words]
    content = record("Offload on a CPU", ["scripts/offload", *told], measures, facts=facts)
    print(write_record(asked.out, content))
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/offload", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the experts are, or are made")
    parser.add_argument("--make", action="store_true", help="write the experts, and no more")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def make(folder: Path, layers: int) -> None:
    """A file for each layer, a few experts over and over, and the checksum of each."""
    few = [blob(seed) for seed in range(DISTINCT)]
    order = [expert % DISTINCT for expert in range(MINI.experts)]
    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(1, layers + 1):
        with (folder / str(layer)).open("wb") as sink:
            for which in order:
                sink.write(few[which].numpy().data)
            sink.flush()
            os.fsync(sink.fileno())
    sums = [zlib.crc32(one.numpy().data) for one in few]
    (folder / SUMS).write_text(json.dumps([sums[which] for which in order]))


def blob(seed: int) -> Tensor:
    """One packed expert, [bytes] uint8."""
    draw, form = torch.Generator().manual_seed(seed), FORMATS[KIND]
    shapes = ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH))
    up, down = (quantise(torch.randn(1, *s, generator=draw) * 0.02, form) for s in shapes)
    packed = ops.pack(Slab(up, down, torch.zeros(1, dtype=torch.int64))).gate_up
    assert isinstance(packed, Panels)
    return packed.packed[0]


def opened(folder: Path, trace: Trace) -> OnDisk:
    """The experts on the disk, let go from the system's cache of files."""
    sums, size = tuple(json.loads((folder / SUMS).read_text())), MINI_BYTES
    for layer in trace.about.layers:
        descriptor = os.open(folder / str(layer), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return OnDisk(
        {layer: Blobs(folder / str(layer), 0, size, sums) for layer in trace.about.layers}
    )


def shown(held: Tensor, slot_of: Tensor) -> Slab:
    return in_panels(held, KIND, slot_of, hidden=HIDDEN, width=WIDTH)


@dataclass(frozen=True)
class Bench:
    """Drawn routing, experts on a disk, and what goes into every layer."""

    trace: Trace
    disk: OnDisk
    x: Tensor  # [N, H]

    def everything(self, rounds: int) -> tuple[list[Measure], dict[str, object]]:
        """All experts in memory first, whose two policies give the rates of the machine."""
        found = self.with_all(2 * rounds)
        runs = [found[f"{play}, {ALL}"] for play in PLAYS[:2]]
        pace, rest = line(*map(computed, runs))
        costs = [self.ratios(found, play) for play in PLAYS[:2]]
        reads = {many: self.link(many) for many in (FEW, MANY)}
        link, latency = line(*((many * MINI_BYTES, reads[many]) for many in (MANY, FEW)))
        found |= self.with_few(rounds)
        machine = Machine(link, pace, rest * len(self.trace.about.layers), latency=latency)
        measures = costs + [
            Measure(f"reading {many} experts", "ms", tuple(1e3 * one for one in taken))
            for many, taken in reads.items()
        ]
        measures += [self.measure(name, runs) for name, runs in found.items()]
        return measures, {
            "layers": len(self.trace.about.layers),
            "slots": SLOTS,
            "expert_bytes": MINI_BYTES,
            "forwards": len(self.trace.forwards),
            "made": self.trace.about.made,
            "computing experts, GB/s": pace / GB,
            "besides, ms a layer": 1e3 * rest,
            "reading experts, GB/s": link / GB,
            "besides, ms where any is read": 1e3 * latency,
            "runs": {name: self.told(runs, machine) for name, runs in found.items()},
        }

    def with_all(self, turns: int) -> dict[str, list[Served]]:
        """With a store that fetches, whose slots are full and hold all, and without it: over the
        same bytes, for where these lie in memory can change more than what is compared."""
        ample, slabs = self.store(MINI.experts), {}
        for layer in self.trace.about.layers:
            everybody = torch.ones(MINI.experts, dtype=torch.bool)
            list(ample.serve(layer, Demand(everybody)))
            (slabs[layer],) = ample.serve(layer, Demand(everybody))
        stores: dict[str, Store] = {ALL: Resident(slabs), AMPLE: ample}
        self.serve(PLAYS[1], ample)  # the first forwards of a process are slow
        found: dict[str, list[Served]] = {}
        for _ in range(turns):
            for play in PLAYS[:2]:
                for name, served in self.in_turns(play, stores).items():
                    found.setdefault(f"{play}, {name}", []).append(served)
        return found

    def in_turns(self, play: Play, stores: Mapping[str, Store]) -> dict[str, Served]:
        """Block by block, who is first changing with each: what else the machine does falls on all
        of them alike."""
        parts: dict[str, list[Served]] = {name: [] for name in stores}
        for block in range(0, len(self.trace.forwards), MINI.steps):
            forwards = self.trace.forwards[block : block + MINI.steps]
            for name in sorted(stores, reverse=block // MINI.steps % 2 == 1):
                few = replace(self.trace, forwards=forwards)
                parts[name].append(serve_trace(few, play, stores[name], self.x))
        return {name: joined(served) for name, served in parts.items()}

    def with_few(self, turns: int) -> dict[str, list[Served]]:
        """Every policy with slots of its own, empty at first."""
        found: dict[str, list[Served]] = {}
        for _ in range(turns):
            for play in PLAYS:
                served = self.serve(play, self.store(SLOTS))
                found.setdefault(f"{play}, {SHARE:.0%} in memory", []).append(served)
        return found

    def serve(self, play: Play, store: Store) -> Served:
        return serve_trace(self.trace, play, store, self.x)

    def store(self, slots: int) -> Offloaded:
        return Offloaded(Readers(self.disk), shown, memory, MINI.experts, MINI_BYTES, slots, Lru())

    def ratios(self, found: Mapping[str, Sequence[Served]], play: Play) -> Measure:
        """What slots for all cost, turn by turn."""
        pairs = zip(found[f"{play}, {AMPLE}"], found[f"{play}, {ALL}"], strict=True)
        ratios = tuple(float(a.seconds.sum() / b.seconds.sum()) for a, b in pairs)
        return Measure(f"{play}: {AMPLE} against {ALL}", "x", ratios)

    def link(self, many: int, times: int = 12) -> list[float]:
        """Seconds for so many experts, read as a store reads them, and nothing computed."""
        held = memory(many, MINI_BYTES)
        rng, layers = np.random.default_rng(many), self.trace.about.layers
        found = []
        with ThreadPoolExecutor(READERS) as readers:
            for at in range(times + 1):
                layer = layers[at % len(layers)]
                experts = rng.permutation(MINI.experts)[:many].tolist()
                began = time.perf_counter()
                reads = [
                    readers.submit(self.disk.fetch, layer, expert, held[slot])
                    for slot, expert in enumerate(experts)
                ]
                for read in reads:
                    read.result()
                found.append(time.perf_counter() - began)
        return found[1:]

    def measure(self, name: str, runs: Sequence[Served]) -> Measure:
        return Measure(f"{name}: a layer", "ms", tuple(1e3 * r.seconds.mean() for r in runs))

    def told(self, runs: Sequence[Served], machine: Machine) -> dict[str, object]:
        """What happened, of the median run, and what a replay foretells of it."""
        run = sorted(runs, key=lambda run: run.seconds.sum())[len(runs) // 2]
        passes, layers = run.used.shape
        beside, after = (
            clock(one, run.used, run.loads, MINI_BYTES, decoding=passes).forward / layers
            for one in (machine, replace(machine, overlap=False))
        )
        layer = float(run.seconds.mean())
        return {
            "experts": float(run.used.mean()),
            "loads": float(run.loads.mean()),
            "hit_rate": run.hit_rate,
            "bytes_a_layer": float(run.loads.mean()) * MINI_BYTES,
            "ms_a_layer": 1e3 * layer,
            "stall_ms_a_layer": 1e3 * run.waited / run.used.size,
            "foretold_ms": {"reads beside computing": 1e3 * beside, "after": 1e3 * after},
            "foretold_off_by": {
                "reads beside computing": beside / layer - 1,
                "after": after / layer - 1,
            },
            "tokens_per_second_of_19_layers": MINI.tokens / MINI.steps / (LAYERS * layer),
        }


def joined(parts: Sequence[Served]) -> Served:
    """One after the other."""
    used, loads, seconds = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("used", "loads", "seconds")
    )
    return Served(used, loads, seconds, sum(part.waited for part in parts))


def computed(runs: Sequence[Served]) -> tuple[float, list[float]]:
    """Bytes of experts in a layer, and the seconds that each run took for it."""
    return float(runs[0].used.mean()) * MINI_BYTES, [float(run.seconds.mean()) for run in runs]


def line(
    many: tuple[float, Sequence[float]], few: tuple[float, Sequence[float]]
) -> tuple[float, float]:
    """Bytes a second and seconds besides, through the medians of two sizes."""
    (more, long), (less, short) = ((size, float(np.median(taken))) for size, taken in (many, few))
    rate = (more - less) / (long - short)
    return rate, short - less / rate


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
