"""Experts that do not fit into a GPU's memory: slots and copies, against all of them resident.

Layers of LLaDA2.0-mini's shape, of random weights; routing is drawn by the law of "Replay drawn
mini", block after block. Behind the slots, every layer has the same experts in pinned host memory:
a copy takes what it takes, and the machine need not hold them all. A forward's layers of experts
are timed from the first to the last, the host's part included; what else a forward does is timed
apart, launch by launch, and tokens per second follow from the sum of both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from gpu_parts.clock import launched
from gpu_parts.experts import transformers_layer
from gpu_parts.found import Figure, Found
from gpu_parts.watched import Nobody, Ran, Watched, on, slabs_of, summed
from torch import Tensor

from coterie import ops
from coterie.keys import from_json
from coterie.lab.bench.model import ExpertDtype, random_model
from coterie.lab.bench.shapes import SHAPES
from coterie.lab.replay.cache_simulation import (
    CoresetHistory,
    ReplayPolicy,
    TraceVotes,
    recorded_experts,
)
from coterie.lab.replay.policies import select_from_trace
from coterie.lab.replay.serving import routing_from_trace
from coterie.lab.replay.synthetic import LLADA2_MINI, RoutingLaw, SyntheticShape, synthetic_trace
from coterie.lab.replay.trace import Trace, TraceForward
from coterie.loading.cpu_experts import measure_break_even
from coterie.loading.load import Model
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import MoE
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.cpu_experts import BreakEven, CpuExperts
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.gpu_fetchers import CopyStream, GpuFetcher
from coterie.offload.pinned_memory import allocate_pinned
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.store import TrackedExpertStore, total_traffic
from coterie.offload.tiers import HostTier
from coterie.ops import cpu
from coterie.ops.expert_layout import ExpertLayout
from coterie.quantization import FORMATS
from coterie.routing import parse_policy
from coterie.telemetry import NullRecorder
from coterie.values import Routing, Window

SLOTS: dict[ExpertDtype, int] = {"bf16": 47, "int8": 92}  # of a layer: a card of 8 GB
PLAYS = (
    ReplayPolicy(parse_policy("vanilla")),
    ReplayPolicy(parse_policy("des-vote:beta=0.1")),
    ReplayPolicy(parse_policy("resident-vote:beta=0.1"), reuse_tolerance=0.05),
)
BLOCKS = 3
NEAR = 2e-3  # distance over size: slabs add in another order
REACHED = 0.85  # of the link, while experts are on the way
BEFORE = 1024  # positions before a block
DRAWN = Path(__file__).parents[2] / "results" / "replay-drawn-mini.json"
FEW = SyntheticShape(layers=2, experts=32, k=4, tokens=4, steps=2)  # of a dry run
TOKENS = (1, 2, 4, 8, 16, 32)  # of an expert, in the table of what a CPU takes


def measure(device: torch.device, *, dry: bool = False, found: Found | None = None) -> Found:
    """Both precisions, every policy, against all experts resident; then what others do."""
    found = found or Found()
    for kind, slots in SLOTS.items():
        with found.trying(f"offload {kind}"):
            bench = Bench.of(device, kind, 8 if dry else slots, dry=dry)
            bench.everything(found)
            del bench
            if far(device):
                torch.cuda.empty_cache()
    return found


@dataclass(frozen=True)
class Bench:
    """A model with all its experts on the device, the same experts in host memory, a trace."""

    kind: ExpertDtype
    device: torch.device
    slots: int
    model: Model
    layout: ExpertLayout
    host: Tensor  # [E, bytes of an expert]: of every layer
    trace: Trace
    dry: bool

    @staticmethod
    def of(device: torch.device, kind: ExpertDtype, slots: int, *, dry: bool) -> Bench:
        shape = SHAPES["tiny" if dry else "llada2-mini"]
        model = random_model(shape, kind, device=device)
        spec = model.spec
        layout = ExpertLayout(spec.hidden, spec.expert_width, FORMATS.get(kind, torch.bfloat16))
        slab = ops.unpack(next(slabs_of(model.transformer)))
        make = allocate_pinned if far(device) else _unpinned
        host = make(spec.router.experts, layout.size, device)
        layout.fill(host, slab)
        sizes = (
            LLADA2_MINI if not dry else replace(FEW, experts=spec.router.experts, k=spec.router.k)
        )
        sizes = replace(sizes, layers=len(spec.moe_layers))
        trace = synthetic_trace(sizes, _law(), blocks=1 if dry else BLOCKS, seed=7)
        return Bench(kind, device, slots, model, layout, host, trace, dry)

    @property
    def tokens(self) -> int:
        return self.trace.forwards[0].tokens

    def everything(self, found: Found) -> None:
        found.facts[f"{self.kind}: made"] = {
            "slots": self.slots,
            "expert_bytes": self.layout.size,
            "forwards": len(self.trace.forwards),
            "layers": len(self.trace.header.layers),
            "law": self.trace.header.provenance,
        }
        self.check(found)
        link = self.link(found)
        rest = self.rest(found)
        speeds: dict[str, float] = {}
        for play in PLAYS:
            for where, made in (("resident", self.resident), ("slots", self.offloaded)):
                with found.trying(f"{self.kind}, {play}, {where}"):
                    ran = self.ran(play, made())
                    name = f"{self.kind}, {play}, {where}"
                    speeds[name] = self.told(name, ran, rest, link, found)
        with found.trying(f"{self.kind}, CPU or copy"):
            self.cpu_or_copy(rest, link, found)
        if self.kind == "bf16":
            self.accelerated(rest, found)
        self.conclude(speeds, found)

    def check(self, found: Found) -> None:
        """The same sums as with all experts resident, whatever the waves."""
        worst, x = 0.0, self.x()
        own, everybody = self.offloaded(), self.resident()
        for forward in self.trace.forwards[:3]:
            for ordinal, layer in enumerate(self.trace.header.layers):
                routing = self.routing(forward, ordinal, recorded_experts(forward)[ordinal])
                found_sum, true = (summed(one, layer, routing, x) for one in (own, everybody))
                worst = max(worst, float((found_sum - true).norm() / true.norm()))
        name = f"{self.kind}: slots against resident, distance"
        found.judge(Figure(name, worst, NEAR, most=True, must=True))

    def link(self, found: Found) -> float:
        """Bytes a second from pinned memory, in one large copy; beside it, by experts. 0 where
        nothing is pinned."""
        if not far(self.device):
            return 0.0
        into = torch.empty_like(self.host, device=self.device)
        lane = CopyStream(self.device)
        lane.wait_for_compute()
        rates = {}
        for name, pieces in (("at once", self.host[None]), ("by experts", self.host)):
            taken = []
            for _ in range(5):
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record(lane.stream)
                for piece, to in zip(pieces, into.view(pieces.shape), strict=True):
                    lane.copy(piece, to)
                last.record(lane.stream)
                last.synchronize()
                taken.append(first.elapsed_time(last) * 1e3)
            rate = self.host.nbytes / found.took(f"{self.kind}: copies {name}", taken) * 1e6
            rates[name] = rate
            found.judge(Figure(f"{self.kind}: link, copies {name}, GB/s", rate / 1e9))
        return rates["at once"]

    def rest(self, found: Found) -> float:
        """Seconds of a forward without its routed experts, launch by launch."""
        layers = tuple(
            replace(layer, feed_forward=replace(layer.feed_forward, store=Nobody()))
            if isinstance(layer.feed_forward, MoE)
            else layer
            for layer in self.model.transformer.layers
        )
        transformer = replace(self.model.transformer, layers=layers)
        before = 8 if self.dry else BEFORE
        length = -(-(before + self.tokens) // 256) * 256
        dtype = transformer.dtype
        cache = KVCache.allocate(transformer.spec, 1, length, dtype=dtype, device=self.device)
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_()
        start, stop = (torch.tensor([at]).to(self.device) for at in (before, before + self.tokens))
        step = ForwardContext(
            Window(start, self.tokens, stop),
            cache,
            PLAYS[0].policy,
            NullRecorder(),
            logits_indices=torch.arange(self.tokens, device=self.device),
        )
        tokens = torch.arange(3, 3 + self.tokens, device=self.device)[None]
        with torch.inference_mode():
            samples = launched(lambda: transformer(tokens, step), self.device)
        return found.took(f"{self.kind}: a forward without routed experts", samples) / 1e6

    def ran(self, play: ReplayPolicy, store: TrackedExpertStore) -> Ran:
        """Every forward of the trace: who is elected is settled before the clock starts."""
        memory, last = TraceVotes.of(self.trace), CoresetHistory(play.reuse_tolerance)
        x, seconds, used = self.x(), [], 0
        before = total_traffic(store).stall_seconds
        with torch.inference_mode():
            for place, forward in enumerate(self.trace.forwards):
                chosen = self.elected(play, forward, store)
                coresets, _, _ = last.reuse(forward, chosen, memory.votes[place])
                used += int(coresets.sum())
                asked = [
                    (layer, self.routing(forward, ordinal, coresets[ordinal]))
                    for ordinal, layer in enumerate(self.trace.header.layers)
                ]
                seconds.append(self.timed(store, asked, x))
        courier = store.fetcher if isinstance(store, CachedExpertStore) else None
        traffic = total_traffic(store)
        return Ran(
            tuple(seconds),
            used,
            brought=courier.brought if isinstance(courier, Watched) else 0,
            aside=traffic.on_cpu,
            stalled=traffic.stall_seconds - before,
            busy=courier.busy() if isinstance(courier, Watched) else 0.0,
        )

    def timed(self, store: TrackedExpertStore, asked: Sequence[tuple[int, Routing]], x: Tensor) -> float:
        self.finish()
        began = time.perf_counter()
        for layer, routing in asked:
            summed(store, layer, routing, x)
        self.finish()
        return time.perf_counter() - began

    def elected(self, play: ReplayPolicy, forward: TraceForward, store: TrackedExpertStore) -> np.ndarray:
        """[L, E]: whom a forward uses, by what the store holds before it."""
        found = []
        for ordinal, layer in enumerate(self.trace.header.layers):
            here = store.resident(layer)
            resident = None if here is None else here.cpu().numpy()
            found.append(
                select_from_trace(self.trace, play.policy, [forward], ordinal, resident)[0]
            )
        return np.stack(found)

    def routing(self, forward: TraceForward, ordinal: int, coreset: np.ndarray) -> Routing:
        draw = torch.Generator().manual_seed(ordinal)
        return on(routing_from_trace(forward, ordinal, coreset, draw), self.device)

    def x(self) -> Tensor:
        draw = torch.Generator().manual_seed(3)
        x = torch.randn(self.tokens, self.layout.hidden, generator=draw)
        return x.to(self.device, torch.bfloat16)

    def resident(self) -> ResidentExpertStore:
        slabs = map(ops.unpack, slabs_of(self.model.transformer))
        return ResidentExpertStore(dict(zip(self.trace.header.layers, slabs, strict=True)))

    def offloaded(self, aside: CpuExperts | None = None) -> CachedExpertStore:
        tier = HostTier(dict.fromkeys(self.trace.header.layers, self.host))
        if far(self.device):
            lane = CopyStream(self.device)
            courier = Watched(GpuFetcher(tier, lane), lane.stream)
        else:
            courier = Watched(ThreadedFetcher(tier), None)
        return CachedExpertStore(
            courier,
            self.layout.as_slab,
            lambda slots, size: torch.empty(slots, size, dtype=torch.uint8, device=self.device),
            experts=self.trace.header.experts,
            expert_bytes=self.layout.size,
            capacity=self.slots,
            cpu_experts=aside,
        )

    def told(self, name: str, ran: Ran, rest: float, link: float, found: Found) -> float:
        """Keep what came of it; tokens a second of whole forwards."""
        found.took(f"{name}: experts of a forward", [one * 1e6 for one in ran.seconds])
        forwards = len(ran.seconds)
        steps = forwards / len({forward.block_start for forward in self.trace.forwards})
        speed = self.tokens / (steps * (rest + ran.median))
        moved = ran.brought * self.layout.size
        facts = {
            "ms a forward, experts": 1e3 * ran.median,
            "ms a forward, all else": 1e3 * rest,
            "steps a block": steps,
            "tokens a second": speed,
            "experts used": ran.used,
            "hit_rate": 1 - (ran.brought + ran.aside) / max(1, ran.used),
            "on the CPU": ran.aside,
            "bytes a forward": moved / forwards,
            "ms stalled a forward": 1e3 * ran.stalled / forwards,
        }
        found.facts[name] = facts
        found.judge(Figure(f"{name}: tokens/s", speed))
        if ran.busy and link:
            share = moved / ran.busy / link
            facts["share of the link"] = share
            found.judge(Figure(f"{name}: share of the link", share, REACHED))
        return speed

    def cpu_or_copy(self, rest: float, link: float, found: Found) -> None:
        """What an expert takes here and there, and forwards that choose by it."""
        everyone = torch.arange(len(self.host))
        slab = self.layout.as_slab(self.host, everyone)
        packs = cpu.is_available() and cpu.packed_format(slab) is not None
        slabs = dict.fromkeys(self.trace.header.layers, ops.pack(slab) if packs else slab)
        own = self.offloaded()
        even = measure_break_even(
            own.fetcher, slabs, self.layout.size, dtype=torch.bfloat16, device=self.device
        )
        found.facts[f"{self.kind}, CPU or copy"] = {
            "kernels of the CPU": packs,
            "threads": torch.get_num_threads(),
            "ms": {name: 1e3 * seconds for name, seconds in vars(even).items()},
            "copied sooner from so many tokens on": tokens_of_break_even(even) + 1,
            "ms of an expert on the CPU": {
                n: 1e3 * (even.expert_seconds + n * even.token_seconds) for n in TOKENS
            },
        }
        for play in PLAYS[:2]:
            name = f"{self.kind}, {play}, slots and CPU"
            self.told(
                name, self.ran(play, self.offloaded(CpuExperts(even, slabs))), rest, link, found
            )

    def accelerated(self, rest: float, found: Found) -> None:
        """Layers of experts whose weights another library copies whole, as often as they run."""
        name = "transformers with accelerate's offload"
        try:
            accelerate = import_module("accelerate")
            slab = self.layout.as_slab(self.host, torch.arange(len(self.host)))
            assert isinstance(slab.gate_up, Tensor)
            assert isinstance(slab.down, Tensor)
            whole = (slab.gate_up.contiguous(), slab.down.contiguous())
            module = transformers_layer(self.model.spec.router, *whole)
            module.config._experts_implementation = "grouped_mm"
            accelerate.cpu_offload(module, execution_device=self.device)
            forward = self.trace.forwards[0]
            routing = self.routing(forward, 0, recorded_experts(forward)[0])
            x, samples = self.x(), []
            with torch.inference_mode():
                for _ in range(4):
                    self.finish()
                    began = time.perf_counter()
                    module(x, routing.topk_ids, routing.topk_weights.to(x.dtype))
                    self.finish()
                    samples.append((time.perf_counter() - began) * 1e6)
        except Exception as error:  # absent, or not able to: the others are worth knowing
            found.facts[name] = f"not measured: {type(error).__name__}: {error}"[:300]
            return
        layer = found.took(f"{name}: a layer", samples[1:]) / 1e6
        layers = len(self.trace.header.layers)
        away = layers - round(layers * self.slots / len(self.host))
        steps = len(self.trace.forwards) / BLOCKS
        speed = self.tokens / (steps * (rest + away * layer))
        found.facts[name] = {
            "layers copied": away,
            "layers that stay": layers - away,
            "tokens a second": speed,
        }
        found.judge(Figure(f"{name}: tokens/s", speed))

    def conclude(self, speeds: dict[str, float], found: Found) -> None:
        """Against vanilla in the same slots, and against all experts resident."""
        vanilla = speeds.get(f"{self.kind}, {PLAYS[0]}, slots")
        for play in PLAYS:
            mine = speeds.get(f"{self.kind}, {play}, slots")
            whole = speeds.get(f"{self.kind}, {play}, resident")
            if mine and vanilla and play != PLAYS[0]:
                ratio = mine / vanilla
                found.judge(Figure(f"{self.kind}, {play}: speed / vanilla and LRU", ratio))
            if mine and whole:
                found.judge(Figure(f"{self.kind}, {play}: slots / resident", mine / whole))

    def finish(self) -> None:
        if far(self.device):
            torch.cuda.synchronize()


def tokens_of_break_even(even: BreakEven) -> int:
    """Tokens of an expert up to which the CPU computes a further one before it is copied."""
    if even.expert_seconds >= even.copy_seconds:
        return 0
    spare = even.copy_seconds - even.expert_seconds
    return int(spare / even.token_seconds) if even.token_seconds else 1 << 30


def far(device: torch.device) -> bool:
    """Whether it has memory of its own; else threads read, and times mean nothing."""
    return device.type == "cuda"


def _unpinned(count: int, size: int, device: torch.device) -> Tensor:
    del device
    return torch.empty(count, size, dtype=torch.uint8)


def _law() -> RoutingLaw:
    facts = json.loads(DRAWN.read_text(encoding="utf-8"))["facts"]
    return from_json(RoutingLaw, facts["as read off"]["law"])
