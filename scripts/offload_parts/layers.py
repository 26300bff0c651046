"""The experts of a few layers alone, block by block in turns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from offload_parts.bench import POLICIES, SHARE, Arm, Bench, Found, named, play, tell
from torch import Tensor

from coterie.engine.offloaded import blobs
from coterie.experts.couriers import Readers
from coterie.experts.eviction import Lru
from coterie.experts.offload import Offloaded
from coterie.experts.store import Resident
from coterie.experts.tiers import Blobs, OnDisk
from coterie.families import Config, recognise
from coterie.families.names import is_stacked, weight_map
from coterie.model.checkpoint import Checkpoint
from coterie.ops.cpu.kernels import memory
from coterie.ops.panels import in_panels
from coterie.planning.judging import judge, together
from coterie.planning.learning import Timed
from coterie.planning.serving import Served, serve_trace
from coterie.planning.synthetic import MINI
from coterie.planning.trace import Trace
from coterie.results import Measure
from coterie.values import Demand, Slab, Store

ALL, AMPLE = "all in memory", "slots for all"
TEACHERS: tuple[Arm, ...] = tuple(
    (one, share) for share in ("25%", "50%") for one in (POLICIES[0], POLICIES[1])
)
ARMS: tuple[Arm, ...] = (
    *TEACHERS,
    *((one, SHARE) for one in POLICIES),
    (play("des-vote:beta=0.15"), SHARE),
    (POLICIES[2], "25%"),
    (POLICIES[2], "50%"),
)


def measure(bench: Bench, *, layers: int, blocks: int, rounds: int) -> Found:
    trace = bench.drawn(layers, blocks)
    alone = Layers(bench, trace, on_disk(bench.folder, layers))
    ratios, found = alone.with_all(2 * rounds), alone.with_few()
    runs = {named(arm): timed_layers(served) for arm, served in found.items()}
    judged = judge(runs, [named(arm) for arm in TEACHERS], bench.size)
    measures = ratios + [
        Measure(f"{named(arm)}: a layer", "ms", tuple(1e3 * part.seconds.mean() for part in parts))
        for arm, parts in found.items()
    ]
    tell(judged)
    counted = {named(arm): summary(bench, trace, arm, found[arm]) for arm in found}
    return (
        "Offload on a CPU",
        measures,
        {**bench.about(trace), "foretelling": judged.document(), "runs": counted},
    )


def on_disk(folder: Path, layers: int) -> OnDisk:
    """The experts of the first layers that have some, called 1, 2 ..; let go from the system's
    cache of files."""
    checkpoint = Checkpoint.of(folder)
    config = Config.of(folder / "config.json")
    family = recognise(config)
    names, spec = family.names, family.read(config)
    places = weight_map(names, spec, stacked=is_stacked(checkpoint.tensors))
    found: dict[int, Blobs] = {}
    for number, (_, one) in enumerate(sorted(blobs(checkpoint, places).items())[:layers], 1):
        descriptor = os.open(one.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        found[number] = one
    return OnDisk(found)


@dataclass(frozen=True)
class Layers:
    """Experts of a few layers alone."""

    bench: Bench
    trace: Trace
    disk: OnDisk

    @property
    def x(self) -> Tensor:
        """What goes into every layer, [N, H]."""
        draw = torch.Generator().manual_seed(3)
        return torch.randn(MINI.tokens, self.bench.spec.hidden, generator=draw).bfloat16()

    def with_few(self) -> dict[Arm, list[Served]]:
        """Every arm with slots of its own, empty at first: block by block, each time in another
        order, so that what else the machine does falls on all of them alike."""
        stores = {arm: self.store(self.bench.slots(arm[1])) for arm in ARMS}
        found: dict[Arm, list[Served]] = {arm: [] for arm in ARMS}
        draw, x = Random(0), self.x
        for few in self.blocks():
            order = list(ARMS)
            draw.shuffle(order)
            for arm in order:
                found[arm].append(serve_trace(few, arm[0], stores[arm], x))
        return found

    def with_all(self, turns: int) -> list[Measure]:
        """What a store that fetches costs where its slots are full and hold all, against none: over
        the same bytes, for where these lie in memory can change more than what is compared."""
        ample, slabs = self.store(self.bench.spec.router.experts), {}
        for layer in self.trace.about.layers:
            everybody = torch.ones(self.bench.spec.router.experts, dtype=torch.bool)
            list(ample.serve(layer, Demand(everybody)))
            (slabs[layer],) = ample.serve(layer, Demand(everybody))
        stores: dict[str, Store] = {ALL: Resident(slabs), AMPLE: ample}
        found: dict[str, list[float]] = {}
        for turn in range(turns + 1):  # the first forwards of a process are slow
            for one in POLICIES[:2]:
                taken = dict.fromkeys(stores, 0.0)
                for block, few in enumerate(self.blocks()):
                    for name in sorted(stores, reverse=block % 2 == 1):
                        taken[name] += serve_trace(few, one, stores[name], self.x).seconds.sum()
                if turn:
                    found.setdefault(str(one), []).append(taken[AMPLE] / taken[ALL])
        return [
            Measure(f"{name}: {AMPLE} against {ALL}", "x", tuple(ratios))
            for name, ratios in found.items()
        ]

    def blocks(self) -> Iterator[Trace]:
        forwards = self.trace.forwards
        for first in range(0, len(forwards), MINI.steps):
            yield replace(self.trace, forwards=forwards[first : first + MINI.steps])

    def store(self, slots: int) -> Offloaded:
        spec = self.bench.spec

        def shown(held: Tensor, slot_of: Tensor) -> Slab:
            sizes = {"hidden": spec.hidden, "width": spec.expert_width}
            return in_panels(held, spec.panel_kind, slot_of, **sizes)

        experts, size = spec.router.experts, self.bench.size
        return Offloaded(Readers(self.disk), shown, touched, experts, size, slots, Lru())


def touched(slots: int, size: int) -> Tensor:
    """Memory whose pages are there: a first read into others takes half as long again."""
    return memory(slots, size).zero_()


def timed_layers(parts: Sequence[Served]) -> Timed:
    """Every layer as a forward of its own."""
    return together(
        [
            Timed(part.used.reshape(-1, 1), part.loads.reshape(-1, 1), part.seconds.reshape(-1))
            for part in parts
        ]
    )


def summary(bench: Bench, trace: Trace, arm: Arm, parts: Sequence[Served]) -> dict[str, object]:
    used, loads, seconds = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("used", "loads", "seconds")
    )
    foretold = bench.foretold(trace, arm)
    return {
        "experts": float(used.mean()),
        "loads": float(loads.mean()),
        "hit_rate": 1 - float(loads.sum() / used.sum()),
        "bytes_a_layer": float(loads.mean()) * bench.size,
        "loads_as_replayed": bool((foretold.loads == loads).all()),
        "ms_a_layer": 1e3 * float(seconds.mean()),
        "stall_ms_a_layer": 1e3 * sum(part.waited for part in parts) / seconds.size,
    }
