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

from coterie.lab.records import Measurement
from coterie.lab.replay.judging import concatenate_runs, validate
from coterie.lab.replay.learning import TimedForwards
from coterie.lab.replay.serving import ServedTrace, serve_trace
from coterie.lab.replay.synthetic import LLADA2_MINI
from coterie.lab.replay.trace import Trace
from coterie.loading.disk_offload import expert_file_spans
from coterie.loading.target import ModelFolder
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.eviction import Lru
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.store import TrackedExpertStore
from coterie.offload.tiers import DiskTier, ExpertFileSpan
from coterie.ops.cpu.experts import allocate
from coterie.ops.packed_layout import slab_of_packed
from coterie.values import ExpertRequest, Slab

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
    judged = validate(runs, [named(arm) for arm in TEACHERS], bench.size)
    measures = ratios + [
        Measurement(
            f"{named(arm)}: a layer", "ms", tuple(1e3 * part.seconds.mean() for part in parts)
        )
        for arm, parts in found.items()
    ]
    tell(judged)
    counted = {named(arm): summary(bench, trace, arm, found[arm]) for arm in found}
    return (
        "Offload on a CPU",
        measures,
        {**bench.about(trace), "foretelling": judged.to_dict(), "runs": counted},
    )


def on_disk(folder: Path, layers: int) -> DiskTier:
    """The experts of the first layers that have some, called 1, 2 ..; let go from the system's
    cache of files."""
    found: dict[int, ExpertFileSpan] = {}
    spans = sorted(expert_file_spans(ModelFolder.open(folder)).items())
    for number, (_, one) in enumerate(spans[:layers], 1):
        descriptor = os.open(one.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        found[number] = one
    return DiskTier(found)


@dataclass(frozen=True)
class Layers:
    """Experts of a few layers alone."""

    bench: Bench
    trace: Trace
    disk: DiskTier

    @property
    def x(self) -> Tensor:
        """What goes into every layer, [N, H]."""
        draw = torch.Generator().manual_seed(3)
        return torch.randn(LLADA2_MINI.tokens, self.bench.spec.hidden, generator=draw).bfloat16()

    def with_few(self) -> dict[Arm, list[ServedTrace]]:
        """Every arm with slots of its own, empty at first: block by block, each time in another
        order, so that what else the machine does falls on all of them alike."""
        stores = {arm: self.store(self.bench.slots(arm[1])) for arm in ARMS}
        found: dict[Arm, list[ServedTrace]] = {arm: [] for arm in ARMS}
        draw, x = Random(0), self.x
        for few in self.blocks():
            order = list(ARMS)
            draw.shuffle(order)
            for arm in order:
                found[arm].append(serve_trace(few, arm[0], stores[arm], x))
        return found

    def with_all(self, turns: int) -> list[Measurement]:
        """What a store that fetches costs where its slots are full and hold all, against none: over
        the same bytes, for where these lie in memory can change more than what is compared."""
        ample, slabs = self.store(self.bench.spec.router.experts), {}
        for layer in self.trace.header.layers:
            everybody = torch.ones(self.bench.spec.router.experts, dtype=torch.bool)
            list(ample.serve(layer, ExpertRequest(everybody)))
            (slabs[layer],) = ample.serve(layer, ExpertRequest(everybody))
        stores: dict[str, TrackedExpertStore] = {ALL: ResidentExpertStore(slabs), AMPLE: ample}
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
            Measurement(f"{name}: {AMPLE} against {ALL}", "x", tuple(ratios))
            for name, ratios in found.items()
        ]

    def blocks(self) -> Iterator[Trace]:
        forwards = self.trace.forwards
        for first in range(0, len(forwards), LLADA2_MINI.steps):
            yield replace(self.trace, forwards=forwards[first : first + LLADA2_MINI.steps])

    def store(self, slots: int) -> CachedExpertStore:
        spec = self.bench.spec

        def shown(held: Tensor, slot_of: Tensor) -> Slab:
            sizes = {"hidden": spec.hidden, "width": spec.expert_width}
            return slab_of_packed(held, spec.panel_kind, slot_of, **sizes)

        experts, size = spec.router.experts, self.bench.size
        return CachedExpertStore(
            ThreadedFetcher(self.disk), shown, touched, experts, size, slots, Lru()
        )


def touched(slots: int, size: int) -> Tensor:
    """Memory whose pages are there: a first read into others takes half as long again."""
    return allocate(slots, size).zero_()


def timed_layers(parts: Sequence[ServedTrace]) -> TimedForwards:
    """Every layer as a forward of its own."""
    return concatenate_runs(
        [
            TimedForwards(
                part.used.reshape(-1, 1), part.loads.reshape(-1, 1), part.seconds.reshape(-1)
            )
            for part in parts
        ]
    )


def summary(
    bench: Bench, trace: Trace, arm: Arm, parts: Sequence[ServedTrace]
) -> dict[str, object]:
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
        "stall_ms_a_layer": 1e3 * sum(part.seconds_waited for part in parts) / seconds.size,
    }
