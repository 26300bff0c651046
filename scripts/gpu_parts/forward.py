"""A whole decoding forward of a large model's shape, replayed as a graph, and steps of the engine.

Weights are random, gates as skewed as the published model's. Bytes of a forward are those of all
weights but the embedding's, of the experts that were used, and of the keys and values in sight.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from gpu_parts.clock import replayed
from gpu_parts.found import Figure, Found
from gpu_parts.limits import copy_bandwidth

from coterie.engine.cuda_graphs import CudaGraphCapture, CudaGraphs, ForwardOutput
from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.lab.bench.model import ExpertDtype, random_model
from coterie.lab.bench.shapes import SHAPES
from coterie.loading.load import Model
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.spec import ModelSpec
from coterie.model.weights import loaded_tensors
from coterie.routing import parse_policy
from coterie.telemetry import NullRecorder
from coterie.values import DecodeProgress, Window

POLICIES = {"vanilla": 1.6, "des-vote:beta=0.15": 2.0, "des-vote:beta=0.1": None}
"""What time / (bytes / copy bandwidth) shall be at most."""
KINDS: tuple[ExpertDtype, ...] = ("bf16", "int8", "int4")
WIDTH, BEFORE = 32, 1024  # positions of a block, and those before it


def measure(device: torch.device, *, dry: bool = False, found: Found | None = None) -> Found:
    """Every policy and format by replay; in bf16 also generations, with and without graphs."""
    found = found or Found()
    bandwidth = copy_bandwidth(device, found, dry=dry)
    found.facts["copy bandwidth"] = bandwidth
    shape = SHAPES["tiny" if dry else "llada2-mini"]
    for kind in KINDS[::2] if dry else KINDS:
        with found.trying(f"forward {kind}"):
            _format(random_model(shape, kind, device=device), kind, bandwidth, found, dry=dry)
    return found


def _format(model: Model, kind: str, bandwidth: float, found: Found, *, dry: bool) -> None:
    times: dict[str, float] = {}
    for text in POLICIES:
        with found.trying(f"forward {kind}, {text}"):
            times[text] = _policy(model, kind, text, bandwidth, found, dry=dry)
    if len(times) == len(POLICIES):
        gain = 1 - times["des-vote:beta=0.15"] / times["vanilla"]
        goal = 0.30 if kind == "bf16" else None
        found.judge(Figure(f"forward {kind}: saved by des-vote 0.15", gain, goal))
    if kind == "bf16":
        with found.trying("steps of the engine"):
            _generations(model, found, dry=dry)


def _policy(
    model: Model, kind: str, text: str, bandwidth: float, found: Found, *, dry: bool
) -> float:
    """Microseconds of the device for one forward under a policy."""
    before, width = (8, 4) if dry else (BEFORE, WIDTH)
    forward = Forward(model, text, before, width)
    taken = found.took(f"forward {kind}, {text}", *forward.timed())
    experts = forward.experts()
    size = bytes_of(model, experts, before + width)
    ratio = taken / 1e6 / (size / bandwidth)
    found.facts[f"forward {kind}, {text}"] = {
        "unique experts": experts,
        "bytes": size,
        "over the copy limit": ratio,
        "finite": forward.finite(),
    }
    sound = Figure(f"forward {kind}, {text}: finite", float(forward.finite()), 1.0, must=True)
    found.judge(sound)
    goal = POLICIES[text] if kind == "bf16" else None
    found.judge(Figure(f"forward {kind}, {text}: over copy limit", ratio, goal, most=True))
    return taken


class Forward:
    """A decoding forward of one row that is run, captured and then replayed."""

    def __init__(self, model: Model, policy: str, before: int, width: int) -> None:
        transformer, spec = model.transformer, model.spec
        self.device = transformer.device
        self._replay: Callable[[], object] | None = None
        self._graphs = CudaGraphs(transformer, self._capture)
        length = -(-(before + width) // 256) * 256
        cache = KVCache.allocate(spec, 1, length, dtype=transformer.dtype, device=self.device)
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_()
        draw = torch.Generator().manual_seed(1)
        self._tokens = torch.randint(0, spec.vocabulary, (1, width), generator=draw)
        here, there = torch.tensor([before]), torch.tensor([before + width])
        masked = torch.ones(1, width, dtype=torch.bool)
        self._step = ForwardContext(
            Window(here, width, there),
            cache,
            parse_policy(policy),
            NullRecorder(),
            logits_indices=torch.arange(width),
            progress=DecodeProgress(masked, ~masked, masked.float()),
            forward=(0,),
        )
        with torch.inference_mode():
            for _ in range(3):  # as usual, captured, played again
                self._outcome = self._run()
        if self._replay is None:
            raise RuntimeError(f"a forward under {policy} could not be captured")

    def timed(self) -> tuple[list[float], int]:
        """Samples of microseconds, and how many forwards each of them spans."""
        assert self._replay is not None
        if self.device.type != "cuda":
            return replayed(self._replay, self.device), 1
        samples = []
        for _ in range(30):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(4):
                self._replay()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last) * 1e3)
        return samples, 4

    def experts(self) -> float:
        """Unique experts of a layer, on average."""
        return self._outcome[1].counts(0).mean

    def finite(self) -> bool:
        return bool(torch.isfinite(self._outcome[0]).all())

    def _run(self) -> ForwardOutput:
        return self._graphs.run(self._tokens, self._step, [0], (0,))

    def _capture(
        self, work: Callable[[], ForwardOutput]
    ) -> tuple[ForwardOutput, Callable[[], object]]:
        if self.device.type != "cuda":
            self._replay = work
            return work(), work
        outcome, replay = CudaGraphCapture()(work)
        self._replay = replay
        return outcome, replay


def bytes_of(model: Model, experts: float, seen: int) -> float:
    """That a forward has to read at least."""
    spec, dtype = model.spec, model.transformer.dtype
    whole, routed = 0, 0
    for name, shape, what in loaded_tensors(spec, dtype):
        size = torch.Size(shape).numel() * what.itemsize
        if ".experts." in name:
            routed += size
        elif name != "embedding" or spec.tie_embeddings:
            whole += size
    return whole + routed * experts / spec.router.experts + _keys(spec, dtype) * seen


def _keys(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of a position's keys and values in all layers."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize


def _generations(model: Model, found: Found, *, dry: bool) -> None:
    """Milliseconds from step to step of the engine, host and all."""
    asked = GenerationConfig.for_family(model.family.defaults).replace(
        max_new_tokens=8 if dry else 2 * WIDTH,
        block=4 if dry else WIDTH,
        early_stop="off",
    )
    prompt = [3 + number % 90 for number in range(8 if dry else BEFORE)]
    facts: dict[str, object] = {}
    found.facts["steps of the engine"] = facts
    medians: dict[tuple[str, bool], float] = {}
    for text in tuple(POLICIES)[:2]:
        for graphs in (True, False):
            engine = Engine(model, policy=text, generation=asked, graphs=graphs)
            samples = _steps(engine, prompt)
            name = f"step bf16, {text}, {'graphs' if graphs else 'launch by launch'}"
            medians[text, graphs] = found.took(name, [sample * 1e6 for sample in samples])
            facts[name] = {"steps": len(samples), "ms": statistics.median(samples) * 1e3}
    for graphs, how in ((True, "graphs"), (False, "launch by launch")):
        gain = 1 - medians["des-vote:beta=0.15", graphs] / medians["vanilla", graphs]
        goal = 0.30 if graphs else None
        found.judge(Figure(f"step bf16, {how}: saved by des-vote 0.15", gain, goal))


def _steps(engine: Engine, prompt: list[int]) -> list[float]:
    """Seconds of every decoding step of a second generation; the first one captures."""
    samples: list[float] = []
    for timed in (False, True):
        row = engine.submit(prompt)
        while row in engine.rows:
            look = engine.sequence(row).next_pass
            began = time.perf_counter()
            engine.step()
            if timed and look is not None and look.kind == "decode":
                samples.append(time.perf_counter() - began)
    return samples
