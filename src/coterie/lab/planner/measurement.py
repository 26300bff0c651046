"""Measures the rates of this machine for one model's shape, in seconds, with random weights."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coterie import ops
from coterie.errors import ConfigError
from coterie.lab.bandwidth import read_rows, readable_rows, weight_buffers
from coterie.lab.bench.cost_model import KernelKind, compute_probe
from coterie.lab.bench.forward import FORWARD, time_forward
from coterie.lab.bench.model import (
    ExpertDtype,
    other_dtype,
    random_experts,
    random_model,
    repeat_experts,
)
from coterie.lab.bench.shapes import ModelShape
from coterie.lab.machine import CPU, measure_read_bandwidth
from coterie.lab.planner.expert_counts import PUBLISHED_LAW, PassCounts
from coterie.lab.planner.rate_fit import TimedForwards, fit_rates
from coterie.lab.planner.rates import MachineRates, ShapeCost, fitted_overlap
from coterie.lab.planner.served_trace import serve_trace
from coterie.lab.planner.synthetic_trace import SyntheticShape, synthetic_trace
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.lab.replay.hardware_model import HardwareModel
from coterie.lab.timing import (
    LatencyFit,
    TimedFunction,
    fit_latency,
    predict_seconds,
    time_interleaved,
)
from coterie.model.size import model_size
from coterie.model.spec import ModelSpec
from coterie.model.transformer import LAYER_REGIONS
from coterie.model.weights import expert_bytes
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.eviction import Lru
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.tiers import DiskTier, ExpertFileSpan, FileIdentity
from coterie.ops.cpu.experts import allocate
from coterie.ops.packed_layout import slab_of_packed
from coterie.ops.threads import limited_threads
from coterie.quantization import FORMATS
from coterie.routing import parse_policy
from coterie.values import PackedExperts, Routing, Slab, expert_mask

LAYER_BYTES = 192 << 20  # bytes of the layer of experts that is timed
MIN_ROUNDS, MAX_ROUNDS, MATRIX_ROUNDS = 2, 7, 3
READ_SECONDS = 0.5
SECONDS = 2.0  # of the calls of one format, from the second round on
WARM_CALLS = 3  # kernel calls per reading of the clock; the first finds the weights in memory
WARM_CASES = ((1, 4), (1, 16), (4, 4), (4, 16), (4, 64))  # experts, pairs
LAYER_SHARES = (0.25, 0.5, 1.0)  # of the timed layer's experts
SMALL_VOCABULARY = 4096
DISK_EXPERTS = 32  # experts in the file that the disk is timed with
DISK_SHARES, DISK_POLICIES = (0.25, 0.5), ("vanilla", "des-vote:beta=0.25")
DISK_BLOCKS, DISK_STEPS = 2, 4
ASSUMED_GPU_READ, ASSUMED_LINK = 400e9, 25e9

ProgressCallback = Callable[[str], None]


@dataclass(frozen=True)
class GivenRates:
    """Bytes per second that the user gives in place of a measurement, or of an assumption."""

    read: float | None = None
    disk: float | None = None
    link: float | None = None  # to a GPU
    gpu_read: float | None = None


def gpu_rates(formats: Sequence[ExpertDtype], given: GivenRates) -> MachineRates:
    """The rates of a GPU that hides all arithmetic: its memory and its link, given or assumed."""
    hidden: LatencyFit = {"t0": 0.0, "b": 0.0, "a": 0.0, "r2": 1.0, "error": 0.0}
    return MachineRates(
        read_bandwidth=given.gpu_read or ASSUMED_GPU_READ,
        matrix_rate=float("inf"),
        router_rate=float("inf"),
        experts=dict.fromkeys(formats, hidden),
        overlap=1.0,
        layer_seconds=0.0,
        copies=HardwareModel(given.link or ASSUMED_LINK),
    )


def measure_rates(
    shape: ModelShape,
    formats: Sequence[ExpertDtype],
    given: GivenRates,
    *,
    tokens: int,
    folder: Path | None = None,
    on_progress: ProgressCallback = lambda doing: None,
) -> MachineRates:
    """The rates of this machine; with ``folder``, also those of the disk below it."""
    timings: dict[str, LayerTiming] = {}
    for name in formats:
        on_progress(f"timing experts in {name}")
        with forward_threads(shape, tokens):
            timings[name] = time_experts(shape, name, tokens)
    # A layer smaller than a cache is read in calls too short to show the bandwidth.
    measured = max(
        measure_read_bandwidth(READ_SECONDS),
        statistics.median(x for timing in timings.values() for x in timing.read_bandwidths),
    )
    on_progress("timing matrices")
    with forward_threads(shape, tokens):
        matrix, router = measure_matrix_rates(shape, formats[0], tokens)
    rates = MachineRates(
        measured,
        matrix,
        router,
        {name: timing.warm for name, timing in timings.items()},
        statistics.fmean(timing.overlap for timing in timings.values()),
        layer_seconds=0.0,
        copies=None,
    )
    on_progress("timing a small forward")
    rates = replace(rates, layer_seconds=measure_layer_seconds(shape, formats[0], rates, tokens))
    if folder is not None:
        on_progress("timing the disk")
        rates = replace(rates, copies=measure_copies(shape, formats[-1], folder))
    if given.disk is not None:
        clock = rates.copies or HardwareModel(given.disk)
        rates = replace(rates, copies=replace(clock, link_bandwidth=given.disk))
    return rates if given.read is None else replace(rates, read_bandwidth=given.read)


def forward_threads(shape: ModelShape, tokens: int) -> AbstractContextManager[None]:
    """The threads that a forward of this model takes."""
    active = model_size(shape.spec, torch.bfloat16).active_parameters
    return limited_threads(active // shape.spec.layers * tokens, regions=LAYER_REGIONS)


@dataclass(frozen=True)
class LayerTiming:
    """A layer of experts in one format: read, multiplied from the cache, and both."""

    warm: LatencyFit
    overlap: float
    read_bandwidths: Sequence[float]


def time_experts(shape: ModelShape, name: ExpertDtype, tokens: int) -> LayerTiming:
    """Times a layer of random experts of this shape and format, interleaved with plain reads."""
    slab, expert_bytes = timed_layer(shape, name)
    experts, k = len(slab.slot_of), shape.spec.router.k
    buffers = weight_buffers([slab.gate_up, slab.down])
    rows, dtype = readable_rows(buffers), other_dtype(name)
    x = torch.randn(max(tokens * k, 128), shape.spec.hidden).to(dtype)
    sizes = sorted({max(1, round(share * experts)) for share in LAYER_SHARES})
    functions: dict[tuple[str, int, int], TimedFunction] = {}
    for size in sizes:
        routing = spread_routing(size, tokens * k, experts)
        functions["layer", size, tokens * k] = partial(
            ops.run_experts, x[: tokens * k], routing, slab
        )
        functions["read", size, 0] = partial(read_rows, rows, routing.used)
    warm = [case for case in WARM_CASES if case[0] <= experts]
    for size, pairs in warm:
        call = partial(ops.run_experts, x[:pairs], spread_routing(size, pairs, experts), slab)
        functions["warm", size, pairs] = partial(_warm_calls, call)
    stats = time_interleaved(functions, _rounds(functions), device=CPU)
    warm_seconds = [stats["warm", *case]["median"] / WARM_CALLS for case in warm]
    fit = fit_latency([size for size, _ in warm], [pairs for _, pairs in warm], warm_seconds)
    reads = [stats["read", size, 0]["median"] for size in sizes]
    layers = [stats["layer", size, tokens * k]["median"] for size in sizes]
    products = [predict_seconds(fit, size, tokens * k) for size in sizes]
    bandwidths = [size * expert_bytes / s for size, s in zip(sizes, reads, strict=True)]
    return LayerTiming(fit, fitted_overlap(reads, products, layers), bandwidths)


def measure_matrix_rates(shape: ModelShape, name: ExpertDtype, tokens: int) -> list[float]:
    """FLOPs per second of the matrix products and of the router's."""
    kinds: tuple[KernelKind, ...] = ("matrix", "router")
    slab = random_experts(cost_of(shape, name).spec, name, torch.Generator().manual_seed(0), CPU)
    dtype = other_dtype(name)
    probe = compute_probe(shape.spec, slab, tokens, matrix_dtype=dtype, device=CPU)
    rates = [probe.measure_rates(kinds) for _ in range(MATRIX_ROUNDS)]
    return [statistics.median(each[kind] for each in rates) for kind in kinds]


def timed_layer(shape: ModelShape, name: ExpertDtype) -> tuple[Slab, int]:
    """Random experts in the kernels' format, as many as exceed a cache, and the bytes of one."""
    spec = replace(shape.spec, expert_format=FORMATS.get(name))
    slab = random_experts(spec, name, torch.Generator().manual_seed(0), CPU)
    size = sum(part.nbytes // len(part) for part in weight_buffers([slab.gate_up, slab.down]))
    count = max(min(4, spec.router.experts), min(spec.router.experts, LAYER_BYTES // size))
    return repeat_experts(slab, count), size


def spread_routing(used: int, pairs: int, experts: int) -> Routing:
    """Each of ``pairs`` tokens uses one of the first ``used`` experts, all equally often."""
    ids = (torch.arange(pairs) % used)[:, None]
    return Routing(ids, torch.ones(pairs, 1), expert_mask(ids.flatten(), experts), ids)


def measure_layer_seconds(
    shape: ModelShape, name: ExpertDtype, rates: MachineRates, tokens: int
) -> float:
    """Seconds that a layer of a small random model takes beyond what the rates predict."""
    small = small_shape(shape, name)
    model = random_model(small, name)
    result = time_forward(
        model, ["vanilla"], tokens=tokens, context=0, num_logits=1, repeats=3,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    (timing,) = result.timings
    cost = cost_of(small, name)
    pairs = tokens * small.spec.router.k
    counts = PassCounts(np.array([[round(timing.experts)]]), np.zeros((1, 1), np.int64), pairs)
    predicted = cost.seconds(rates, counts, tokens=tokens, num_logits=1, positions=tokens)
    measured = statistics.median(timing.samples[FORWARD])
    return max(0.0, measured - predicted) / small.spec.layers


def small_shape(shape: ModelShape, name: ExpertDtype) -> ModelShape:
    """The first layers, with a small vocabulary and as few experts as are timed."""
    layers = min(shape.spec.layers, shape.spec.moe.index(True) + 2)
    truncated = shape.truncate(layers)
    spec = replace(truncated.spec, vocabulary=min(SMALL_VOCABULARY, truncated.spec.vocabulary))
    router = spec.router
    fitting = LAYER_BYTES // cost_of(shape, name).expert_bytes
    experts = min(router.experts, max(2 * router.k * router.groups, fitting))
    experts = experts // router.groups * router.groups
    unique = max(router.k, shape.unique_experts * experts // router.experts)
    spec = replace(spec, router=replace(router, experts=experts))
    return replace(truncated, spec=spec, unique_experts=unique)


def cost_of(shape: ModelShape, name: ExpertDtype) -> ShapeCost:
    """The cost of a model with experts in this format, in the layout of this machine's CPU."""
    spec, dtype = replace(shape.spec, expert_format=FORMATS.get(name)), other_dtype(name)
    size = spec.expert_stride if dtype == torch.bfloat16 else expert_bytes(spec, dtype)
    return ShapeCost(spec, dtype, name, size)


def measure_copies(shape: ModelShape, name: ExpertDtype, folder: Path) -> HardwareModel:
    """The clock of fetches from a temporary file in ``folder``, learnt from served blocks.

    Raises ConfigError where no file can be written there.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".coterie-plan-") as temporary:
        tier = random_tier(shape, name, Path(temporary), layers=1, experts=DISK_EXPERTS)
        runs = serve_samples(cost_of(shape, name), tier)
        return fit_rates(runs, tier.spans[1].expert_bytes)


def serve_samples(cost: ShapeCost, tier: DiskTier) -> list[TimedForwards]:
    """Blocks served from a tier, under a few policies and shares of memory."""
    experts, k = DISK_EXPERTS, min(cost.spec.router.k, DISK_EXPERTS // 4)
    sizes = SyntheticShape(1, experts, k, steps=DISK_STEPS)
    trace = synthetic_trace(sizes, PUBLISHED_LAW, blocks=DISK_BLOCKS, seed=7)
    x = torch.randn(sizes.tokens, cost.spec.hidden).bfloat16()
    runs = []
    for share in DISK_SHARES:
        for policy in map(parse_policy, DISK_POLICIES):
            store = cached_store(tier, cost.spec, round(share * experts))
            served = serve_trace(trace, ReplayPolicy(policy), store, x)
            used, loads = (part.reshape(-1, 1) for part in (served.used, served.loads))
            runs.append(TimedForwards(used, loads, served.seconds.reshape(-1)))
    return runs


def cached_store(tier: DiskTier, spec: ModelSpec, slots: int) -> CachedExpertStore:
    """An empty cache over a tier of packed experts."""
    span = next(iter(tier.spans.values()))

    def as_slab(memory: torch.Tensor, slot_of: torch.Tensor) -> Slab:
        sizes = {"hidden": spec.hidden, "width": spec.expert_width}
        return slab_of_packed(memory, spec.panel_kind, slot_of, **sizes)

    # Written once, so that its pages are mapped: a first read takes 1.5 times as long.
    def allocate_zeros(count: int, size: int) -> torch.Tensor:
        return allocate(count, size).zero_()

    sizes = (len(span.checksums), span.expert_bytes, slots)
    return CachedExpertStore(ThreadedFetcher(tier), as_slab, allocate_zeros, *sizes, Lru())


def random_tier(
    shape: ModelShape, name: ExpertDtype, folder: Path, *, layers: int, experts: int
) -> DiskTier:
    """A file of random packed experts for each layer, from 1 on."""
    spec = cost_of(shape, name).spec
    packed = random_experts(spec, name, torch.Generator().manual_seed(0), CPU).gate_up
    if not isinstance(packed, PackedExperts):
        raise ConfigError(
            f"experts in {name} cannot be fetched from a disk without the CPU kernels"
        )
    blobs = [row.numpy().tobytes() for row in packed.packed]
    checksums = tuple(zlib.crc32(blobs[number % len(blobs)]) for number in range(experts))
    spans = {}
    for layer in range(1, layers + 1):
        path = folder / f"layer-{layer}"
        with path.open("wb") as file:
            file.writelines(blobs[number % len(blobs)] for number in range(experts))
            os.fsync(file.fileno())
        spans[layer] = ExpertFileSpan(path, 0, len(blobs[0]), checksums, FileIdentity.of(path))
    return DiskTier(spans)


def _rounds(functions: Mapping[Any, TimedFunction]) -> int:
    """Rounds that take about SECONDS."""
    start = time.perf_counter()
    with torch.inference_mode():
        for function in functions.values():
            function()
    seconds = max(1e-6, time.perf_counter() - start)
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS / seconds)))


def _warm_calls(call: TimedFunction) -> None:
    for _ in range(WARM_CALLS):
        call()
