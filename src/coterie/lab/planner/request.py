"""A whole plan: finds the model, measures the machine, counts experts, and ranks what fits.

Its first configuration can be run with random weights, beside what the plan predicts.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from coterie.errors import ConfigError
from coterie.keys import Key, to_json
from coterie.lab.bench.forward import FORWARD, time_forward
from coterie.lab.bench.model import ExpertDtype, random_model
from coterie.lab.bench.shapes import ModelShape
from coterie.lab.machine import CPU
from coterie.lab.planner.expert_counts import BlockCounts, RoutingSample, assumed_sample
from coterie.lab.planner.measurement import (
    GivenRates,
    ProgressCallback,
    cached_store,
    cost_of,
    gpu_rates,
    measure_rates,
    random_tier,
)
from coterie.lab.planner.plan import Configuration, PlanDevice, PlanOptions, make_plan, memory_bytes
from coterie.lab.planner.planned_model import PlannedModel
from coterie.lab.planner.rates import MachineRates
from coterie.lab.planner.served_trace import serve_trace
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.lab.replay.replay import steps_per_block
from coterie.lab.replay.trace import Trace
from coterie.lab.replay.trace_file import read_trace
from coterie.lab.timing import load_warnings, timing_conditions
from coterie.loading.expert_memory import AUTO_SPARE_SHARE
from coterie.loading.free_memory import free_memory
from coterie.model.weights import weight_bytes
from coterie.offload.tiers import DiskTier
from coterie.routing import format_policy, parse_policy

NOTHING_GIVEN = GivenRates()
DEFAULT_STEPS = 10  # decoding forwards of a block
MEMORY_SHARE = 0.5  # of what is free, for the random model
MAX_BYTES = 3 << 30
REPEATS = 5
SERVED_BLOCKS = 3


@dataclass(frozen=True)
class PlanRequest:
    """What to plan; None is measured, free or the default of the model."""

    model: str | None = None
    memory: int | None = None  # bytes
    gpu_memory: int | None = None  # None: plans for the CPU alone
    given: GivenRates = NOTHING_GIVEN
    policies: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()  # of the experts
    steps: int | None = None  # decoding forwards of a block
    unique_experts: float | None = None  # of a layer, used by 32 tokens under vanilla
    trace: Path | None = None
    commit_routing: str = "vanilla"
    dense_dtype: str | None = None  # None: as stored

    def run(self, on_progress: ProgressCallback = lambda doing: None) -> PlanResult:
        """The plan for this machine; raises CoterieError where nothing fits."""
        model, sample = PlannedModel.find(self.model).with_dense(self.dense_dtype), None
        options = self._options(model)
        if self.trace is not None:
            sample = self._recorded_sample(model)
            recorded = max(1, round(steps_per_block(sample.trace)))
            options = replace(options, steps=self.steps or recorded)
        on_progress("counting experts")
        sample = sample or self._assumed_sample(model, options.steps)
        memory = usable_memory() if self.memory is None else self.memory
        resident = [cost_of(model.shape, name) for name in options.formats]
        fetches = any(memory_bytes(c, c.spec.router.experts) > memory for c in resident)
        rates = measure_rates(
            model.shape, options.formats, self.given,
            tokens=model.window_tokens(options.steps),
            folder=disk_folder(model) if fetches else None, on_progress=on_progress,
        )  # fmt: skip
        on_progress("predicting")
        devices = [PlanDevice("cpu", rates, memory)]
        if self.gpu_memory is not None:
            gpu = gpu_rates(options.formats, self.given)
            devices.append(PlanDevice("cuda", gpu, self.gpu_memory, memory))
        configurations = make_plan(model, devices, sample.counter(), options)
        warnings = tuple(load_warnings(timing_conditions(CPU)))
        return PlanResult(model, options, tuple(devices), configurations, sample, warnings)

    def _options(self, model: PlannedModel) -> PlanOptions:
        chosen = self.formats or model.formats
        formats: tuple[ExpertDtype, ...] = tuple(name for name in model.formats if name in chosen)
        if unknown := [name for name in self.formats if name not in model.formats]:
            known = ", ".join(model.formats)
            raise ConfigError(f"`expert_dtype={unknown[0]}` of {model.name}; known: {known}")
        specs = self.policies or model.shape.policies
        policies = tuple(dict.fromkeys(format_policy(parse_policy(spec)) for spec in specs))
        steps = min(self.steps or DEFAULT_STEPS, model.block)
        return PlanOptions(policies, formats, steps, self.commit_routing)

    def _recorded_sample(self, model: PlannedModel) -> RoutingSample:
        assert self.trace is not None
        if self.unique_experts is not None:
            raise ConfigError("`unique_experts` has no effect with `trace`, which counts them")
        trace, router = read_trace(self.trace), model.spec.router
        if (trace.header.experts, trace.header.k) != (router.experts, router.k):
            raise ConfigError(
                f"{self.trace}: of {trace.header.k} of {trace.header.experts} experts; "
                f"{model.name} has {router.k} of {router.experts}"
            )
        return RoutingSample(trace, f"experts as recorded from {trace.header.model}")

    def _assumed_sample(self, model: PlannedModel, steps: int) -> RoutingSample:
        unique, source = float(model.shape.unique_experts), model.source
        if self.unique_experts is not None:
            unique, source = self.unique_experts, "given"
        tokens = model.window_tokens(steps)
        return assumed_sample(model.spec.router, unique, tokens=tokens, steps=steps, source=source)


@dataclass(frozen=True)
class PlanResult:
    """The configurations that fit, best first, and what their numbers rest on."""

    model: PlannedModel
    options: PlanOptions
    devices: tuple[PlanDevice, ...]  # the CPU first
    configurations: tuple[Configuration, ...]
    sample: RoutingSample
    warnings: tuple[str, ...] = ()  # about the measurement

    @property
    def rates(self) -> MachineRates:
        """Those of the CPU."""
        return self.devices[0].rates

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the numbers rest on, one sentence each without its full stop."""
        steps = f"{self.options.steps} forwards fill a block of {self.model.block} tokens"
        return (self.sample.assumption, steps, *map(_gpu_assumption, self.devices[1:]))

    def to_dict(self) -> dict[str, object]:
        options = self.options
        return {
            "model": self.model.name,
            "memory": self.devices[0].memory,
            "gpu_memory": None if len(self.devices) == 1 else self.devices[1].memory,
            "block": self.model.block,
            "steps_per_block": options.steps,
            "commit_routing": options.commit_routing,
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "rates": to_json(self.rates),
            "configurations": [each.to_dict() for each in self.configurations],
        }


def first_choice(request: PlanRequest, on_progress: ProgressCallback) -> Configuration:
    """The fastest configuration that runs without converting the model first.

    Experts in 4 bits cost accuracy, so they must be requested. Raises ConfigError with the commands
    of the fastest configuration where all of them need a conversion.
    """
    stored = PlannedModel.find(request.model).formats
    formats = request.formats or tuple(name for name in stored if name in (stored[0], "int8"))
    request = replace(request, formats=formats, gpu_memory=None)
    configurations = request.run(on_progress).configurations
    ready = [each for each in configurations if len(each.commands) == 1]
    if not ready:
        raise ConfigError(
            "no configuration that fits runs without a conversion; the fastest one: "
            + "; ".join(configurations[0].commands)
        )
    return ready[0]


def _gpu_assumption(device: PlanDevice) -> str:
    read, copies = device.rates.read_bandwidth, device.rates.copies
    link = 0.0 if copies is None else copies.link_bandwidth
    return (
        f"a GPU reads its memory at {read / 1e9:g} GB/s and copies at {link / 1e9:g} GB/s; its "
        "arithmetic and the host's work are hidden, which no run has shown yet"
    )


def usable_memory() -> int:
    """Bytes that are free, less a share for other processes; raises if the system does not say."""
    free = free_memory(CPU)
    if free is None:
        raise ConfigError("this system does not report its free memory; give `memory`")
    return int(free * (1 - AUTO_SPARE_SHARE))


def disk_folder(model: PlannedModel) -> Path:
    """Where the disk is timed: the folder of the model, else the working or the system's one."""
    candidates = [] if model.is_shape else [Path(model.name)]
    for folder in (*candidates, Path.cwd()):
        if folder.is_dir() and os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.gettempdir())


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
