"""One layer of experts on a GPU: checked against the reference, tuned, and timed."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from coterie import ops
from coterie.lab.bench.model import ExpertDtype, random_experts, repeat_experts
from coterie.lab.bench.routings import balanced_routing
from coterie.lab.bench.shapes import SHAPES, ModelShape
from coterie.ops import grouped_gemm, reference
from coterie.ops.triton import experts, tuning
from coterie.quantization import FORMATS, QTensor
from coterie.values import RouterSpec, Routing, Slab, expert_mask
from experiments.gpu.limits import copy_bandwidth
from experiments.gpu.report import PartReport
from experiments.gpu.timing import kernel_names, time_events, time_launches, time_replays

DRAWS = 6  # routings that alternate, so that no expert stays in the L2 cache
TUNING_SECONDS = 28.0  # for each format
TARGETS = {84: 0.85, 38: 0.80, 25: 0.75}  # experts -> share of the copy bandwidth in bf16
SAVINGS = (0.45, 0.60)  # of the time, with the second and third number of experts
KINDS: tuple[ExpertDtype, ...] = ("bf16", "int8", "int4")
MAX_DISTANCE = {"fp32": 1e-4, "bf16": 2e-2, "int8": 2e-2, "int4": 2e-2}  # relative
MAX_CONFIG_DISTANCE = 1e-2  # relative, of two tile configurations: they only add in other orders


def check(device: torch.device, report: PartReport, *, dry: bool = False) -> None:
    """The kernels on random inputs of many shapes and formats, twice each, poisoned memory."""
    failures: list[str] = []
    worst = dict.fromkeys(MAX_DISTANCE, 0.0)
    sizes = ((33, 17),) if dry else ((2048, 512), (2048, 1024), (200, 72), (33, 17))
    counts = (5,) if dry else (1, 2, 15, 16, 17, 32, 33, 64, 100, 512)
    facts: dict[str, object] = {"cases": 0, "worst": worst, "failures": failures}
    report.facts["expert kernels"] = facts
    cases = itertools.product(sizes, MAX_DISTANCE, counts)
    for number, (size, kind, tokens) in enumerate(cases):
        facts["cases"], name = number + 1, f"{size} {kind} {tokens} tokens"
        try:
            distance = kernel_distance(size, kind, tokens, device, seed=number)
        except Exception as error:  # the other cases still run
            failures.append(f"{name}: {type(error).__name__}: {error}"[:400])
            continue
        worst[kind] = distance if math.isnan(distance) else max(worst[kind], distance)
        if not distance <= MAX_DISTANCE[kind]:
            failures.append(f"{name}: off by {distance:.2e}")
    name = "expert kernels: cases that fail"
    report.add_figure(name, len(failures), 0, at_most=True, required=True)


def measure(device: torch.device, report: PartReport, *, dry: bool = False) -> None:
    """A layer with the paper's coreset sizes in every format, and torch in bf16."""
    bandwidth = copy_bandwidth(device, report, dry=dry)
    targets = dict(zip((6, 4, 3), TARGETS.values(), strict=True)) if dry else TARGETS
    times: dict[tuple[str, int], float] = {}
    for kind in KINDS:
        with report.attempt(f"layer {kind}"):
            layer = Layer(kind, device, dry=dry)
            with report.attempt(f"plans {kind}"):
                limit = 0.0 if dry else TUNING_SECONDS
                report.facts[f"plans {kind}"] = layer.tune(tuple(targets), limit)
            for used, target in targets.items():
                routings, label = layer.routings(used), f"layer {kind}, {used} experts"
                micros = report.add_times(f"{label}: ours", *layer.time(layer.ours, routings))
                times[kind, used] = micros
                share = layer.bytes(used) / micros * 1e6 / bandwidth
                goal = target if kind == "bf16" else None
                report.add_figure(f"{label}: share of copy bandwidth", share, goal)
                if kind == "bf16":
                    with report.attempt(f"{label}: torch grouped_mm"):
                        _time_baseline(layer, label, routings, micros, report)
            _add_savings(times, kind, tuple(targets), report)


class Layer:
    """A layer of random experts of LLaDA2.0-mini's shape, and the blocks to time it with."""

    def __init__(self, kind: ExpertDtype, device: torch.device, *, dry: bool) -> None:
        shape = tiny_shape() if dry else SHAPES["llada2-mini"]
        self.tokens, self.draws, self.device = 3 if dry else 32, 1 if dry else DRAWS, device
        self.generator = torch.Generator().manual_seed(7)
        spec = replace(shape.spec, expert_format=FORMATS.get(kind))
        few = random_experts(spec, kind, self.generator, device)
        self.router = spec.router
        self.slab = repeat_experts(ops.unpack(few), spec.router.experts)
        x = torch.randn(self.tokens, spec.hidden, generator=self.generator)
        self.x = x.to(device, torch.bfloat16)

    def routings(self, used: int) -> list[Routing]:
        sizes = (self.router, self.tokens, used, self.generator, self.device)
        return [balanced_routing(*sizes) for _ in range(self.draws)]

    def bytes(self, used: int) -> float:
        """Bytes of so many experts."""
        return (self.slab.gate_up.nbytes + self.slab.down.nbytes) * used / self.router.experts

    def ours(self, routing: Routing) -> Tensor:
        return experts.run_experts(self.x, routing, self.slab)

    def time(
        self,
        work: Callable[[Routing], object],
        routings: Sequence[Routing],
        clock: Callable[..., list[float]] = time_replays,
    ) -> tuple[list[float], int]:
        """Samples in microseconds, and the calls in each."""
        return clock(lambda: [work(routing) for routing in routings], self.device), len(routings)

    def tune(self, sizes: Sequence[int], seconds: float) -> dict[str, object]:
        """Measure tile configurations for both products in turn, and keep the best."""
        routings = [r for used in (max(sizes), min(sizes)) for r in self.routings(used)[:2]]
        facts: dict[str, object] = {}
        for index, work in enumerate(experts.gemm_shapes(self.x, self.slab)):
            deadline = time.monotonic() + seconds / 2
            times = tuning.tune(work, partial(self._time_config, routings, index, deadline))
            default = tuning.default_config(work)
            best = min(times, key=times.__getitem__, default=default)
            gain = times[default] / times[best] if default in times else None
            facts[work.key()] = {"plan": asdict(best), "tried": len(times), "default / best": gain}
        return facts

    def _time_config(
        self, routings: list[Routing], index: int, deadline: float, config: tuning.TileConfig
    ) -> float:
        works = experts.gemm_shapes(self.x, self.slab)
        if time.monotonic() > deadline and config != tuning.default_config(works[index]):
            raise RuntimeError("no time is left")
        pair = [tuning.best_config(work) for work in works]
        pair[index] = config
        usual = (tuning.default_config(works[0]), tuning.default_config(works[1]))

        def run(routing: Routing, configs: Sequence[tuning.TileConfig]) -> Tensor:
            return experts.run_experts(self.x, routing, self.slab, configs=(configs[0], configs[1]))

        out, expected = run(routings[0], pair), run(routings[0], usual)
        # NaN is not below the limit either.
        if not float((out - expected).norm() / expected.norm()) < MAX_CONFIG_DISTANCE:
            raise RuntimeError(f"{config} computes other values than the default")

        def work() -> None:
            for routing in routings:
                run(routing, pair)

        if self.device.type != "cuda":
            work()
            return 1.0
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return min(time_events(graph.replay, samples=10))


def _time_baseline(
    layer: Layer, label: str, routings: list[Routing], ours: float, report: PartReport
) -> None:
    """torch's grouped matrix product on the same layer."""
    name, facts = f"{label}: torch grouped_mm", {}
    report.facts[name] = facts

    def work(routing: Routing) -> Tensor:
        return grouped_gemm.run_experts(layer.x, routing, layer.slab)

    expected, out = layer.ours(routings[0]), work(routings[0]).float()
    facts["distance from ours"] = float((out - expected).norm() / expected.norm())
    facts["kernels"] = len(kernel_names(partial(work, routings[0]), layer.device))
    try:
        samples = layer.time(work, routings)
    except RuntimeError as error:  # it cannot be captured in a graph
        facts["no graph"] = str(error)[:200]
        samples = layer.time(work, routings, clock=time_launches)
    ratio = report.add_times(name, *samples) / ours
    report.add_figure(f"{label}: torch grouped_mm / ours", ratio, 1.5)


def _add_savings(
    times: Mapping[tuple[str, int], float], kind: str, sizes: Sequence[int], report: PartReport
) -> None:
    """In bf16 the time that fewer experts save; in other formats the speed-up over bf16."""
    if kind == "bf16":
        for used, target in zip(sizes[1:], SAVINGS, strict=True):
            saving = 1 - times[kind, used] / times[kind, sizes[0]]
            report.add_figure(f"layer bf16, {used} for {sizes[0]} experts: saved", saving, target)
        return
    for used in sizes if ("bf16", sizes[-1]) in times else ():
        ratio = times["bf16", used] / times[kind, used]
        report.add_figure(f"layer, {used} experts: bf16 / {kind}", ratio, 1.0)


def tiny_shape() -> ModelShape:
    """A shape for the interpreter."""
    shape = SHAPES["tiny"]
    router = RouterSpec(8, 2, "softmax", True)
    return replace(shape, spec=replace(shape.spec, router=router), unique_experts=6)


def kernel_distance(
    size: tuple[int, int], kind: str, tokens: int, device: torch.device, *, seed: int
) -> float:
    """Relative distance of the kernels from the reference; infinite if two runs differ."""
    generator = torch.Generator(device).manual_seed(seed)
    random = partial(torch.rand, generator=generator, device=device)
    (hidden, width), count, slots, k = size, 12, 9, 3
    loaded = torch.randperm(count, generator=generator, device=device)[:slots]
    slot_of = torch.full((count,), -1, device=device)
    slot_of[loaded] = torch.arange(slots, device=device)
    shapes = ((slots, 2 * width, hidden), (slots, hidden, width))
    weights = [_random_weight(shape, kind, generator) for shape in shapes]
    ids = random(tokens, count).argsort(-1)[:, :k]
    ids = ids.where(random(ids.shape) < 0.9, -1)
    routing = Routing(ids, random(ids.shape), expert_mask(ids.flatten(), count), ids)
    x = torch.randn(tokens, hidden, generator=generator, device=device)
    x = x.to(torch.float32 if kind == "fp32" else torch.bfloat16)
    with patch.object(torch, "empty", _poisoned_empty):
        slab = Slab(weights[0], weights[1], slot_of)
        first, second = (experts.run_experts(x, routing, slab) for _ in range(2))
    if not torch.equal(first, second):
        return float("inf")
    gate_up, down = (w.float() if isinstance(w, Tensor) else w for w in weights)
    expected = reference.run_experts(x.float(), routing, Slab(gate_up, down, slot_of))
    return float((first - expected).norm() / expected.norm().clamp(min=1e-30))


def _poisoned_empty(
    *size: int, _make: Callable[..., Tensor] = torch.empty, **how: object
) -> Tensor:
    """NaN, or the largest integer, in memory that the work has not written yet."""
    tensor = _make(*size, **how)
    is_float = tensor.is_floating_point()
    return tensor.fill_(float("nan") if is_float else torch.iinfo(tensor.dtype).max)


def _random_weight(
    shape: tuple[int, int, int], kind: str, generator: torch.Generator
) -> Tensor | QTensor:
    """Weights that keep the size of tokens; quantised ones have any codes and scales."""
    k, device = shape[-1], generator.device
    if kind not in FORMATS:
        weight = torch.randn(shape, generator=generator, device=device) * k**-0.5
        return weight.to(torch.float32 if kind == "fp32" else torch.bfloat16)
    form = FORMATS[kind]
    codes, groups = form.storage_shapes(shape)
    limits = torch.iinfo(form.dtype)
    q = torch.randint(limits.min, limits.max + 1, codes, generator=generator, device=device)
    scales = torch.randn(groups, generator=generator, device=device) * k**-0.5 / -form.qmin
    return QTensor(q.to(form.dtype), scales.bfloat16(), form, k)
