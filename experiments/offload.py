"""Times experts that do not all fit in memory, on a CPU with a disk, and fits a replay's rates.

    python -m experiments offload FOLDER      # a packed checkpoint, such as LLaDA2.0-mini in int8

The experts of a few layers are served from the disk and computed. Policies and memory sizes
alternate block by block. Routing is synthetic, by the law of the record "Replay drawn mini". The
hardware model of `coterie replay` is fitted to some of the runs and validated on the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from coterie.checkpoints.model_folder import ModelFolder
from coterie.families import ModelConfig, detect_family
from coterie.lab.planner.rate_fit import RateValidation, TimedForwards, validate
from coterie.lab.planner.served_trace import ServedTrace, serve_trace
from coterie.lab.planner.synthetic_trace import LLADA2_MINI, SyntheticShape, synthetic_trace
from coterie.lab.records import Measurement
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.lab.replay.trace import Trace
from coterie.loading.disk_offload import expert_file_spans
from coterie.model.spec import ModelSpec
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.capacity import Capacity
from coterie.offload.eviction import Lru
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.tiers import DiskTier
from coterie.ops.cpu.experts import allocate
from coterie.ops.packed_layout import slab_of_packed
from coterie.routing import parse_policy
from coterie.values import Slab
from experiments.records import LAW_RECORD, new_parser, read_law, save_record

Variant = tuple[ReplayPolicy, str]
"""A policy, and the share of experts in memory."""


def replay_policy(policy: str, reuse_tolerance: float | None = None) -> ReplayPolicy:
    return ReplayPolicy(parse_policy(policy), reuse_tolerance, routes_commits=True)


VANILLA, VOTE = replay_policy("vanilla"), replay_policy("des-vote:beta=0.1")
RESIDENT = replay_policy("resident-vote:beta=0.1")
SHARE = "35%"
FITTED: tuple[Variant, ...] = tuple((p, share) for share in ("25%", "50%") for p in (VANILLA, VOTE))
VARIANTS: tuple[Variant, ...] = (
    *FITTED,
    *((policy, SHARE) for policy in (VANILLA, VOTE, RESIDENT)),
    (replay_policy("resident-vote:beta=0.1", 0.05), SHARE),
    (replay_policy("des-vote:beta=0.15"), SHARE),
    (RESIDENT, "25%"),
    (RESIDENT, "50%"),
)


def main(argv: Sequence[str]) -> int:
    parser = new_parser("offload", __doc__)
    parser.add_argument("folder", type=Path, help="a packed checkpoint, with its manifest")
    parser.add_argument("--layers", type=int, default=2, help="layers to time")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of a run")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--law", type=Path, default=LAW_RECORD, help="record of the routing law")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = ModelConfig.of(args.folder / "config.json")
    spec = detect_family(config).read_spec(config)
    router = spec.router
    shape = SyntheticShape(args.layers, router.experts, router.k, steps=LLADA2_MINI.steps)
    trace = synthetic_trace(shape, read_law(args.law), blocks=args.blocks, seed=7)
    layers = Layers(spec, trace, disk_tier(args.folder, args.layers))
    runs = layers.run_variants()
    timed = {label(variant): timed_layers(parts) for variant, parts in runs.items()}
    validation = validate(timed, [label(variant) for variant in FITTED], spec.expert_stride)
    print_validation(validation)
    facts = {
        "expert_bytes": spec.expert_stride,
        "forwards": len(trace.forwards),
        "threads": torch.get_num_threads(),
        "drawn": dict(trace.header.provenance),
        "prediction": validation.to_dict(),
        "runs": {label(variant): summary(spec, parts) for variant, parts in runs.items()},
    }
    command = [args.folder.name if word == str(args.folder) else word for word in argv]
    samples = {v: tuple(1e3 * float(p.seconds.mean()) for p in parts) for v, parts in runs.items()}
    measures = [Measurement(f"{label(v)}: a layer", "ms", ms) for v, ms in samples.items()]
    how = (args.out, "Offload on a CPU", ["offload", *command], measures)
    print(save_record(*how, facts=facts), flush=True)
    return 0


def disk_tier(folder: Path, layers: int) -> DiskTier:
    """The experts of the first layers that have some, numbered from 1; out of the page cache."""
    spans = [span for _, span in sorted(expert_file_spans(ModelFolder.open(folder)).items())][
        :layers
    ]
    for span in spans:
        descriptor = os.open(span.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return DiskTier(dict(enumerate(spans, 1)))


@dataclass(frozen=True)
class Layers:
    """The experts of a few layers, without the rest of the model."""

    spec: ModelSpec
    trace: Trace
    disk: DiskTier

    @property
    def x(self) -> Tensor:
        """The input of every layer, [N, H]."""
        generator = torch.Generator().manual_seed(3)
        return torch.randn(LLADA2_MINI.tokens, self.spec.hidden, generator=generator).bfloat16()

    def run_variants(self) -> dict[Variant, list[ServedTrace]]:
        """Each variant with its own empty cache; blocks alternate in random order."""
        stores = {variant: self.store(self.slots(variant[1])) for variant in VARIANTS}
        runs: dict[Variant, list[ServedTrace]] = {variant: [] for variant in VARIANTS}
        rng, x = Random(0), self.x
        for block in self.blocks():
            for variant in rng.sample(VARIANTS, len(VARIANTS)):
                runs[variant].append(serve_trace(block, variant[0], stores[variant], x))
        return runs

    def slots(self, share: str) -> int:
        sizes = {"layers": len(self.spec.moe_layers), "experts": self.spec.router.experts}
        return Capacity.parse(share).slots(**sizes, expert_bytes=self.spec.expert_stride)

    def blocks(self) -> Iterator[Trace]:
        forwards, steps = self.trace.forwards, LLADA2_MINI.steps
        for first in range(0, len(forwards), steps):
            yield replace(self.trace, forwards=forwards[first : first + steps])

    def store(self, slots: int) -> CachedExpertStore:
        spec = self.spec

        def as_slab(memory: Tensor, slot_of: Tensor) -> Slab:
            sizes = {"hidden": spec.hidden, "width": spec.expert_width}
            return slab_of_packed(memory, spec.panel_kind, slot_of, **sizes)

        sizes = (spec.router.experts, spec.expert_stride, slots)
        # Written once, so that its pages are mapped: a first read takes 1.5 times as long.
        memory = lambda count, size: allocate(count, size).zero_()  # noqa: E731
        return CachedExpertStore(ThreadedFetcher(self.disk), as_slab, memory, *sizes, Lru())


def label(variant: Variant) -> str:
    return f"{variant[0]}, {variant[1]} in memory"


def summary(spec: ModelSpec, parts: Sequence[ServedTrace]) -> dict[str, object]:
    used, loads = (np.concatenate([getattr(p, n) for p in parts]) for n in ("used", "loads"))
    seconds = np.concatenate([part.seconds for part in parts])
    stall = sum(part.stall_seconds for part in parts)
    return {
        "experts": float(used.mean()),
        "loads": float(loads.mean()),
        "hit_rate": 1 - float(loads.sum() / used.sum()),
        "bytes_a_layer": float(loads.mean()) * spec.expert_stride,
        "ms_a_layer": 1e3 * float(seconds.mean()),
        "stall_ms_a_layer": 1e3 * stall / seconds.size,
    }


def timed_layers(parts: Sequence[ServedTrace]) -> TimedForwards:
    """Every layer as a forward of its own."""
    columns = ("used", "loads", "seconds")
    used, loads, seconds = (np.concatenate([getattr(p, c).ravel() for p in parts]) for c in columns)
    return TimedForwards(used[:, None], loads[:, None], seconds)


def print_validation(validation: RateValidation) -> None:
    for name, seconds in validation.measured.items():
        role = "fitted" if name in validation.fitted else "predicted"
        error = f"off by {validation.relative_error(name):+.1%}"
        print(f"{name}: {1e3 * seconds:.2f} ms, {role}, {error}")
    print(f"largest error of a predicted run {max(validation.held_out_errors):.1%}", flush=True)
