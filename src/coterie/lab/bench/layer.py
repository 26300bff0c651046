"""Timing of one layer of experts against a read of its bytes and against other libraries."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coterie import ops
from coterie.errors import ConfigError
from coterie.lab.bandwidth import weight_buffers
from coterie.lab.bench import worker
from coterie.lab.bench.baselines import ResolvedBaseline
from coterie.lab.bench.interleaved import ProgressCallback, run_repeats
from coterie.lab.bench.model import make_experts_slab, repeat_experts
from coterie.lab.bench.routings import find_skew, skewed_scores
from coterie.lab.bench.session import (
    NUM_ROUTINGS,
    OURS,
    READ,
    BenchConfig,
    CasesByPolicy,
    KernelTimings,
    LayerBenchResult,
    TimingSession,
)
from coterie.lab.journal import Journal
from coterie.routing import parse_policy, route
from coterie.values import Routing, Slab


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
    result = LayerBenchResult(
        [_empty_timing(config, slab, policy, cases[policy]) for policy in config.policies]
    )
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
    dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
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


def _empty_timing(
    config: BenchConfig, slab: Slab, policy: str, cases: Sequence[tuple[Tensor, Routing]]
) -> KernelTimings:
    experts = statistics.fmean(int(routing.used.sum()) for _, routing in cases)
    layer_bytes = sum(part.nbytes for part in weight_buffers([slab.gate_up, slab.down]))
    return KernelTimings(policy, experts, experts * layer_bytes / config.shape.spec.router.experts)


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
