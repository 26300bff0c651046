"""Runs the first configuration of a plan with random weights, beside what the plan predicts."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from coterie.errors import ConfigError
from coterie.keys import Key, to_json
from coterie.lab.bench.forward import FORWARD, time_forward
from coterie.lab.bench.model import random_model
from coterie.lab.bench.shapes import ModelShape
from coterie.lab.machine import CPU
from coterie.lab.planner.expert_counts import BlockCounts
from coterie.lab.planner.measurement import cached_store, cost_of, random_tier
from coterie.lab.planner.plan import Configuration
from coterie.lab.planner.request import PlanResult, disk_folder
from coterie.lab.planner.served_trace import serve_trace
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.lab.replay.trace import Trace
from coterie.loading.free_memory import free_memory
from coterie.model.weights import weight_bytes
from coterie.offload.tiers import DiskTier
from coterie.routing import parse_policy

MEMORY_SHARE = 0.5  # of what is free, for the random model
MAX_BYTES = 3 << 30
REPEATS = 5
SERVED_BLOCKS = 3


@dataclass(frozen=True)
class Verification:
    """Predicted and measured milliseconds of the same work, described in ``work``."""

    work: Annotated[str, Key("work")]
    predicted_ms: Annotated[float, Key("predicted_ms")]
    measured_ms: Annotated[float, Key("measured_ms")]

    @property
    def error(self) -> float:
        """Relative to the measurement."""
        return self.predicted_ms / self.measured_ms - 1

    def to_dict(self) -> dict[str, object]:
        return {**to_json(self), "error": self.error}

    def describe(self) -> str:
        return (
            f"Verified: {self.work}: predicted {self.predicted_ms:.1f} ms, "
            f"measured {self.measured_ms:.1f} ms ({self.error:+.0%})"
        )


def verify(result: PlanResult) -> Verification:
    """Measures the first configuration of the CPU: a forward, or a layer of experts from a disk."""
    first = next((one for one in result.configurations if one.device == "cpu"), None)
    if first is None:
        raise ConfigError("`verify` runs on the CPU, where nothing fits")
    policy = ReplayPolicy(
        parse_policy(first.policy), routes_commits=result.options.commit_routing == "policy"
    )
    counts = result.sample.counter()(policy, first.slots)
    if "disk" in first.tiers:
        return _verify_fetches(result, first, policy, counts)
    return _verify_forward(result, first, counts)


def _verify_forward(result: PlanResult, first: Configuration, counts: BlockCounts) -> Verification:
    shape = fitting_shape(result.model.shape, first)
    tokens = result.model.window_tokens(result.options.steps)
    context = min(result.model.middle_block.start, shape.spec.max_length - tokens)
    model = random_model(shape, first.format_name)
    logits = (tokens + 1) // 2
    (timing,) = time_forward(
        model, [first.policy], tokens=tokens, context=context, num_logits=logits, repeats=REPEATS,
        threads=torch.get_num_threads(),
    ).timings  # fmt: skip
    predicted = cost_of(shape, first.format_name).seconds(
        result.rates, counts.decode, tokens=tokens, num_logits=logits, positions=context + tokens
    )
    layers = f"{shape.spec.layers} of {result.model.spec.layers} layers"
    work = f"a forward of {layers} in {first.format_name}, {first.policy}"
    return Verification(work, 1e3 * predicted, 1e3 * statistics.median(timing.samples[FORWARD]))


def fitting_shape(shape: ModelShape, first: Configuration) -> ModelShape:
    """The shape with as many of its first layers as fit in half of the free memory."""
    free = free_memory(CPU)
    budget = MAX_BYTES if free is None else min(MAX_BYTES, int(MEMORY_SHARE * free))
    least = shape.spec.moe.index(True) + 1
    for layers in range(shape.spec.layers, least - 1, -1):
        truncated = shape.truncate(layers)
        cost = cost_of(truncated, first.format_name)
        if weight_bytes(cost.spec, cost.dtype) <= budget:
            return truncated
    raise ConfigError(f"`verify`: {least} layers of {shape.title} do not fit in the free memory")


def _verify_fetches(
    result: PlanResult, first: Configuration, policy: ReplayPolicy, counts: BlockCounts
) -> Verification:
    """Blocks of the plan's own sample, served from a temporary file on the model's disk."""
    model, cost = result.model, cost_of(result.model.shape, first.format_name)
    trace = first_blocks(result.sample.trace)
    with tempfile.TemporaryDirectory(dir=disk_folder(model), prefix=".coterie-plan-") as folder:
        sizes = {"layers": 1, "experts": cost.spec.router.experts}
        tier = random_tier(model.shape, first.format_name, Path(folder), **sizes)
        spans = dict.fromkeys(trace.header.layers, tier.spans[1])
        store = cached_store(DiskTier(spans), cost.spec, first.slots)
        x = torch.randn(trace.forwards[0].tokens, cost.spec.hidden).bfloat16()
        served = serve_trace(trace, policy, store, x)
    warm = [
        index
        for index, forward in enumerate(trace.forwards)
        if forward.block_start != trace.forwards[0].block_start and forward.kind == "decode"
    ]
    predicted = cost.layer_seconds(result.rates, counts.decode)
    work = (
        f"a layer of experts, {first.share:.0%} in memory, in {first.format_name}, {first.policy}"
    )
    return Verification(work, 1e3 * predicted, 1e3 * float(served.seconds[warm].mean()))


def first_blocks(trace: Trace) -> Trace:
    """The first blocks of one row."""
    starts = list(dict.fromkeys(forward.block_start for forward in trace.forwards))
    kept = starts[:SERVED_BLOCKS]
    rows = {trace.forwards[0].row}
    forwards = (f for f in trace.forwards if f.row in rows and f.block_start in kept and f.tokens)
    return replace(trace, forwards=tuple(forwards))
