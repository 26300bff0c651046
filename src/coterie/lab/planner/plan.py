"""Plans: the configurations of a model that fit a machine, best first, and their commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from coterie.checkpoints.source import EMBEDDED
from coterie.decoding.kv_schemes import ForwardPass
from coterie.errors import ConfigError
from coterie.keys import Key, to_json
from coterie.lab.bench.model import ExpertDtype
from coterie.lab.planner.expert_counts import BlockCounts, CountExperts, PassCounts
from coterie.lab.planner.measurement import cost_of
from coterie.lab.planner.planned_model import PlannedModel
from coterie.lab.planner.rates import MachineRates, ShapeCost
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.loading.expert_memory import AUTO_KV_LENGTH, AUTO_MARGIN_BYTES
from coterie.offload.capacity import format_bytes
from coterie.ops import cpu
from coterie.routing import check_layers, parse_policy

PERCENTS = (*range(5, 45, 5), *range(50, 100, 10))  # of the experts, in memory
PROMPT = "Solve 3x + 4 = 19 for x."
PLACEHOLDER = "FOLDER"  # the original model of a shape, which a plan does not know
TIERS = {"cpu": ("memory", "disk"), "cuda": ("gpu", "memory")}  # the nearest first


@dataclass(frozen=True)
class PlanDevice:
    """A device that computes: its rates and its memory in bytes.

    For a GPU, the experts that its memory lacks must fit in ``host_memory``.
    """

    name: Literal["cpu", "cuda"]
    rates: MachineRates
    memory: int
    host_memory: int = 0


@dataclass(frozen=True)
class PlanOptions:
    """What is planned: policies, formats of the experts, and forwards of a block."""

    policies: tuple[str, ...]
    formats: tuple[ExpertDtype, ...]
    steps: int = 10  # decoding forwards of a block
    commit_routing: str = "vanilla"


@dataclass(frozen=True)
class Configuration:
    """One way to run a model, with its predicted time; sizes in bytes.

    ``experts`` are those that a layer of a decoding forward reads, and ``loads`` of them are
    fetched. ``fetched_bytes`` is the part of ``forward_bytes`` that comes from the tier below.
    """

    device: Annotated[str, Key("device")]
    format_name: Annotated[ExpertDtype, Key("expert_dtype")]
    policy: Annotated[str, Key("policy")]
    share: Annotated[float, Key("share_in_memory")]
    slots: Annotated[int, Key("slots")]
    tiers: Annotated[tuple[str, ...], Key("tiers")]
    memory: Annotated[int, Key("memory")]
    experts: Annotated[float, Key("experts_per_layer")]
    loads: Annotated[float, Key("loads_per_layer")]
    forward_bytes: Annotated[float, Key("bytes_a_forward")]
    fetched_bytes: Annotated[float, Key("fetched_bytes_a_forward")]
    forward_seconds: float
    converted_to: ExpertDtype | None  # None: the format in which the model is stored
    tokens_per_second: Annotated[float, Key("tokens_per_second")]
    commands: Annotated[tuple[str, ...], Key("commands")]

    @property
    def seconds_per_token(self) -> float:
        return 1 / self.tokens_per_second

    @property
    def capacity(self) -> str | None:
        """The share of experts in memory as options spell it; None for all."""
        return None if self.share == 1 else f"{self.share:.0%}"

    def describe(self) -> str:
        return (
            f"planned: experts in {self.format_name}, {self.share:.0%} of them in memory, "
            f"{format_bytes(self.memory)} in all; {1e3 * self.forward_seconds:.0f} ms a forward "
            f"and {self.tokens_per_second:.1f} tokens/s are predicted"
        )

    def to_dict(self) -> dict[str, object]:
        return {**to_json(self), "ms_a_forward": 1e3 * self.forward_seconds}


def make_plan(
    model: PlannedModel,
    devices: Sequence[PlanDevice],
    count: CountExperts,
    options: PlanOptions,
) -> tuple[Configuration, ...]:
    """What fits, best first: for each device, format and policy the fastest share of experts.

    Raises ConfigError where nothing fits.
    """
    for policy in options.policies:
        check_layers(parse_policy(policy), len(model.spec.moe_layers))
    planner = _Planner(model, count, options)
    costs = [cost_of(model.shape, name) for name in options.formats]
    found = [
        planner.configuration(device, cost, policy, percent)
        for device in devices
        for cost in costs
        for percent in _fitting_percents(cost, device)
        for policy in options.policies
    ]
    best: dict[tuple[str, str, str], Configuration] = {}
    for each in sorted(found, key=lambda one: (one.seconds_per_token, one.memory)):
        best.setdefault((each.device, each.format_name, each.policy), each)
    if not best:
        least = min(memory_bytes(cost, _slots(cost, min(_percents(cost)))) for cost in costs)
        available = ", ".join(f"{format_bytes(d.memory)} ({d.name})" for d in devices)
        raise ConfigError(
            f"{model.name} needs at least {format_bytes(least)} of memory; "
            f"given or free: {available}"
        )
    return tuple(best.values())


def memory_bytes(cost: ShapeCost, slots: int) -> int:
    """Bytes of the weights with so many experts a layer, a long KV cache and a forward's values."""
    size, layers = cost.size, len(cost.spec.moe_layers)
    others = size.bytes - layers * size.layer_expert_bytes
    kv_bytes = min(AUTO_KV_LENGTH, cost.spec.max_length) * size.kv_bytes_per_token
    return others + layers * slots * cost.expert_bytes + kv_bytes + AUTO_MARGIN_BYTES


def _fitting_percents(cost: ShapeCost, device: PlanDevice) -> tuple[int, ...]:
    """All experts where they fit, else the shares that fit, with the others a tier below."""
    percents = _percents(cost)
    fitting = [p for p in percents if memory_bytes(cost, _slots(cost, p)) <= device.memory]
    if 100 in fitting:
        return (100,)
    all_experts = cost.size.layer_expert_bytes * len(cost.spec.moe_layers)
    host_holds = device.name == "cpu" or all_experts + AUTO_MARGIN_BYTES <= device.host_memory
    return tuple(fitting) if host_holds else ()


def _percents(cost: ShapeCost) -> tuple[int, ...]:
    """Without the CPU's packed layout, experts cannot be fetched one by one."""
    if cost.format_name == "fp32" or not cpu.is_available():
        return (100,)
    return (*(percent for percent in PERCENTS if _slots(cost, percent)), 100)


def _slots(cost: ShapeCost, percent: int) -> int:
    return percent * cost.spec.router.experts // 100


@dataclass(frozen=True)
class _Planner:
    """What all configurations of a plan share."""

    model: PlannedModel
    count: CountExperts
    options: PlanOptions

    def configuration(
        self, device: PlanDevice, cost: ShapeCost, policy: str, percent: int
    ) -> Configuration:
        model, slots = self.model, _slots(cost, percent)
        commits_routed = self.options.commit_routing == "policy"
        counts = self.count(
            ReplayPolicy(parse_policy(policy), routes_commits=commits_routed), slots
        )
        passes = list(self._passes(counts, slots))
        sizes = [cost.bytes(each.visible, counted) for each, counted, _ in passes]
        seconds = [
            cost.seconds(
                device.rates, counted, tokens=each.width, num_logits=logits, positions=each.visible
            )
            for each, counted, logits in passes
        ]
        steps = self.options.steps
        return Configuration(
            device=device.name,
            format_name=cost.format_name,
            policy=policy,
            share=percent / 100,
            slots=slots,
            tiers=TIERS[device.name][: 1 if percent == 100 else 2],
            memory=memory_bytes(cost, slots),
            experts=counts.decode.mean_used,
            loads=counts.decode.mean_loads,
            forward_bytes=sum(sizes[:steps]) / steps,
            fetched_bytes=counts.decode.mean_loads * len(cost.spec.moe_layers) * cost.expert_bytes,
            forward_seconds=sum(seconds[:steps]) / steps,
            converted_to=None if cost.format_name == model.stored_format else cost.format_name,
            tokens_per_second=model.block / sum(seconds),
            commands=self._commands(device.name, cost.format_name, policy, percent),
        )

    def _passes(
        self, counts: BlockCounts, slots: int
    ) -> Iterator[tuple[ForwardPass, PassCounts, int]]:
        """The forwards of a block with their experts and logits: those that decode, then commits.

        A pass over the whole row uses all experts of each layer.
        """
        model, steps, router = self.model, self.options.steps, self.model.spec.router
        for step, each in enumerate(model.decode_passes(steps)):
            counted, logits = counts.decode, model.block - step * model.block // steps
            if each.kind == "refresh":
                used = np.full((1, 1), router.experts)
                loads = used - min(slots, router.experts)
                counted = PassCounts(used, loads, each.width * router.k)
            yield each, counted, logits
        for each in model.kv_scheme.commit_passes(model.middle_block):
            yield each, counts.commit, 0

    def _commands(
        self, device: str, format_name: str, policy: str, percent: int
    ) -> tuple[str, ...]:
        """One command, or two where the experts must be packed first to be fetched from a disk."""
        model, commit_routing = self.model, self.options.commit_routing
        resident, on_gpu = percent == 100, device == "cuda"
        dense = [] if model.dense_dtype is None else ["--dense-dtype", model.dense_dtype]
        if resident and model.is_shape and not on_gpu:
            shaped = ["bench", "generate", "--shape", model.name, "--expert-dtype", format_name]
            return (_command(*shaped, *dense, "--policy", policy),)
        options = ["--policy", policy, *(["--device", device] if on_gpu else [])]
        options += [] if commit_routing == "vanilla" else ["--commit-routing", commit_routing]
        options += [] if resident else ["--expert-memory", f"{percent}%"]
        converted = [] if format_name == model.stored_format else ["--expert-dtype", format_name]
        source = PLACEHOLDER if model.is_shape else model.name
        name = [] if model.name == EMBEDDED else ["--model", source]
        if resident or on_gpu or model.spec.panels:
            return (_command("generate", PROMPT, *name, *converted, *dense, *options),)
        packed = f"{Path(model.name.partition('@')[0]).name}-{format_name}"
        return (
            _command("quantize", source, packed, "--expert-dtype", format_name, *dense),
            _command("generate", PROMPT, "--model", packed, *options),
        )


def _command(*words: str) -> str:
    return shlex.join(["coterie", *words])
