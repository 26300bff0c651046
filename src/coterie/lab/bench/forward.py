"""Timing of whole forwards of a random model against a read of their bytes."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    first_slab,
    forward_cost,
    roofline_seconds,
)
from coterie.lab.bench.interleaved import ProgressCallback, Repeat, Sample, run_repeats
from coterie.lab.journal import Journal
from coterie.lab.records import Measurement, measurements_ms, median_ratio
from coterie.lab.timing import time_once
from coterie.loading.load import Model
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.transformer import Transformer
from coterie.routing import check_layers, parse_policy
from coterie.telemetry import TensorRecorder
from coterie.values import Window

NUM_BLOCKS = 4  # blocks in rotation
FORWARDS_PER_BLOCK = 8
SERIES = READ, ROOFLINE, FORWARD = "read", "floor", "forward"  # as records name them
DEFAULT_CONTEXT = 512  # positions before the block, or as many as the model has
LogitCount = int | Literal["block"]


@dataclass(frozen=True)
class ForwardTiming:
    """One policy: the cost of a forward (means over blocks), and samples in seconds by series."""

    policy: str
    experts: float
    part_bytes: Mapping[ForwardPart, float]
    part_flops: Mapping[ForwardPart, float]
    samples: Mapping[str, list[float]]

    @property
    def bytes(self) -> float:
        return sum(self.part_bytes.values())

    def times(self, series: str) -> float:
        """Median ratio of the time of a forward to another series."""
        return median_ratio(self.samples[FORWARD], self.samples[series])

    def measures(self) -> list[Measurement]:
        return measurements_ms(self.policy, self.samples)

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
            "times_read_limit": self.times(READ),
            "times_floor": self.times(ROOFLINE),
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
    context: int | None = None,
    num_logits: LogitCount = "block",
    repeats: int = 10,
    threads: int = 1,
    seed: int = 7,
    journal: Journal | None = None,
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
    probe = compute_probe(
        transformer.spec,
        first_slab(transformer),
        tokens,
        matrix_dtype=transformer.dtype,
        device=transformer.device,
    )
    logit_counts = logits_per_forward(num_logits, tokens)
    runs: dict[str, list[_BlockRun]] = {}
    for policy in policies:
        on_progress(0.0, f"a first forward of {policy}")
        runs[policy] = [_run_block(transformer, cost, blocks, n, policy) for n in range(NUM_BLOCKS)]

    def measure(policy: str, number: int, _: Sequence[Repeat]) -> Sample:
        rates = probe.measure_rates()
        shifted = runs[policy][number % NUM_BLOCKS :] + runs[policy]
        samples = [
            _time_block(transformer, cost, run, count, rates)
            for run, count in zip(shifted * len(logit_counts), logit_counts, strict=False)
        ]
        means = {name: statistics.fmean(each[name] for each in samples) for name in SERIES}
        return {**means, "rates": rates}

    done = run_repeats(policies, measure, repeats=repeats, journal=journal, on_progress=on_progress)
    mean_logits = statistics.fmean(logit_counts)
    rates = [repeat[policy]["rates"] for repeat in done for policy in policies]
    return ForwardBenchResult(
        [_policy_timing(policy, cost, runs[policy], mean_logits, done) for policy in policies],
        logit_counts,
        {kind: [each[kind] for each in rates] for kind in probe.kernels},
    )


def logits_per_forward(num_logits: LogitCount, tokens: int) -> tuple[int, ...]:
    """The number of logits of each forward; for a block, the masked positions of each step."""
    if num_logits != "block":
        if not 1 <= num_logits <= tokens:
            raise ConfigError(f"`num_logits` is {num_logits}; must be 1 to {tokens} or block")
        return (num_logits,)
    steps = min(FORWARDS_PER_BLOCK, tokens)
    return tuple(tokens - number * tokens // steps for number in range(steps))


def _time_block(
    transformer: Transformer,
    cost: ForwardCost,
    run: _BlockRun,
    num_logits: int,
    rates: Mapping[KernelKind, float],
) -> dict[str, float]:
    """Seconds of a read, of the roofline and of a forward."""
    device = transformer.device
    context = replace(run.context, logits_indices=torch.arange(num_logits, device=device))
    read = time_once(partial(cost.read, run.used), device)
    forward = time_once(partial(transformer, run.tokens, context), device)
    flops = cost.flops_by_part(run.pairs, num_logits)
    bandwidth = sum(run.part_bytes.values()) / read
    roofline = roofline_seconds(run.part_bytes, flops, bandwidth=bandwidth, rates=rates)
    # Rounding may make the roofline less than the read.
    return dict(zip(SERIES, (read, max(read, roofline), forward), strict=True))


def context_length(model: Model, tokens: int, context: int | None) -> int:
    """Positions before the block, in whole blocks where the model is block-causal."""
    block = model.family.defaults.block if model.family.defaults.block_causal else 1
    if context is None:
        return min(DEFAULT_CONTEXT, max(0, model.spec.max_length - tokens)) // block * block
    return -(-context // block) * block


def random_blocks(model: Model, tokens: int, context: int | None, seed: int) -> RandomBlocks:
    """Blocks of random tokens without masks, which the router distinguishes."""
    spec, transformer = model.spec, model.transformer
    causal_block = model.family.defaults.block if model.family.defaults.block_causal else 0
    start = context_length(model, tokens, context)
    if start + tokens > spec.max_length:
        raise ConfigError(
            f"a context of {start} and {tokens} tokens need {start + tokens} positions; "
            f"the model has {spec.max_length}"
        )
    generator = torch.Generator().manual_seed(seed)
    dtype, device = transformer.dtype, transformer.device
    cache = KVCache.allocate(spec, 1, start + tokens, dtype=dtype, device=device)
    for kv in (*cache.keys, *cache.values):
        kv[:, :, :start] = torch.randn(kv[:, :, :start].shape, generator=generator).to(kv)
    ids = torch.randint(0, model.plain_ids, (NUM_BLOCKS, 1, tokens), generator=generator)
    window_block = causal_block if tokens > causal_block else 0
    window = Window(torch.tensor([start]), tokens, torch.tensor([start + tokens]), window_block)
    return RandomBlocks([block_ids.to(device) for block_ids in ids], window, cache)


def _run_block(
    transformer: Transformer, cost: ForwardCost, blocks: RandomBlocks, number: int, policy: str
) -> _BlockRun:
    """Runs a block once, which is also the warm-up."""
    parsed = parse_policy(policy)
    check_layers(parsed, len(transformer.spec.moe_layers))
    context = ForwardContext(blocks.window, blocks.cache, parsed, forward=(0,))
    recorder = TensorRecorder()
    transformer(blocks.tokens[number], replace(context, recorder=recorder))
    used = {layer: routing.used.cpu() for layer, _, routing in recorder.routings}
    pairs = sum(int((routing.topk_ids >= 0).sum()) for _, _, routing in recorder.routings)
    part_bytes: dict[ForwardPart, float] = {"experts": cost.used_expert_bytes(used)}
    part_bytes |= cost.part_bytes
    return _BlockRun(blocks.tokens[number], context, used, part_bytes, pairs)


def _policy_timing(
    policy: str, cost: ForwardCost, runs: Sequence[_BlockRun], logits: float, done: Sequence[Repeat]
) -> ForwardTiming:
    mean = statistics.fmean
    unique_experts = mean(float(mask.sum()) for run in runs for mask in run.used.values())
    expert_bytes = mean(run.part_bytes["experts"] for run in runs)
    part_flops = cost.flops_by_part(mean(run.pairs for run in runs), logits)
    samples = {name: [repeat[policy][name] for repeat in done] for name in SERIES}
    part_bytes: dict[ForwardPart, float] = {**runs[0].part_bytes, "experts": expert_bytes}
    return ForwardTiming(policy, unique_experts, part_bytes, part_flops, samples)


def parse_num_logits(text: str, tokens: int) -> LogitCount:
    """The number in a text, or "block"; raises ConfigError for one that does not fit."""
    if text != "block" and not text.isdecimal():
        raise ConfigError(f"`logits={text}`: neither a number nor block")
    num_logits = "block" if text == "block" else int(text)
    logits_per_forward(num_logits, tokens)  # checks it
    return num_logits


def peak_memory() -> int:
    """The peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
