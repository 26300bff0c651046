"""One layer of experts: held against the reference, its plans measured, then timed beside peers."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module

import torch
from gpu_parts import large_batches
from gpu_parts.clock import kernels, launched, replayed
from gpu_parts.found import Figure, Found
from gpu_parts.limits import copy_bandwidth
from torch import Tensor

from coterie import ops
from coterie.lab.bench.model import ExpertDtype, random_experts, repeat_experts
from coterie.lab.bench.routings import balanced_routing
from coterie.lab.bench.shapes import SHAPES, ModelShape
from coterie.ops import grouped_gemm, reference
from coterie.ops.triton import experts, tuning
from coterie.quantization import FORMATS, QTensor
from coterie.values import RouterSpec, Routing, Slab, expert_mask

DRAWS = 6  # routings that take turns, so that no expert stays in a cache
TUNING = 28.0  # seconds for each format
USED = {84: 0.85, 38: 0.80, 25: 0.75}  # experts -> share of the copy bandwidth to reach in bf16
KINDS: tuple[ExpertDtype, ...] = ("bf16", "int8", "int4")
NEAR = {"fp32": 1e-4, "bf16": 2e-2, "int8": 2e-2, "int4": 2e-2}
"""Distance over size between kernels and reference."""


def check(device: torch.device, *, dry: bool = False, found: Found | None = None) -> Found:
    """Fresh random inputs of many shapes and formats, memory poisoned, every one twice."""
    failures: list[str] = []
    found, worst = found or Found(), dict.fromkeys(NEAR, 0.0)
    sizes = ((33, 17),) if dry else ((2048, 512), (2048, 1024), (200, 72), (33, 17))
    counts = (5,) if dry else (1, 2, 15, 16, 17, 32, 33, 64, 100, 512)
    cases = list(itertools.product(sizes, NEAR, counts))
    facts: dict[str, object] = {"cases": 0, "worst": worst, "failures": failures}
    found.facts["expert kernels"] = facts
    for number, (size, kind, tokens) in enumerate(cases):
        facts["cases"] = number + 1
        found.keep(found)
        try:
            distance = _distance(size, kind, tokens, device, seed=number)
        except Exception as error:  # the others are worth knowing
            failures.append(f"{size} {kind} {tokens} tokens: {type(error).__name__}: {error}"[:400])
            continue
        worst[kind] = distance if math.isnan(distance) else max(worst[kind], distance)
        if not distance <= NEAR[kind]:
            failures.append(f"{size} {kind} {tokens} tokens: off by {distance:.2e}")
    wrong = Figure("expert kernels: cases that fail", len(failures), 0, most=True, must=True)
    found.judge(wrong)
    return found


def measure(device: torch.device, *, dry: bool = False, found: Found | None = None) -> Found:
    """The layer at the coreset sizes of the paper, in every format, and what others make of it."""
    found = found or Found()
    bandwidth = copy_bandwidth(device, found, dry=dry)
    found.facts["copy bandwidth"] = bandwidth
    shape = tiny() if dry else SHAPES["llada2-mini"]
    sizes = dict(zip((6, 4, 3), USED.values(), strict=True)) if dry else USED
    times: dict[tuple[str, int], float] = {}
    for kind in KINDS:
        with found.trying(f"layer {kind}"):
            layer = Layer(shape, kind, device, tokens=3 if dry else 32, draws=1 if dry else DRAWS)
            with found.trying(f"plans {kind}"):
                found.facts[f"plans {kind}"] = layer.tuned(tuple(sizes), 0.0 if dry else TUNING)
            for used, target in sizes.items():
                routings = layer.routings(used)
                label = f"{kind}, {used} experts"
                taken = found.took(f"layer {label}: ours", *layer.timed(layer.ours, routings))
                times[kind, used] = taken
                share = layer.bytes(used) / taken * 1e6 / bandwidth
                goal = target if kind == "bf16" else None
                found.judge(Figure(f"layer {label}: share of copy bandwidth", share, goal))
                if kind == "bf16":
                    _race(layer, label, routings, taken, found)
            _conclude(times, kind, tuple(sizes), found)
    return found


class Layer:
    """A layer of random experts of a published shape, and the blocks it is timed with."""

    def __init__(
        self, shape: ModelShape, kind: ExpertDtype, device: torch.device, *, tokens: int, draws: int
    ) -> None:
        draw = torch.Generator().manual_seed(7)
        spec = replace(shape.spec, expert_format=FORMATS.get(kind))
        few = random_experts(spec, kind, draw, device)
        self.router, self.tokens, self.device = spec.router, tokens, device
        self.slab = repeat_experts(ops.unpack(few), spec.router.experts)
        self.x = torch.randn(tokens, spec.hidden, generator=draw).to(device, torch.bfloat16)
        self._draw, self._draws = draw, draws

    def routings(self, used: int) -> list[Routing]:
        return [
            balanced_routing(self.router, self.tokens, used, self._draw, self.device)
            for _ in range(self._draws)
        ]

    def bytes(self, used: int) -> float:
        """Of so many experts."""
        return (self.slab.gate_up.nbytes + self.slab.down.nbytes) * used / self.router.experts

    def ours(self, routing: Routing) -> Tensor:
        return experts.run_experts(self.x, routing, self.slab)

    def timed(
        self,
        work: Callable[[Routing], object],
        routings: Sequence[Routing],
        clock: Callable[..., list[float]] = replayed,
    ) -> tuple[list[float], int]:
        """Samples of the device's time, and the calls that each of them spans."""
        return clock(lambda: [work(routing) for routing in routings], self.device), len(routings)

    def tuned(self, sizes: Sequence[int], seconds: float) -> dict[str, object]:
        """Measures plans for both products, each beside the other's chosen one; keeps the best."""
        some = [routing for used in (max(sizes), min(sizes)) for routing in self.routings(used)[:2]]
        told: dict[str, object] = {}
        for place, work in enumerate(experts.gemm_shapes(self.x, self.slab)):
            last = time.monotonic() + seconds / 2
            tried = tuning.tune(work, partial(self._clock, some, place, last))
            usual = tuning.default_config(work)
            best = min(tried, key=tried.__getitem__, default=usual)
            gain = tried[usual] / tried[best] if usual in tried else None
            told[work.key()] = {"plan": asdict(best), "tried": len(tried), "usual / best": gain}
        return told

    def _clock(
        self, some: list[Routing], place: int, last: float, plan: tuning.TileConfig
    ) -> float:
        works = experts.gemm_shapes(self.x, self.slab)
        if time.monotonic() > last and plan != tuning.default_config(works[place]):
            raise RuntimeError("no time is left")
        pair = [tuning.best_config(work) for work in works]
        pair[place] = plan
        return _quick(lambda: self._run(some, (pair[0], pair[1])), self.device)

    def _run(
        self, routings: Sequence[Routing], pair: tuple[tuning.TileConfig, tuning.TileConfig]
    ) -> None:
        for routing in routings:
            experts.run_experts(self.x, routing, self.slab, configs=pair)


def _race(layer: Layer, label: str, routings: list[Routing], ours: float, found: Found) -> None:
    expected = layer.ours(routings[0])
    fastest = float("inf")
    for name, work in others(layer).items():
        facts: dict[str, object] = {}
        found.facts[f"layer {label}: {name}"] = facts
        try:
            out = work(routings[0]).float()
            facts["distance from ours"] = float((out - expected).norm() / expected.norm())
            facts["kernels"] = len(kernels(lambda work=work: work(routings[0]), layer.device))
            try:
                samples = layer.timed(work, routings)
            except RuntimeError as error:  # what a graph cannot hold is timed as it is launched
                facts["no graph"] = str(error)[:200]
                samples = layer.timed(work, routings, clock=launched)
            taken = found.took(f"layer {label}: {name}", *samples)
        except Exception as error:  # a peer that is absent, or does not work here
            facts["not measured"] = f"{type(error).__name__}: {error}"[:300]
            continue
        facts["times as long as ours"] = taken / ours
        fastest = min(fastest, taken)
    if fastest < float("inf"):
        found.judge(Figure(f"layer {label}: best other / ours", fastest / ours, 1.5))


def others(layer: Layer) -> dict[str, Callable[[Routing], Tensor]]:
    """What else computes a layer of experts in bf16."""
    gate_up, down = layer.slab.gate_up, layer.slab.down
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)

    def published(name: str) -> Callable[[Routing], Tensor]:
        def forward(routing: Routing) -> Tensor:
            module = transformers_layer(layer.router, gate_up, down)
            module.config._experts_implementation = name
            return module(layer.x, routing.topk_ids, routing.topk_weights.to(layer.x.dtype))

        return forward

    return {
        "torch grouped_mm": lambda r: grouped_gemm.run_experts(layer.x, r, layer.slab),
        "transformers grouped_mm": published("grouped_mm"),
        "transformers batched_mm": published("batched_mm"),
        "fused for large batches": lambda r: large_batches.run_experts(layer.x, r, gate_up, down),
    }


_MADE: dict[int, torch.nn.Module] = {}


def transformers_layer(router: RouterSpec, gate_up: Tensor, down: Tensor) -> torch.nn.Module:
    if gate_up.data_ptr() not in _MADE:
        config = import_module("transformers").Qwen3MoeConfig(
            hidden_size=gate_up.shape[2],
            moe_intermediate_size=down.shape[2],
            num_experts=router.experts,
            num_experts_per_tok=router.k,
        )
        models = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        with torch.device("meta"):
            module = models.Qwen3MoeExperts(config)
        module.gate_up_proj, module.down_proj = (
            torch.nn.Parameter(weight, requires_grad=False) for weight in (gate_up, down)
        )
        _MADE.clear()
        _MADE[gate_up.data_ptr()] = module
    return _MADE[gate_up.data_ptr()]


def _conclude(
    times: Mapping[tuple[str, int], float], kind: str, sizes: Sequence[int], found: Found
) -> None:
    """What fewer experts save in bf16; what another format saves beside it."""
    if kind != "bf16":
        for used in sizes:
            if ("bf16", used) in times:
                ratio = times["bf16", used] / times[kind, used]
                found.judge(Figure(f"layer, {used} experts: bf16 / {kind}", ratio, 1.0))
        return
    most, *fewer = sizes
    for used, target in zip(fewer, (0.45, 0.60), strict=True):
        gain = 1 - times["bf16", used] / times["bf16", most]
        found.judge(Figure(f"layer bf16, {used} for {most} experts: saved", gain, target))


def tiny() -> ModelShape:
    """Small enough for the interpreter."""
    shape = SHAPES["tiny"]
    router = RouterSpec(8, 2, "softmax", True)
    return replace(shape, spec=replace(shape.spec, router=router), unique_experts=6)


def _quick(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a few replays: enough to choose by."""
    work()
    if device.type != "cuda":
        return 1.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(10):
        graph.replay()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 10


def _distance(
    size: tuple[int, int], kind: str, tokens: int, device: torch.device, *, seed: int
) -> float:
    """How far the kernels are from the reference; infinite if two runs differ in a bit."""
    draw = torch.Generator(device).manual_seed(seed)
    (hidden, width), count, slots, k = size, 12, 9, 3
    held = torch.randperm(count, generator=draw, device=device)[:slots]
    slot_of = torch.full((count,), -1, device=device)
    slot_of[held] = torch.arange(slots, device=device)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    slab = Slab(
        _random((slots, 2 * width, hidden), kind, dtype, draw),
        _random((slots, hidden, width), kind, dtype, draw),
        slot_of,
    )
    ids = torch.rand(tokens, count, generator=draw, device=device).argsort(-1)[:, :k]
    ids = ids.where(torch.rand(ids.shape, generator=draw, device=device) < 0.9, -1)
    weights = torch.rand(ids.shape, generator=draw, device=device)
    routing = Routing(ids, weights, expert_mask(ids.flatten(), count), ids)
    x = torch.randn(tokens, hidden, generator=draw, device=device).to(dtype)
    first, second = (_poisoned(lambda: experts.run_experts(x, routing, slab)) for _ in range(2))
    if not torch.equal(first, second):
        return float("inf")
    wide = Slab(*(_wide(weight) for weight in (slab.gate_up, slab.down)), slot_of)
    expected = reference.run_experts(x.float(), routing, wide)
    return float((first - expected).norm() / expected.norm().clamp(min=1e-30))


def _poisoned(work: Callable[[], Tensor]) -> Tensor:
    """What ``work`` gives when memory that it has not written yet is NaN."""
    make = torch.empty

    def full_of_nan(*size: int, **how: object) -> Tensor:
        made = make(*size, **how)
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made.fill_(torch.iinfo(made.dtype).max)

    torch.empty = full_of_nan
    try:
        return work()
    finally:
        torch.empty = make


def _random(
    shape: tuple[int, int, int], kind: str, dtype: torch.dtype, draw: torch.Generator
) -> Tensor | QTensor:
    """Weights that keep tokens near their size; where quantised, any numbers and scales at all."""
    *_, k = shape
    if kind not in FORMATS:
        return (torch.randn(shape, generator=draw, device=draw.device) * k**-0.5).to(dtype)
    form = FORMATS[kind]
    held, groups = form.storage_shapes(shape)
    whole = torch.iinfo(form.dtype)
    q = torch.randint(whole.min, whole.max + 1, held, generator=draw, device=draw.device)
    scales = torch.randn(groups, generator=draw, device=draw.device) * k**-0.5 / -form.qmin
    return QTensor(q.to(form.dtype), scales.bfloat16(), form, k)


def _wide(weight: object) -> Tensor | QTensor:
    assert isinstance(weight, Tensor | QTensor)
    return weight.float() if isinstance(weight, Tensor) else weight
