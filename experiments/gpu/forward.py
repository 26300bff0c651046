"""A whole decoding forward of LLaDA2.0-mini's shape as a CUDA graph, and steps of the engine.

Weights are random; router logits are as skewed as the published model's. The bytes of a forward are
those of all weights but the embedding, of the experts used, and of the visible keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from coterie.engine.cuda_graphs import CudaGraphCapture, CudaGraphs, ForwardOutput
from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.lab.bench.model import ExpertDtype, random_model
from coterie.lab.bench.shapes import SHAPES
from coterie.loading.load import Model
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.transformer import Transformer
from coterie.model.weights import loaded_tensors
from coterie.routing import parse_policy
from coterie.values import DecodeProgress, Window
from experiments.gpu.limits import copy_bandwidth
from experiments.gpu.report import PartReport
from experiments.gpu.timing import time_launches

MAX_RATIOS = {"vanilla": 1.6, "des-vote:beta=0.15": 2.0, "des-vote:beta=0.1": None}
"""By policy: the largest ratio of a forward's time to its bytes over the copy bandwidth."""
VANILLA, VOTE, _ = MAX_RATIOS
MIN_SAVING = 0.30
KINDS: tuple[ExpertDtype, ...] = ("bf16", "int8", "int4")
WIDTH, BEFORE = 32, 1024  # positions of a block, and before it


def measure(device: torch.device, report: PartReport, *, dry: bool = False) -> None:
    """Every policy and format by replay; in bf16 also generations with and without graphs."""
    bandwidth = copy_bandwidth(device, report, dry=dry)
    shape = SHAPES["tiny" if dry else "llada2-mini"]
    for kind in KINDS[::2] if dry else KINDS:
        with report.attempt(f"forward {kind}"):
            model, times = random_model(shape, kind, device=device), {}
            for policy in MAX_RATIOS:
                with report.attempt(f"forward {kind}, {policy}"):
                    times[policy] = time_policy(model, kind, policy, bandwidth, report, dry=dry)
            if VANILLA in times and VOTE in times:
                goal = MIN_SAVING if kind == "bf16" else None
                saving = 1 - times[VOTE] / times[VANILLA]
                report.add_figure(f"forward {kind}: saved by des-vote 0.15", saving, goal)
            if kind == "bf16":
                with report.attempt("steps of the engine"):
                    time_generations(model, report, dry=dry)


def time_policy(
    model: Model, kind: str, policy: str, bandwidth: float, report: PartReport, *, dry: bool
) -> float:
    """Microseconds of the device for one forward under a policy."""
    before, width = (8, 4) if dry else (BEFORE, WIDTH)
    forward, name = GraphForward(model, policy, before, width), f"forward {kind}, {policy}"
    micros = report.add_times(name, forward.time())
    logits, counts = forward.output[0], forward.output[1]
    experts, finite = counts.counts(0).mean, bool(torch.isfinite(logits).all())
    size = forward_bytes(model, experts, before + width)
    ratio = micros / 1e6 / (size / bandwidth)
    facts = {"unique experts": experts, "bytes": size, "over the copy limit": ratio}
    report.facts[name] = {**facts, "finite": finite}
    report.add_figure(f"{name}: finite", float(finite), 1.0, required=True)
    goal = MAX_RATIOS[policy] if kind == "bf16" else None
    report.add_figure(f"{name}: over copy limit", ratio, goal, at_most=True)
    return micros


class GraphForward:
    """A decoding forward of one row that is captured as a CUDA graph and replayed."""

    def __init__(self, model: Model, policy: str, before: int, width: int) -> None:
        self.device = model.transformer.device
        self.replay: Callable[[], object] | None = None
        graphs = CudaGraphs(model.transformer, self._capture)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, model.spec.vocabulary, (1, width), generator=generator)
        masked = torch.ones(1, width, dtype=torch.bool)
        context = ForwardContext(
            Window(torch.tensor([before]), width, torch.tensor([before + width])),
            random_cache(model.transformer, before + width),
            parse_policy(policy),
            logits_indices=torch.arange(width),
            progress=DecodeProgress(masked, ~masked, masked.float()),
            forward=(0,),
        )
        with torch.inference_mode():
            for _ in range(3):  # without a graph, captured, replayed
                self.output: ForwardOutput = graphs.run(tokens, context, [0], (0,))
        if self.replay is None:
            raise RuntimeError(f"a forward under {policy} could not be captured")

    def time(self) -> list[float]:
        """Microseconds of a forward."""
        assert self.replay is not None
        return time_launches(self.replay, self.device, calls=4)

    def _capture(
        self, work: Callable[[], ForwardOutput]
    ) -> tuple[ForwardOutput, Callable[[], object]]:
        is_cuda = self.device.type == "cuda"
        output, self.replay = CudaGraphCapture()(work) if is_cuda else (work(), work)
        return output, self.replay


def random_cache(transformer: Transformer, positions: int) -> KVCache:
    """Random keys and values for one row of at least so many positions."""
    length = -(-positions // 256) * 256
    how = {"dtype": transformer.dtype, "device": transformer.device}
    cache = KVCache.allocate(transformer.spec, 1, length, **how)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    return cache


def forward_bytes(model: Model, experts: float, positions: int) -> float:
    """The bytes that a forward reads at least."""
    spec, dtype = model.spec, model.transformer.dtype
    dense, routed = 0, 0
    for name, shape, stored in loaded_tensors(spec, dtype):
        size = torch.Size(shape).numel() * stored.itemsize
        if ".experts." in name:
            routed += size
        elif name != "embedding" or spec.tie_embeddings:
            dense += size
    kv = 2 * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize
    return dense + routed * experts / spec.router.experts + kv * positions


def time_generations(model: Model, report: PartReport, *, dry: bool) -> None:
    """Milliseconds from step to step of the engine, the host's work included."""
    sizes = {"max_new_tokens": 8 if dry else 2 * WIDTH, "block": 4 if dry else WIDTH}
    defaults = GenerationConfig.for_family(model.family.defaults)
    generation = defaults.replace(**sizes, early_stop="off")
    prompt = [3 + number % 90 for number in range(8 if dry else BEFORE)]
    for graphs, how in ((True, "graphs"), (False, "launch by launch")):
        medians = {}
        for policy in (VANILLA, VOTE):
            engine = Engine(model, policy=policy, generation=generation, graphs=graphs)
            samples, name = step_seconds(engine, prompt), f"step bf16, {policy}, {how}"
            medians[policy] = report.add_times(name, [sample * 1e6 for sample in samples])
        saving = 1 - medians[VOTE] / medians[VANILLA]
        goal = MIN_SAVING if graphs else None
        report.add_figure(f"step bf16, {how}: saved by des-vote 0.15", saving, goal)


def step_seconds(engine: Engine, prompt: list[int]) -> list[float]:
    """Seconds of every decoding step of the second generation; the first one captures."""
    samples: list[float] = []
    for timed in (False, True):
        row = engine.submit(prompt)
        while row in engine.rows:
            next_pass, start = engine.sequence(row).next_pass, time.perf_counter()
            engine.step()
            if timed and next_pass is not None and next_pass.kind == "decode":
                samples.append(time.perf_counter() - start)
    return samples
