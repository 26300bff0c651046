"""Timing of one layer of experts against a read of its bytes and against other libraries.

Our kernel, the read and the baselines that run at the same time take turns.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from coterie import ops
from coterie.errors import ConfigError
from coterie.lab.bandwidth import read_rows, readable_rows, weight_buffers
from coterie.lab.bench import worker
from coterie.lab.bench.baselines import BaselineError, BaselineProcess, ResolvedBaseline
from coterie.lab.bench.interleaved import ProgressCallback, Repeat, Sample, run_repeats
from coterie.lab.bench.model import ExpertDtype, make_experts_slab, other_dtype, repeat_experts
from coterie.lab.bench.routings import find_skew, skewed_scores
from coterie.lab.bench.shapes import ModelShape
from coterie.lab.journal import Journal
from coterie.lab.records import Measurement, measurements_ms, median_ratio
from coterie.loading.free_memory import free_memory
from coterie.routing import parse_policy, route
from coterie.values import Routing, Slab

RESERVED_BYTES = 2 << 30  # bytes left free by default
NUM_ROUTINGS = 4  # routings in rotation
FLUSH_BYTES = 128 << 20  # read before each kernel, to flush the processor cache
MIN_REPEATS, MAX_SECONDS = 3, 4.0  # a slow kernel stops after both
MAX_RELATIVE_ERROR = {"fp32": 1e-4, "bf16": 0.03, "int8": 0.06, "int4": 0.3}
"""A baseline with a larger relative error is wrong."""

READ, OURS = "read", "ours"
CasesByPolicy: TypeAlias = Mapping[str, Sequence[tuple[Tensor, Routing]]]
"""By policy, ``NUM_ROUTINGS`` blocks: x [T, H] and its routing."""


@dataclass(frozen=True)
class BenchConfig:
    """Options of a layer benchmark; ``uniform_routing`` replaces skewed routers by uniform ones."""

    shape: ModelShape
    dtype: ExpertDtype
    policies: tuple[str, ...]
    tokens: int = 32
    repeats: int = 40
    threads: int = 1
    uniform_routing: bool = False
    seed: int = 7


@dataclass(frozen=True)
class KernelTimings:
    """One policy: experts and bytes of a layer, and samples in seconds by kernel.

    ``paired_samples`` are our times in the repeats in which a kernel was timed, for paired ratios.
    """

    policy: str
    experts: float
    bytes: float
    samples: dict[str, list[float]] = field(default_factory=dict)
    paired_samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, sample: Sample, kernels: Sequence[str]) -> None:
        """Add the times of one repeat, of these kernels only."""
        for kernel in sample:
            if kernel in kernels:
                self.samples.setdefault(kernel, []).append(sample[kernel])
                self.paired_samples.setdefault(kernel, []).append(sample[OURS])

    def ratio_to_ours(self, kernel: str) -> float:
        """Median ratio of a kernel's time to ours in the same repeats."""
        return median_ratio(self.samples[kernel], self.paired_samples[kernel])

    def median(self, kernel: str) -> float:
        return statistics.median(self.samples[kernel])

    def measures(self) -> list[Measurement]:
        return measurements_ms(self.policy, self.samples)

    def facts(self) -> dict[str, object]:
        others = [kernel for kernel in self.samples if kernel not in (READ, OURS)]
        return {
            "policy": self.policy,
            "experts": self.experts,
            "bytes": self.bytes,
            "read_gb_per_s": self.bytes / self.median(READ) / 1e9,
            "ours_ms": self.median(OURS) * 1e3,
            "share_of_read_limit": self.ratio_to_ours(READ),
            "times_ours": {kernel: self.ratio_to_ours(kernel) for kernel in others},
            "ours_ms_beside": {
                kernel: statistics.median(self.paired_samples[kernel]) * 1e3 for kernel in others
            },
        }


@dataclass  # not frozen: results are added
class LayerBenchResult:
    """Timings by policy; ``errors`` are relative to our output (llama.cpp: to fp32)."""

    timings: list[KernelTimings]
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sessions: list[list[str]] = field(default_factory=list)


def time_layer(
    config: BenchConfig,
    baselines: Sequence[ResolvedBaseline],
    *,
    include_slow: bool = False,
    budget: float,
    journal: Journal | None = None,
    on_progress: ProgressCallback = lambda share, doing: None,
) -> LayerBenchResult:
    """Times all kernels interleaved; baselines share a session if ``budget`` bytes hold them.

    A baseline that fails is skipped with a reason; a required one raises BaselineError.
    """
    torch.set_num_threads(config.threads)
    on_progress(0.0, "making experts")
    slab, cases = make_slab(config), draw_cases(config)
    if baselines:
        _check_full_topk(cases)
    buffers = weight_buffers([slab.gate_up, slab.down])
    size = sum(buffer.nbytes for buffer in buffers) / config.shape.spec.router.experts
    result = LayerBenchResult([])
    for policy, blocks in cases.items():
        experts = statistics.fmean(int(routing.used.sum()) for _, routing in blocks)
        result.timings.append(KernelTimings(policy, experts, experts * size))
    groups = group_by_memory(baselines, config.shape.layer.bytes, budget) or [[]]
    for number, group in enumerate(groups):

        def on_group_progress(fraction: float, label: str, number: int = number) -> None:
            on_progress((number + fraction) / len(groups), label)

        with tempfile.TemporaryDirectory(prefix="coterie-bench-") as folder, ExitStack() as stack:
            _write_workload(Path(folder), config, slab, cases)
            session = TimingSession(config, slab, cases, result, Path(folder), include_slow)
            session.start_baselines(group, stack, on_group_progress)
            done = run_repeats(
                config.policies, session.measure, repeats=config.repeats, warmups=NUM_ROUTINGS,
                journal=journal, name=" ".join(["repeat", *(r.baseline.name for r in group)]),
                on_progress=on_group_progress,
            )  # fmt: skip
        for timing in result.timings:
            for repeat in done:
                timing.add(repeat[timing.policy], (READ, OURS, *session.kernels))
    return result


def make_slab(config: BenchConfig) -> Slab:
    """The experts that every worker generates too, in the kernels' format."""
    up, down = map(torch.from_numpy, worker.make_experts(_make_workload(config)))
    distinct = make_experts_slab(up, down, config.dtype, torch.device("cpu"))
    return repeat_experts(distinct, config.shape.spec.router.experts)


def group_by_memory(
    baselines: Sequence[ResolvedBaseline], layer_bytes: float, budget: float
) -> list[list[ResolvedBaseline]]:
    """Groups of baselines that fit in ``budget`` bytes together; each group has at least one."""
    groups: list[list[ResolvedBaseline]] = []
    available = 0.0
    for resolved in baselines:
        required = resolved.baseline.memory_layers * layer_bytes
        if not groups or required > available:
            groups.append([])
            available = budget
        groups[-1].append(resolved)
        available -= required
    return groups


def draw_cases(config: BenchConfig) -> CasesByPolicy:
    """``NUM_ROUTINGS`` random blocks by policy; every policy routes the same scores."""
    shape = config.shape.layer
    generator = torch.Generator().manual_seed(config.seed)
    skew = 0.0 if config.uniform_routing else find_skew(shape.router, shape.unique_experts)
    scores = [
        skewed_scores(shape.router, config.tokens, skew, generator) for _ in range(NUM_ROUTINGS)
    ]
    dtype = other_dtype(config.dtype)
    xs = [
        torch.randn(config.tokens, shape.hidden, generator=generator).to(dtype)
        for _ in range(NUM_ROUTINGS)
    ]
    cases = {}
    for policy in config.policies:
        parsed = parse_policy(policy)
        routings = [route(block_scores, parsed) for block_scores in scores]
        cases[policy] = list(zip(xs, routings, strict=True))
    return cases


def _check_full_topk(cases: CasesByPolicy) -> None:
    """Raises for a policy that gives a token fewer than k experts, which baselines cannot run."""
    for policy, blocks in cases.items():
        if any(bool((routing.topk_ids < 0).any()) for _, routing in blocks):
            raise ConfigError(
                f"{policy} gives tokens fewer than k experts, which no baseline supports; "
                "set `baselines` to none"
            )


def _write_workload(folder: Path, config: BenchConfig, slab: Slab, cases: CasesByPolicy) -> None:
    """Writes the files that a worker reads."""
    all_cases = [case for policy in config.policies for case in cases[policy]]
    workload = json.dumps(asdict(_make_workload(config)))
    (folder / "work.json").write_text(workload, encoding="utf-8")
    np.savez(
        folder / "cases.npz",
        x=np.stack([x.float().numpy() for x, _ in all_cases]),
        ids=np.stack([routing.topk_ids.numpy() for _, routing in all_cases]),
        weights=np.stack([routing.topk_weights.numpy() for _, routing in all_cases]),
        expected=np.stack([ops.run_experts(*case, slab).numpy() for case in all_cases]),
    )


def _make_workload(config: BenchConfig) -> worker.LayerWorkload:
    shape = config.shape.layer
    return worker.LayerWorkload(
        experts=shape.router.experts,
        k=shape.router.k,
        hidden=shape.hidden,
        width=shape.width,
        dtype=config.dtype,
        seed=config.seed,
        threads=config.threads,
    )


@dataclass  # not frozen: failed baselines are dropped
class TimingSession:
    """Baselines that run at the same time, and the timing of all kernels."""

    config: BenchConfig
    slab: Slab
    cases: CasesByPolicy
    result: LayerBenchResult
    folder: Path
    include_slow: bool
    kernels: dict[str, tuple[BaselineProcess, str]] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.weight_rows = readable_rows(weight_buffers([self.slab.gate_up, self.slab.down]))
        self.flush_rows = readable_rows([torch.ones(1, FLUSH_BYTES, dtype=torch.uint8)])

    def start_baselines(
        self, group: Sequence[ResolvedBaseline], stack: ExitStack, on_progress: ProgressCallback
    ) -> None:
        """Starts the baselines one after another and checks their outputs."""
        for resolved in group:
            on_progress(0.0, f"starting {resolved.baseline.name}")
            try:
                process = BaselineProcess(resolved, self.folder, threads=self.config.threads)
                stack.enter_context(process)
                process.wait_until_ready()
                self._register(process)
            except BaselineError as error:
                self._drop_baseline(resolved, error)
        self.result.sessions.append(sorted({p.baseline.name for p, _ in self.kernels.values()}))

    def measure(self, policy: str, number: int, done: Sequence[Repeat]) -> Sample:
        """Seconds of every kernel on one routing, in random order."""
        x, routing = self.cases[policy][number % NUM_ROUTINGS]
        case = self.config.policies.index(policy) * NUM_ROUTINGS + number % NUM_ROUTINGS
        order = [READ, OURS]
        order += [kernel for kernel in self.kernels if not has_enough(kernel, policy, done)]
        self.rng.shuffle(order)
        times: Sample = {}
        for kernel in order:
            read_rows(self.flush_rows, torch.tensor([True]))
            if kernel in (READ, OURS):
                times[kernel] = self._time_local(kernel, x, routing)
            elif kernel in self.kernels:  # its baseline may have failed in this repeat
                process, name = self.kernels[kernel]
                try:
                    times[kernel] = process.time_kernel(name, case)
                except BaselineError as error:
                    self._drop_baseline(process.resolved, error)
        return times

    def _time_local(self, kernel: str, x: Tensor, routing: Routing) -> float:
        start = time.perf_counter()
        if kernel == READ:
            read_rows(self.weight_rows, routing.used)
        else:
            ops.run_experts(x, routing, self.slab)
        return time.perf_counter() - start

    def _register(self, process: BaselineProcess) -> None:
        baseline = process.baseline
        self.result.versions[baseline.name] = process.versions
        for name in process.kernels:
            if self.include_slow or name not in baseline.slow_kernels:
                label = f"{baseline.name} {name}"
                self.result.errors[label] = self._checked_error(process, name)
                self.kernels[label] = (process, name)

    def _checked_error(self, process: BaselineProcess, name: str) -> float:
        """The largest error over one case of each policy."""
        cases = range(0, len(self.config.policies) * NUM_ROUTINGS, NUM_ROUTINGS)
        worst = max(process.relative_error(name, case) for case in cases)
        if not worst <= MAX_RELATIVE_ERROR[self.config.dtype]:  # also true for NaN
            raise BaselineError(
                f"{process.baseline.name} {name} is wrong: relative error {worst:.1%}"
            )
        return worst

    def _drop_baseline(self, resolved: ResolvedBaseline, error: BaselineError) -> None:
        if resolved.required:
            raise error
        name = resolved.baseline.name
        self.result.skipped[name] = str(error)
        self.result.versions.pop(name, None)
        for names in self.result.sessions:
            names[:] = [other for other in names if other != name]
        for label in [
            k for k, (process, _) in self.kernels.items() if process.resolved is resolved
        ]:
            del self.kernels[label], self.result.errors[label]


def has_enough(kernel: str, policy: str, done: Sequence[Repeat]) -> bool:
    """Whether a slow kernel has taken its share of the time."""
    seconds = [repeat[policy][kernel] for repeat in done if kernel in repeat[policy]]
    return len(seconds) >= MIN_REPEATS and sum(seconds) > MAX_SECONDS


def free_budget(shape: ModelShape) -> float:
    """Bytes of this machine that are free next to a layer of this shape."""
    free = free_memory(torch.device("cpu"))
    reserved = RESERVED_BYTES + shape.layer.bytes
    return 4.0 * 2**30 if free is None else float(free - reserved)
