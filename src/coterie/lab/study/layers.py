"""MoE layers to time, the model's own and random ones of large shapes, and blocks to run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from coterie import ops
from coterie.engine.engine import Engine
from coterie.engine.observation import LayerObservation, collect_observations
from coterie.errors import CoterieError, TaskError
from coterie.lab import timing
from coterie.lab.bench.routings import find_skew, route_on_device, skewed_scores
from coterie.lab.bench.shapes import LayerShape, random_slab
from coterie.lab.study.experiment import Entry, StudyContext
from coterie.loading.free_memory import free_memory
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import MoE
from coterie.model.transformer import Transformer
from coterie.routing import parse_policy
from coterie.values import ExpertRequest, PackedExperts, Policy, Routing, Scores, Slab, Window

Key = TypeVar("Key", bound=Hashable)

MEMORY_MARGIN = 2 << 30  # bytes left free next to a large layer
INPUTS_PER_WIDTH = 4  # inputs of one block size that take turns
NUM_PROMPTS = 4
FORWARDS_PER_PROMPT = 2


def layer_names(bench: Entry) -> dict[str, str]:
    """A record's layer in tables (``label``), as a phrase (``layer``), and as its first word."""
    name = bench["name"]
    label, phrase = name, f"the {name} model's own layer"
    if bench["random"]:
        label, phrase = f"{name} (random)", f"a random layer of {name}'s shape"
    return {"label": label, "layer": phrase, "Layer": phrase[0].upper() + phrase[1:]}


def machine_values(record: Entry) -> dict[str, Any]:
    """The values of a caption on the machine of a record of ``measure_layers``."""
    limits, machine = record["limits"], timing.describe_conditions(record["machine"])
    return {"limits": limits, "read": limits["bytes_per_second"] / 1e9, "machine": machine}


@dataclass(frozen=True)
class BenchLayer:
    """Experts of one layer shape, ready to be timed, with router scores that are real or random.

    Several slabs take turns, so that repetition alone keeps no layer in the cache.
    """

    shape: LayerShape
    slabs: tuple[Slab, ...]
    dtype: torch.dtype  # of the tokens
    random: bool = False

    @property
    def device(self) -> torch.device:
        return self.slabs[0].down.device

    @property
    def expert_bytes(self) -> int:
        slab = self.slabs[0]
        # Packed experts hold both weights in one tensor.
        packed = isinstance(slab.gate_up, PackedExperts)
        return (slab.gate_up.nbytes + (0 if packed else slab.down.nbytes)) // len(slab.gate_up)

    def flops(self, pairs: float) -> float:
        """Operations of ``pairs`` token-expert pairs: three products, two per element."""
        return 6.0 * self.shape.hidden * self.shape.width * pairs

    def inputs(self, tokens: int, draw: torch.Generator) -> Tensor:
        """Random hidden states [tokens, H]."""
        return torch.randn(tokens, self.shape.hidden, generator=draw).to(self.device, self.dtype)

    def to_record(self) -> Entry:
        shape, router = self.shape, self.shape.router
        return {
            "name": shape.name,
            "random": self.random,
            "experts": router.experts,
            "k": router.k,
            "hidden": shape.hidden,
            "width": shape.width,
            "dtype": timing.dtype_name(shape.dtype),
            "expert_bytes": self.expert_bytes,
        }


@dataclass(frozen=True)
class TimedRun:
    """A call to time, which routes tokens to ``used`` unique experts in ``pairs`` pairs."""

    run: Callable[[], Tensor]
    used: float
    pairs: float  # token-expert pairs


# Times runs in turns; a point has the numbers of its run and ``seconds``, its TimingStats.
RunTimer = Callable[[Mapping[Key, TimedRun]], dict[Key, Entry]]


def measure_layers(
    context: StudyContext,
    shapes: Sequence[LayerShape],
    work: Callable[[StudyContext, BenchLayer, timing.DeviceLimits, RunTimer], Entry],
    *,
    budget: timing.TimingBudget,
    rounds: Mapping[bool, int],
) -> tuple[list[Entry], dict[str, object]]:
    """The output of ``work`` for the model's own layers and for one layer of each shape.

    The second value is the record of the machine and of the layers that do not fit into it.
    ``rounds`` are those of the model's own layers (False) and of random ones (True).
    """
    context.on_progress(0.0, "memory bandwidth and arithmetic of this machine")
    transformer = context.engine.model.transformer
    dtypes = {transformer.dtype, *(shape.dtype for shape in shapes)}
    limits = timing.measure_limits(transformer.device, dtypes, budget)
    outputs, skipped = [], []
    makers = [partial(random_bench_layer, shape, transformer.device) for shape in shapes]
    for number, make in enumerate((partial(model_bench_layer, context.engine), *makers)):
        bench = make()
        if isinstance(bench, str):
            skipped.append(bench)
            continue

        def on_progress(share: float, number: int = number, name: str = bench.shape.name) -> None:
            context.on_progress((number + share) / (len(makers) + 1), f"{name}'s layer")

        timer = partial(
            time_runs,
            rounds=budget.rounds or rounds[bench.random],
            device=bench.device,
            on_progress=on_progress,
        )
        outputs.append(work(context, bench, limits, timer))
        del bench  # two layers may not fit into memory
    machine = timing.timing_conditions(transformer.device)
    return outputs, {"machine": machine, "limits": limits, "skipped": skipped}


def time_runs(runs: Mapping[Key, TimedRun], **options: Any) -> dict[Key, Entry]:
    functions = {key: timed.run for key, timed in runs.items()}
    seconds = timing.time_interleaved(functions, **options)
    return {
        key: {"used": timed.used, "pairs": timed.pairs, "seconds": seconds[key]}
        for key, timed in runs.items()
    }


def fit_points(points: Sequence[Entry]) -> timing.LatencyFit:
    """Equation 2, fitted to the medians of points."""
    return timing.fit_latency(
        [point["used"] for point in points],
        [point["pairs"] for point in points],
        [point["seconds"]["median"] for point in points],
    )


def model_bench_layer(engine: Engine) -> BenchLayer:
    """All MoE layers of the model."""
    model, spec = engine.model, engine.model.spec
    request = ExpertRequest(torch.ones(spec.router.experts, dtype=torch.bool))
    moes = moe_layers(model.transformer)
    slabs = [slab for moe in moes for slab in moe.store.serve(moe.layer, request)]
    shape = LayerShape(
        Path(model.name).name,
        spec.router,
        spec.hidden,
        spec.expert_width,
        unique_experts=0,  # for random layers: the blocks of this one are real
        dtype=slabs[0].down.dtype,
    )
    return BenchLayer(shape, tuple(slabs), model.transformer.dtype)


def moe_layers(transformer: Transformer) -> list[MoE]:
    """The MoE layers; raises TaskError where there are none."""
    feed_forwards = [layer.feed_forward for layer in transformer.layers]
    layers = [feed_forward for feed_forward in feed_forwards if isinstance(feed_forward, MoE)]
    if not layers:
        raise TaskError("no layer of this model has experts, so there is nothing to time")
    return layers


def random_bench_layer(shape: LayerShape, device: torch.device) -> BenchLayer | str:
    """A random layer of that shape, or a sentence with the reason why there is none."""
    free = free_memory(device)
    if free is not None and free < shape.bytes + MEMORY_MARGIN:
        return (
            f"A layer of {shape.name}'s shape is not measured: it needs "
            f"{shape.bytes / 2**30:.1f} GiB and a margin of {MEMORY_MARGIN / 2**30:.0f} GiB; "
            f"{free / 2**30:.1f} GiB are free."
        )
    return BenchLayer(shape, (random_slab(shape, device),), shape.dtype, random=True)


def layer_runner(moe: MoE, observation: LayerObservation, policy: Policy) -> Callable[[], Tensor]:
    """Runs the layer of an observed forward under a policy: gate, selection, experts, shared."""
    scores = observation.scores
    rows, tokens, _ = observation.x.shape
    span = torch.full((rows,), tokens)
    step = ForwardContext(
        window=Window(torch.zeros_like(span), tokens, span),
        cache=None,
        policy=policy,
        voters=scores.voters,
        progress=scores.progress,
        forward=scores.forward_indices,
    )
    return lambda: moe(observation.x, step, scores.importance)


# Makes a function to time from an MoE layer, its observation and a policy.
RunMaker = Callable[[MoE, LayerObservation, Policy], Callable[[], object]]


def time_observed_layers(
    engine: Engine,
    observations: Sequence[LayerObservation],
    policies: Sequence[str],
    makers: Mapping[str, RunMaker],
    *,
    rounds: int,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[tuple[str, str], timing.TimingStats]:
    """Time every maker's function under every policy, in turns; means over the observations."""
    moes = {moe.layer: moe for moe in moe_layers(engine.model.transformer)}
    runs = {
        (name, policy, index): make(moes[observation.layer], observation, parse_policy(policy))
        for name, make in makers.items()
        for policy in policies
        for index, observation in enumerate(observations)
    }
    device, indices = engine.model.transformer.device, range(len(observations))
    timings = timing.time_interleaved(runs, rounds, device=device, on_progress=on_progress)
    return {
        (name, policy): timing.mean_timing_stats([timings[name, policy, i] for i in indices])
        for name, policy in product(makers, policies)
    }


def routed_blocks(
    context: StudyContext, bench: BenchLayer, tokens: int, policies: Sequence[str]
) -> dict[str, TimedRun]:
    """Blocks of ``tokens`` routed under each policy, without the time of the routing.

    ``used`` and ``pairs`` are means over the blocks. Empty where ``tokens`` is not a valid block
    size for this decoding plan or model.
    """
    blocks, runs = _scored_blocks(context, bench, tokens), {}
    for policy in policies if blocks else ():
        # A copy of the scores, because they keep what a routing computes from them.
        parsed, copies = parse_policy(policy), [replace(scores) for _, scores in blocks]
        routings = [route_on_device(scores, parsed, bench.device) for scores in copies]
        runs[policy] = TimedRun(
            run=rotate_inputs(bench, [x for x, _ in blocks], routings),
            used=sum(int(routing.used.sum()) for routing in routings) / len(routings),
            pairs=sum(int((routing.topk_ids >= 0).sum()) for routing in routings) / len(routings),
        )
    return runs


def _scored_blocks(
    context: StudyContext, bench: BenchLayer, tokens: int
) -> list[tuple[Tensor, Scores]]:
    """Inputs [N, H] and router scores of blocks: real decoding forwards of the model's layers, one
    row at a time; for a random layer, a router with the skew that the paper reports.
    """
    if not bench.random:
        prompts = context.questions()[:NUM_PROMPTS]
        options: dict[str, Any] = {"batch_size": 1, "max_forwards": FORWARDS_PER_PROMPT}
        try:
            observations = collect_observations(context.engine, prompts, block=tokens, **options)
        except CoterieError:
            return []
        return [(observation.x.flatten(0, 1), observation.scores) for observation in observations]
    router = bench.shape.router
    skew = find_skew(router, bench.shape.unique_experts)
    generator = torch.Generator().manual_seed(0)
    return [
        (bench.inputs(tokens, generator), skewed_scores(router, tokens, skew, generator))
        for _ in range(INPUTS_PER_WIDTH)
    ]


def rotate_inputs(
    bench: BenchLayer, xs: Sequence[Tensor], routings: Sequence[Routing]
) -> Callable[[], Tensor]:
    """Run the experts; each call uses the next input and routing, and the next slab."""
    calls = count()

    def run() -> Tensor:
        call = next(calls)
        index, slab = call % len(routings), bench.slabs[call % len(bench.slabs)]
        return ops.run_experts(xs[index], routings[index], slab)

    return run
