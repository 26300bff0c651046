"""Experts that do not fit in GPU memory: a cache with copies against all experts resident.

Layers have LLaDA2.0-mini's shape and random weights; routing follows the law of the record "Replay
drawn mini". All layers share one layer's experts in pinned host memory, so that the host needs no
more. A forward's layers of experts are timed together, host included. The rest of a forward is
timed separately, and tokens per second follow from the sum.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie import ops
from coterie.lab.bench.model import ExpertDtype, random_model
from coterie.lab.bench.shapes import SHAPES
from coterie.lab.planner.served_trace import elections, routing_from_trace, store_counters
from coterie.lab.planner.synthetic_trace import LLADA2_MINI, SyntheticShape, synthetic_trace
from coterie.lab.replay.cache_simulation import ReplayPolicy, recorded_experts
from coterie.lab.replay.trace import Mask, Trace, TraceForward
from coterie.loading.load import Model
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import MoE
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.gpu_fetchers import CopyStream, GpuFetcher
from coterie.offload.pinned_memory import allocate_pinned
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.store import TrackedExpertStore
from coterie.offload.tiers import HostTier
from coterie.ops.expert_layout import ExpertLayout
from coterie.quantization import FORMATS
from coterie.routing import parse_policy
from coterie.values import ExpertRequest, Routing, Slab, Window
from experiments.gpu.forward import random_cache
from experiments.gpu.report import PartReport
from experiments.gpu.timing import time_launches
from experiments.records import read_law

SLOTS: dict[ExpertDtype, int] = {"bf16": 47, "int8": 92}  # of a layer, on a card of 8 GB
VANILLA = ReplayPolicy(parse_policy("vanilla"))
POLICIES = (
    VANILLA,
    ReplayPolicy(parse_policy("des-vote:beta=0.1")),
    ReplayPolicy(parse_policy("resident-vote:beta=0.1"), reuse_tolerance=0.05),
)
BLOCKS = 3
MAX_DISTANCE = 2e-3  # relative: slabs are added in another order
BEFORE = 1024  # positions before a block
TINY = SyntheticShape(layers=2, experts=32, k=4, tokens=4, steps=2)


def measure(device: torch.device, report: PartReport, *, dry: bool = False) -> None:
    """Both precisions and every policy, with a cache and with all experts resident."""
    for kind, slots in SLOTS.items():
        with report.attempt(f"offload {kind}"):
            OffloadBench.of(device, kind, 8 if dry else slots, dry=dry).run(report)


def has_own_memory(device: torch.device) -> bool:
    return device.type == "cuda"


@dataclass(frozen=True)
class OffloadBench:
    """A model with all experts on the device, one layer's experts in host memory, a trace."""

    kind: ExpertDtype
    device: torch.device
    slots: int
    model: Model
    layout: ExpertLayout
    host: Tensor  # [E, bytes of an expert]
    trace: Trace
    before: int  # positions before a block

    @staticmethod
    def of(device: torch.device, kind: ExpertDtype, slots: int, *, dry: bool) -> OffloadBench:
        model = random_model(SHAPES["tiny" if dry else "llada2-mini"], kind, device=device)
        spec, router = model.spec, model.spec.router
        layout = ExpertLayout(spec.hidden, spec.expert_width, FORMATS.get(kind, torch.bfloat16))
        sizes = (router.experts, layout.size)
        pinned = has_own_memory(device)
        host = allocate_pinned(*sizes, device) if pinned else torch.empty(sizes, dtype=torch.uint8)
        layout.fill(host, ops.unpack(next(expert_slabs(model))))
        shape = TINY if dry else LLADA2_MINI
        shape = replace(shape, experts=router.experts, k=router.k, layers=len(spec.moe_layers))
        trace = synthetic_trace(shape, read_law(), blocks=1 if dry else BLOCKS, seed=7)
        return OffloadBench(kind, device, slots, model, layout, host, trace, 8 if dry else BEFORE)

    @property
    def x(self) -> Tensor:
        """The input of every layer, [N, H]."""
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(self.trace.forwards[0].tokens, self.layout.hidden, generator=generator)
        return x.to(self.device, torch.bfloat16)

    def run(self, report: PartReport) -> None:
        sizes = {"slots": self.slots, "expert_bytes": self.layout.size}
        report.facts[f"{self.kind}: setup"] = {**sizes, "law": self.trace.header.provenance}
        self.check(report)
        self.measure_link(report)
        rest = self.time_rest(report)
        speeds: dict[tuple[str, ReplayPolicy], float] = {}
        for policy in POLICIES:
            for where, make in (("resident", self.resident), ("slots", self.cached)):
                with report.attempt(f"{self.kind}, {policy}, {where}"):
                    speed = self.time_policy(where, policy, make(), rest, report)
                    speeds[where, policy] = speed
        for policy in POLICIES:
            ratio = speeds["slots", policy] / speeds["resident", policy]
            report.add_figure(f"{self.kind}, {policy}: slots / resident", ratio)
            ratio = speeds["slots", policy] / speeds["slots", VANILLA]
            report.add_figure(f"{self.kind}, {policy}: speed / vanilla and LRU", ratio)

    def check(self, report: PartReport) -> None:
        """The same sums as with all experts resident, in however many waves."""
        worst, x, stores = 0.0, self.x, (self.cached(), self.resident())
        for forward in self.trace.forwards[:3]:
            experts = recorded_experts([forward])[0]
            for layer, routing in self.routings(forward, experts):
                cached, expected = (sum_experts(store, layer, routing, x) for store in stores)
                worst = max(worst, float((cached - expected).norm() / expected.norm()))
        name, limits = "slots against resident, distance", {"at_most": True, "required": True}
        report.add_figure(f"{self.kind}: {name}", worst, MAX_DISTANCE, **limits)

    def measure_link(self, report: PartReport) -> None:
        """Copies from pinned memory, in one piece and expert by expert."""
        if not has_own_memory(self.device):
            return
        target, stream = torch.empty_like(self.host, device=self.device), CopyStream(self.device)
        stream.wait_for_compute()
        for name, pieces in (("at once", self.host[None]), ("by experts", self.host)):
            samples = []
            for _ in range(5):
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record(stream.stream)
                for piece, place in zip(pieces, target.view(pieces.shape), strict=True):
                    stream.copy(piece, place)
                last.record(stream.stream)
                last.synchronize()
                samples.append(first.elapsed_time(last) * 1e3)
            micros = report.add_times(f"{self.kind}: copies {name}", samples)
            rate = self.host.nbytes / micros / 1e3
            report.add_figure(f"{self.kind}: link, copies {name}, GB/s", rate)

    def time_rest(self, report: PartReport) -> float:
        """Seconds of a forward without its routed experts, launch by launch."""
        layers = tuple(
            replace(layer, feed_forward=replace(layer.feed_forward, store=EmptyStore({})))
            if isinstance(layer.feed_forward, MoE)
            else layer
            for layer in self.model.transformer.layers
        )
        transformer = replace(self.model.transformer, layers=layers)
        count = self.trace.forwards[0].tokens
        start, stop = (
            torch.tensor([at]).to(self.device) for at in (self.before, self.before + count)
        )
        context = ForwardContext(
            Window(start, count, stop),
            random_cache(transformer, self.before + count),
            VANILLA.policy,
            logits_indices=torch.arange(count, device=self.device),
        )
        tokens = torch.arange(3, 3 + count, device=self.device)[None]
        with torch.inference_mode():
            samples = time_launches(lambda: transformer(tokens, context), self.device)
        return report.add_times(f"{self.kind}: a forward without routed experts", samples) / 1e6

    def time_policy(
        self,
        where: str,
        policy: ReplayPolicy,
        store: TrackedExpertStore,
        rest: float,
        report: PartReport,
    ) -> float:
        """Time every forward of the trace, elections excluded; returns tokens per second."""
        seconds, used, x = [], 0, self.x
        with torch.inference_mode():
            for forward, experts in elections(self.trace, policy, store):
                routings = list(self.routings(forward, experts))
                self.synchronize()
                start = time.perf_counter()
                for layer, routing in routings:
                    sum_experts(store, layer, routing, x)
                self.synchronize()
                seconds.append(time.perf_counter() - start)
                used += int(experts.sum())
        name, count = f"{self.kind}, {policy}, {where}", len(seconds)
        report.add_times(f"{name}: experts of a forward", [each * 1e6 for each in seconds])
        steps = count / len({forward.block_start for forward in self.trace.forwards})
        speed = len(x) / (steps * (rest + statistics.median(seconds)))
        moved, stall = store_counters(store)
        report.facts[name] = {
            "ms a forward, experts": 1e3 * statistics.median(seconds),
            "ms a forward, all else": 1e3 * rest,
            "hit_rate": 1 - moved / max(1, used),
            "bytes a forward": moved * self.layout.size / count,
            "ms stalled a forward": 1e3 * stall / count,
        }
        report.add_figure(f"{name}: tokens/s", speed)
        return speed

    def routings(self, forward: TraceForward, experts: Mask) -> Iterator[tuple[int, Routing]]:
        """Each layer and its routing on the device."""
        for ordinal, layer in enumerate(self.trace.header.layers):
            generator = torch.Generator().manual_seed(ordinal)
            routing = routing_from_trace(forward, ordinal, experts[ordinal], generator)
            parts = (routing.topk_ids, routing.topk_weights, routing.used, routing.vanilla_ids)
            ids, weights, used, vanilla_ids = (part.to(self.device) for part in parts)
            yield layer, Routing(ids, weights, used, vanilla_ids)

    def resident(self) -> TrackedExpertStore:
        slabs = map(ops.unpack, expert_slabs(self.model))
        return ResidentExpertStore(dict(zip(self.trace.header.layers, slabs, strict=True)))

    def cached(self) -> CachedExpertStore:
        tier, pinned = HostTier(dict.fromkeys(self.trace.header.layers, self.host)), None
        if has_own_memory(self.device):
            pinned = GpuFetcher(tier, CopyStream(self.device))
        return CachedExpertStore(
            pinned or ThreadedFetcher(tier),
            self.layout.as_slab,
            lambda slots, size: torch.empty(slots, size, dtype=torch.uint8, device=self.device),
            experts=self.trace.header.experts,
            expert_bytes=self.layout.size,
            capacity=self.slots,
        )

    def synchronize(self) -> None:
        if has_own_memory(self.device):
            torch.cuda.synchronize()


class EmptyStore(ResidentExpertStore):
    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        return iter(())


def expert_slabs(model: Model) -> Iterator[Slab]:
    """All experts of each layer that has some."""
    nothing = ExpertRequest(torch.zeros(model.spec.router.experts, dtype=torch.bool))
    for number, layer in enumerate(model.transformer.layers):
        if isinstance(layer.feed_forward, MoE):
            yield from layer.feed_forward.store.serve(number, nothing)


def sum_experts(store: TrackedExpertStore, layer: int, routing: Routing, x: Tensor) -> Tensor:
    """A layer's output, summed over slabs."""
    total: Tensor | None = None
    for slab in store.serve(layer, ExpertRequest(routing.used, routing)):
        part = ops.run_experts(x, routing, slab)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
