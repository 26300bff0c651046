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

from coterie.errors import CoterieError
from coterie.lab.bench.cost_model import (
    ComputeProbe,
    ForwardCost,
    ForwardPart,
    RandomBlocks,
    compute_probe,
    forward_cost,
    roofline_seconds,
)
from coterie.lab.bench.timing import time_once
from coterie.lab.records import Measurement
from coterie.loading.load import Model
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.transformer import Transformer
from coterie.routing import check_layers, parse_policy
from coterie.telemetry import NullRecorder, TensorRecorder
from coterie.values import Window

NUM_BLOCKS = 4  # blocks that take turns
FORWARDS_PER_BLOCK = 8  # forwards that fill a block
READ = "read"
ProgressCallback = Callable[[float, str], None]
LogitCount = int | Literal["block"]


@dataclass(frozen=True)
class ForwardTiming:
    """One policy: what a forward uses (means over blocks), and samples in seconds.

    ``limit`` are seconds of the plain read in the same turns, ``floor`` of reading or arithmetic,
    part by part whichever takes longer.
    """

    policy: str
    experts: float
    bytes: float
    part_bytes: Mapping[ForwardPart, float]
    part_flops: Mapping[ForwardPart, float]
    seconds: list[float] = field(default_factory=list)
    read_seconds: list[float] = field(default_factory=list)
    roofline_seconds: list[float] = field(default_factory=list)

    @property
    def times_read(self) -> float:
        """How many times as long as the read a forward takes: the median over turns."""
        return statistics.median(
            a / b for a, b in zip(self.seconds, self.read_seconds, strict=True)
        )

    @property
    def times_roofline(self) -> float:
        """How many times as long as the floor a forward takes: the median over turns."""
        return statistics.median(
            a / b for a, b in zip(self.seconds, self.roofline_seconds, strict=True)
        )

    def measures(self) -> list[Measurement]:
        samples_by_name = (
            (READ, self.read_seconds),
            ("floor", self.roofline_seconds),
            ("forward", self.seconds),
        )
        return [
            Measurement(f"{self.policy} {name}", "ms", tuple(seconds * 1e3 for seconds in samples))
            for name, samples in samples_by_name
        ]

    def facts(self) -> dict[str, object]:
        read_median = statistics.median(self.read_seconds)
        return {
            "policy": self.policy,
            "experts_per_layer": self.experts,
            "bytes": self.bytes,
            "bytes_of_parts": dict(self.part_bytes),
            "flops_of_parts": dict(self.part_flops),
            "read_gb_per_s": self.bytes / read_median / 1e9,
            "read_ms": read_median * 1e3,
            "floor_ms": statistics.median(self.roofline_seconds) * 1e3,
            "forward_ms": statistics.median(self.seconds) * 1e3,
            "times_read_limit": self.times_read,
            "times_floor": self.times_roofline,
        }


@dataclass(frozen=True)
class ForwardBenchResult:
    """All policies, and what the arithmetic ran at meanwhile: operations a second, by kind."""

    timings: list[ForwardTiming]
    logit_counts: tuple[int, ...]  # that the forwards of a turn made
    rates: dict[str, list[float]]

    def measures(self) -> list[Measurement]:
        arithmetic = [
            Measurement(f"arithmetic of {kind}", "GFLOP/s", tuple(rate / 1e9 for rate in samples))
            for kind, samples in self.rates.items()
        ]
        return [measure for timing in self.timings for measure in timing.measures()] + arithmetic


@dataclass(frozen=True)
class _BlockRun:
    """A block under a policy: the experts it uses by layer, bool [E], its bytes and pairs."""

    tokens: Tensor
    context: ForwardContext
    used: dict[int, Tensor]
    part_bytes: dict[ForwardPart, float]
    pairs: int  # of a token and an expert


@torch.inference_mode()
def time_forward(
    model: Model,
    policies: Sequence[str],
    *,
    tokens: int = 32,
    context: int = 512,
    num_logits: LogitCount = "block",
    repeats: int = 10,
    threads: int = 1,
    seed: int = 7,
    on_progress: ProgressCallback = lambda share, doing: None,
) -> ForwardBenchResult:
    """Policies take turns, each with reads of just the bytes that its forwards need.

    A sample is the mean over the forwards of a turn: one that makes ``wanted`` logits, or those
    that fill a block.
    """
    torch.set_num_threads(threads)
    transformer = model.transformer
    blocks = random_blocks(model, tokens, context, seed)
    cost = forward_cost(transformer, blocks)
    timer = _ForwardTimer(transformer, cost, compute_probe(transformer, tokens))
    logit_counts = logits_per_forward(num_logits, tokens)
    runs_by_policy: list[tuple[ForwardTiming, list[_BlockRun]]] = []
    for policy in policies:
        on_progress(0.0, f"a first forward of {policy}")
        block_runs = [
            _run_block(transformer, cost, blocks, number, policy) for number in range(NUM_BLOCKS)
        ]
        runs_by_policy.append(
            (_empty_timing(policy, cost, block_runs, statistics.fmean(logit_counts)), block_runs)
        )
    result = ForwardBenchResult(
        [timing for timing, _ in runs_by_policy],
        logit_counts,
        {kind: [] for kind in timer.probe.kernels},
    )
    rng = random.Random(0)
    for repeat in range(repeats):
        rng.shuffle(runs_by_policy)
        for timing, block_runs in runs_by_policy:
            timer.add_sample(result, timing, block_runs[repeat % NUM_BLOCKS :] + block_runs)
            on_progress(repeat / repeats, "taking turns")
    on_progress(1.0, "taking turns")
    return result


def logits_per_forward(num_logits: LogitCount, tokens: int) -> tuple[int, ...]:
    """How many positions each forward answers: of a block, those that are masked still."""
    if num_logits != "block":
        if not 1 <= num_logits <= tokens:
            raise CoterieError(f"{num_logits} logits of a block of {tokens}; it has 1 to {tokens}")
        return (num_logits,)
    steps = min(FORWARDS_PER_BLOCK, tokens)
    return tuple(tokens - number * tokens // steps for number in range(steps))


@dataclass(frozen=True)
class _ForwardTimer:
    """What all samples are taken with."""

    transformer: Transformer
    cost: ForwardCost
    probe: ComputeProbe

    def add_sample(
        self, result: ForwardBenchResult, timing: ForwardTiming, block_runs: Sequence[_BlockRun]
    ) -> None:
        """One sample: a read and a forward for every count of logits, block after block."""
        rates, device = self.probe.measure_rates(), self.transformer.device
        for kind, rate in rates.items():
            result.rates[kind].append(rate)
        read_times, roofline_times, forward_times = [], [], []
        for number, count in enumerate(result.logit_counts):
            run = block_runs[number % NUM_BLOCKS]
            context = replace(run.context, logits_indices=torch.arange(count, device=device))
            read_seconds = time_once(partial(self.cost.read, run.used), device)
            forward_times.append(time_once(partial(self.transformer, run.tokens, context), device))
            read_times.append(read_seconds)
            part_flops = self.cost.flops_by_part(run.pairs, count)
            bandwidth = sum(run.part_bytes.values()) / read_seconds
            roofline = roofline_seconds(
                run.part_bytes, part_flops, bandwidth=bandwidth, rates=rates
            )
            roofline_times.append(
                max(read_seconds, roofline)
            )  # equal but for rounding where nothing multiplies long
        timing.read_seconds.append(statistics.fmean(read_times))
        timing.roofline_seconds.append(statistics.fmean(roofline_times))
        timing.seconds.append(statistics.fmean(forward_times))


def random_blocks(model: Model, tokens: int, context: int, seed: int) -> RandomBlocks:
    """Blocks without masks, whose tokens the router can tell apart."""
    spec, transformer = model.spec, model.transformer
    causal_block = model.family.defaults.block if model.family.defaults.block_causal else 0
    start = context if not causal_block else -(-context // causal_block) * causal_block
    if start + tokens > spec.max_length:
        raise CoterieError(
            f"a context of {context} and {tokens} tokens need {start + tokens} positions; "
            f"the model has {spec.max_length}"
        )
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache.allocate(
        spec, 1, start + tokens, dtype=transformer.dtype, device=transformer.device
    )
    for kv in (*cache.keys, *cache.values):
        kv[:, :, :start] = torch.randn(kv[:, :, :start].shape, generator=generator).to(kv)
    ids = torch.randint(0, model.mask_id, (NUM_BLOCKS, 1, tokens), generator=generator)
    window = Window(
        torch.tensor([start]),
        tokens,
        torch.tensor([start + tokens]),
        causal_block if tokens > causal_block else 0,
    )
    return RandomBlocks([block_ids.to(transformer.device) for block_ids in ids], window, cache)


def _run_block(
    transformer: Transformer, cost: ForwardCost, blocks: RandomBlocks, number: int, policy: str
) -> _BlockRun:
    """Runs the block once, which also wakes what the first forward needs."""
    parsed = parse_policy(policy)
    check_layers(parsed, len(transformer.spec.moe_layers))
    context = ForwardContext(blocks.window, blocks.cache, parsed, NullRecorder(), forward=(0,))
    recorder = TensorRecorder()
    transformer(blocks.tokens[number], replace(context, recorder=recorder))
    used = {layer: routing.used.cpu() for layer, _, routing in recorder.routings}
    pairs = sum(int((routing.topk_ids >= 0).sum()) for _, _, routing in recorder.routings)
    part_bytes: dict[ForwardPart, float] = {
        "experts": cost.used_expert_bytes(used),
        **cost.part_bytes,
    }
    return _BlockRun(blocks.tokens[number], context, used, part_bytes, pairs)


def _empty_timing(
    policy: str, cost: ForwardCost, block_runs: Sequence[_BlockRun], logits: float
) -> ForwardTiming:
    unique_experts = statistics.fmean(
        float(mask.sum()) for run in block_runs for mask in run.used.values()
    )
    part_bytes: dict[ForwardPart, float] = {
        **block_runs[0].part_bytes,
        "experts": statistics.fmean(run.part_bytes["experts"] for run in block_runs),
    }
    pairs = statistics.fmean(run.pairs for run in block_runs)
    part_flops = cost.flops_by_part(pairs, logits)
    return ForwardTiming(policy, unique_experts, sum(part_bytes.values()), part_bytes, part_flops)
