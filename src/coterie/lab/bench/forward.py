"""Timing of whole forwards of a random model against a read of their bytes."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from coterie.errors import ConfigError
from coterie.lab.bench.cost_model import (
    ForwardCost,
    ForwardPart,
    KernelKind,
    RandomBlocks,
    compute_probe,
    forward_cost,
    roofline_seconds,
)
from coterie.lab.bench.timing import time_once
from coterie.lab.records import Measurement, measurements_ms, median_ratio
from coterie.loading.load import Model
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.transformer import Transformer
from coterie.routing import check_layers, parse_policy
from coterie.telemetry import NullRecorder, TensorRecorder
from coterie.values import Window

NUM_BLOCKS = 4  # blocks in rotation
FORWARDS_PER_BLOCK = 8
ProgressCallback = Callable[[float, str], None]
LogitCount = int | Literal["block"]


@dataclass(frozen=True)
class ForwardTiming:
    """One policy: the cost of a forward (means over blocks), and samples in seconds.

    ``read_seconds`` are those of a plain read in the same repeats. ``roofline_seconds`` sum the
    longer of reading and arithmetic over parts.
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
        """Median ratio of forward time to read time."""
        return median_ratio(self.seconds, self.read_seconds)

    @property
    def times_roofline(self) -> float:
        """Median ratio of forward time to roofline time."""
        return median_ratio(self.seconds, self.roofline_seconds)

    def measures(self) -> list[Measurement]:
        samples = {
            "read": self.read_seconds,
            "floor": self.roofline_seconds,
            "forward": self.seconds,
        }
        return measurements_ms(self.policy, samples)

    def facts(self) -> dict[str, object]:
        read, roofline, forward = (measure.median for measure in self.measures())
        return {
            "policy": self.policy,
            "experts_per_layer": self.experts,
            "bytes": self.bytes,
            "bytes_of_parts": dict(self.part_bytes),
            "flops_of_parts": dict(self.part_flops),
            "read_gb_per_s": self.bytes / read / 1e6,
            "read_ms": read,
            "floor_ms": roofline,
            "forward_ms": forward,
            "times_read_limit": self.times_read,
            "times_floor": self.times_roofline,
        }


@dataclass(frozen=True)
class ForwardBenchResult:
    """The timings of all policies, and the arithmetic rates in FLOP/s by kind."""

    timings: list[ForwardTiming]
    logit_counts: tuple[int, ...]  # of the forwards of one repeat
    rates: dict[str, list[float]]

    def measures(self) -> list[Measurement]:
        arithmetic = [
            Measurement(f"arithmetic of {kind}", "GFLOP/s", tuple(rate / 1e9 for rate in samples))
            for kind, samples in self.rates.items()
        ]
        return [measure for timing in self.timings for measure in timing.measures()] + arithmetic


@dataclass(frozen=True)
class _BlockRun:
    """A block under a policy: used experts by layer (bool [E]), bytes and token-expert pairs."""

    tokens: Tensor
    context: ForwardContext
    used: dict[int, Tensor]
    part_bytes: dict[ForwardPart, float]
    pairs: int


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
    """Times all policies in alternation, each with reads of the bytes of its forwards.

    A sample is the mean over the forwards of one repeat: one with ``num_logits`` logits, or those
    that fill a block.
    """
    torch.set_num_threads(threads)
    transformer = model.transformer
    blocks = random_blocks(model, tokens, context, seed)
    cost = forward_cost(transformer, blocks)
    probe = compute_probe(transformer, tokens)
    logit_counts = logits_per_forward(num_logits, tokens)
    runs_by_policy: list[tuple[ForwardTiming, list[_BlockRun]]] = []
    for policy in policies:
        on_progress(0.0, f"a first forward of {policy}")
        runs = [_run_block(transformer, cost, blocks, n, policy) for n in range(NUM_BLOCKS)]
        timing = _empty_timing(policy, cost, runs, statistics.fmean(logit_counts))
        runs_by_policy.append((timing, runs))
    rates: dict[str, list[float]] = {kind: [] for kind in probe.kernels}
    result = ForwardBenchResult([timing for timing, _ in runs_by_policy], logit_counts, rates)
    rng = random.Random(0)
    for repeat in range(repeats):
        rng.shuffle(runs_by_policy)
        for timing, block_runs in runs_by_policy:
            measured_rates = probe.measure_rates()
            for kind, rate in measured_rates.items():
                rates[kind].append(rate)
            shifted_runs = block_runs[repeat % NUM_BLOCKS :] + block_runs
            _add_sample(
                timing, shifted_runs, transformer, cost, logit_counts=logit_counts,
                rates=measured_rates,
            )  # fmt: skip
            on_progress(repeat / repeats, "timing forwards")
    on_progress(1.0, "timing forwards")
    return result


def logits_per_forward(num_logits: LogitCount, tokens: int) -> tuple[int, ...]:
    """The number of logits of each forward; for a block, the masked positions of each step."""
    if num_logits != "block":
        if not 1 <= num_logits <= tokens:
            raise ConfigError(f"`num_logits` is {num_logits}; must be 1 to {tokens} or block")
        return (num_logits,)
    steps = min(FORWARDS_PER_BLOCK, tokens)
    return tuple(tokens - number * tokens // steps for number in range(steps))


def _add_sample(
    timing: ForwardTiming,
    block_runs: Sequence[_BlockRun],
    transformer: Transformer,
    cost: ForwardCost,
    *,
    logit_counts: Sequence[int],
    rates: Mapping[KernelKind, float],
) -> None:
    """Adds one sample: a read and a forward per logit count, with alternating blocks."""
    samples: list[tuple[float, float, float]] = []
    for number, count in enumerate(logit_counts):
        run, device = block_runs[number % NUM_BLOCKS], transformer.device
        context = replace(run.context, logits_indices=torch.arange(count, device=device))
        read = time_once(partial(cost.read, run.used), device)
        forward = time_once(partial(transformer, run.tokens, context), device)
        flops, bandwidth = cost.flops_by_part(run.pairs, count), sum(run.part_bytes.values()) / read
        roofline = roofline_seconds(run.part_bytes, flops, bandwidth=bandwidth, rates=rates)
        samples.append((read, max(read, roofline), forward))  # rounding may make the roofline less
    series = (timing.read_seconds, timing.roofline_seconds, timing.seconds)
    for values, seconds in zip(series, zip(*samples, strict=True), strict=True):
        values.append(statistics.fmean(seconds))


def random_blocks(model: Model, tokens: int, context: int, seed: int) -> RandomBlocks:
    """Blocks of random tokens without masks, which the router distinguishes."""
    spec, transformer = model.spec, model.transformer
    causal_block = model.family.defaults.block if model.family.defaults.block_causal else 0
    start = context if not causal_block else -(-context // causal_block) * causal_block
    if start + tokens > spec.max_length:
        raise ConfigError(
            f"a context of {context} and {tokens} tokens need {start + tokens} positions; "
            f"the model has {spec.max_length}"
        )
    generator = torch.Generator().manual_seed(seed)
    dtype, device = transformer.dtype, transformer.device
    cache = KVCache.allocate(spec, 1, start + tokens, dtype=dtype, device=device)
    for kv in (*cache.keys, *cache.values):
        kv[:, :, :start] = torch.randn(kv[:, :, :start].shape, generator=generator).to(kv)
    ids = torch.randint(0, model.mask_id, (NUM_BLOCKS, 1, tokens), generator=generator)
    window_block = causal_block if tokens > causal_block else 0
    window = Window(torch.tensor([start]), tokens, torch.tensor([start + tokens]), window_block)
    return RandomBlocks([block_ids.to(device) for block_ids in ids], window, cache)


def _run_block(
    transformer: Transformer, cost: ForwardCost, blocks: RandomBlocks, number: int, policy: str
) -> _BlockRun:
    """Runs a block once, which is also the warm-up."""
    parsed = parse_policy(policy)
    check_layers(parsed, len(transformer.spec.moe_layers))
    context = ForwardContext(blocks.window, blocks.cache, parsed, NullRecorder(), forward=(0,))
    recorder = TensorRecorder()
    transformer(blocks.tokens[number], replace(context, recorder=recorder))
    used = {layer: routing.used.cpu() for layer, _, routing in recorder.routings}
    pairs = sum(int((routing.topk_ids >= 0).sum()) for _, _, routing in recorder.routings)
    part_bytes: dict[ForwardPart, float] = {"experts": cost.used_expert_bytes(used)}
    part_bytes |= cost.part_bytes
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
