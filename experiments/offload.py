"""Times experts that do not all fit in memory, on a CPU with a disk, and fits a replay's rates.

    python -m experiments offload FOLDER      # a packed checkpoint, such as LLaDA2.0-mini in int8

The experts of a few layers are served from the disk and computed. Policies and memory sizes
alternate block by block. Routing is synthetic, by the law of the record "Replay drawn mini". The
hardware model of `coterie replay` is fitted to some of the runs and validated on the others.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.checkpoints.model_folder import ModelFolder
from coterie.families import ModelConfig, detect_family
from coterie.keys import to_json
from coterie.lab.planner.measurement import cached_store
from coterie.lab.planner.rate_fit import TimedForwards, fit_rates
from coterie.lab.planner.served_trace import ServedTrace, serve_trace
from coterie.lab.planner.synthetic_trace import LLADA2_MINI, SyntheticShape, synthetic_trace
from coterie.lab.records import Measurement
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.lab.replay.hardware_model import HardwareModel, predict_seconds
from coterie.lab.replay.trace import Trace
from coterie.loading.disk_offload import expert_file_spans
from coterie.model.spec import ModelSpec
from coterie.offload.capacity import Capacity
from coterie.offload.tiers import DiskTier
from coterie.routing import parse_policy
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
        "prediction": validation,
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
        stores = {
            variant: cached_store(self.disk, self.spec, self.slots(variant[1]))
            for variant in VARIANTS
        }
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


def validate(
    runs: Mapping[str, TimedForwards], fit_names: Collection[str], expert_bytes: int
) -> dict[str, Any]:
    """The hardware model fitted to the runs of these names, and its predictions of all runs."""
    hardware = fit_rates([runs[name] for name in fit_names], expert_bytes)
    facts: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        seconds, _ = predict_seconds(hardware, run.used, run.loads, expert_bytes)
        measured, predicted = float(run.seconds.mean()), float(seconds.mean())
        times = {"ms": 1e3 * measured, "predicted_ms": 1e3 * predicted}
        error = {"relative_error": predicted / measured - 1}
        facts[name] = {"fitted": name in fit_names, **times, **error}
    errors = [abs(run["relative_error"]) for run in facts.values() if not run["fitted"]]
    machine = {**to_json(hardware), "as_typed": format_hardware(hardware)}
    return {"machine": machine, "worst": max(errors), "median": median(errors), "runs": facts}


def format_hardware(hardware: HardwareModel) -> str:
    """The options of `coterie replay` for this hardware model."""
    memory = hardware.memory_bandwidth
    options = {
        "--link-bandwidth": f"{hardware.link_bandwidth / 1e9:.3g}GB/s",
        "--memory-bandwidth": None if memory is None else f"{memory / 1e9:.3g}GB/s",
        "--other-ms": f"{1e3 * hardware.other_seconds:.3g}",
        "--transfer-latency-ms": f"{1e3 * hardware.transfer_latency:.3g}",
        "--overlap": f"{hardware.overlap:.3g}",
    }
    return " ".join(f"{flag} {value}" for flag, value in options.items() if value is not None)


def print_validation(validation: Mapping[str, Any]) -> None:
    for name, run in validation["runs"].items():
        role = "fitted" if run["fitted"] else "predicted"
        print(f"{name}: {run['ms']:.2f} ms, {role}, off by {run['relative_error']:+.1%}")
    print(f"largest error of a predicted run {validation['worst']:.1%}", flush=True)
