"""MoE layers to time, the model's own and random ones of large shapes, and blocks to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, TypeVar

import torch
from torch import Tensor

from coterie import ops
from coterie.engine.engine import Engine
from coterie.engine.observation import LayerObservation, collect_observations
from coterie.errors import CoterieError, TaskError
from coterie.lab.bench.routings import find_skew, route_on_device, skewed_scores
from coterie.lab.bench.shapes import LayerShape, random_slab
from coterie.lab.bench.timing import dtype_name
from coterie.lab.study.context import StudyContext
from coterie.loading.free_memory import free_memory
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import MoE
from coterie.model.transformer import Transformer
from coterie.routing import parse_policy
from coterie.telemetry import NullRecorder
from coterie.values import (
    ExpertRequest,
    PackedExperts,
    Policy,
    RouterSpec,
    Routing,
    Scores,
    Slab,
    Window,
)

ProgressCallback = Callable[[float], None]  # the share done
T = TypeVar("T")

MEMORY_MARGIN = 2 << 30  # bytes left free next to a large layer
INPUTS_PER_WIDTH = 4  # inputs of one block size that take turns
NUM_PROMPTS = 4
FORWARDS_PER_PROMPT = 2


class BenchLayerInfo(TypedDict):
    """A ``BenchLayer`` as a record describes it."""

    name: str
    random: bool
    experts: int
    k: int
    hidden: int
    width: int
    dtype: str
    expert_bytes: int


def layer_label(bench: BenchLayerInfo) -> str:
    """The layer's name in tables."""
    return bench["name"] + (" (random)" if bench["random"] else "")


def layer_description(bench: BenchLayerInfo) -> str:
    """The layer as a phrase."""
    if bench["random"]:
        return f"a random layer of {bench['name']}'s shape"
    return f"the {bench['name']} model's own layer"


@dataclass(frozen=True)
class BenchLayer:
    """Experts of one layer shape, ready to be timed.

    Several slabs take turns, so that repetition alone keeps no layer in the cache.
    ``typical_unique`` is set for random layers: unique experts of a block of 32 tokens.
    """

    name: str
    router: RouterSpec
    slabs: tuple[Slab, ...]
    typical_unique: float | None = None
    compute_dtype: torch.dtype | None = None  # of the tokens; None: that of the weights

    @property
    def random(self) -> bool:
        """Whether the weights are random, and so the router scores."""
        return self.typical_unique is not None

    @property
    def hidden(self) -> int:
        return self.slabs[0].gate_up.shape[2]

    @property
    def width(self) -> int:
        return self.slabs[0].down.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.slabs[0].down.dtype

    @property
    def device(self) -> torch.device:
        return self.slabs[0].down.device

    @property
    def tokens_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.dtype

    @property
    def expert_bytes(self) -> int:
        slab = self.slabs[0]
        # Packed experts hold both weights in one tensor.
        packed = isinstance(slab.gate_up, PackedExperts)
        return (slab.gate_up.nbytes + (0 if packed else slab.down.nbytes)) // len(slab.gate_up)

    def flops(self, pairs: float) -> float:
        """Operations of ``pairs`` token-expert pairs: three products, two per element."""
        return 6.0 * self.hidden * self.width * pairs

    def to_info(self) -> BenchLayerInfo:
        return BenchLayerInfo(
            name=self.name,
            random=self.random,
            experts=self.router.experts,
            k=self.router.k,
            hidden=self.hidden,
            width=self.width,
            dtype=dtype_name(self.dtype),
            expert_bytes=self.expert_bytes,
        )

    def inputs(self, tokens: int, draw: torch.Generator) -> Tensor:
        """Random hidden states [tokens, H]."""
        return torch.randn(tokens, self.hidden, generator=draw).to(self.device, self.tokens_dtype)


def bench_layers(engine: Engine, shapes: Sequence[LayerShape]) -> Iterator[BenchLayer | str]:
    """The model's own layers, then one layer of each shape, or the reason why it is missing.

    Release each layer before taking the next one: two may not fit into memory.
    """
    yield model_bench_layer(engine)
    for shape in shapes:
        yield random_bench_layer(shape, engine.model.transformer.device)


def for_each_layer(
    context: StudyContext,
    shapes: Sequence[LayerShape],
    work: Callable[[BenchLayer, ProgressCallback], T],
) -> tuple[list[T], list[str]]:
    """The outputs of ``work`` for every layer, and sentences about layers that are missing."""
    outputs: list[T] = []
    skipped: list[str] = []
    for number, bench in enumerate(bench_layers(context.engine, shapes)):
        if isinstance(bench, str):
            skipped.append(bench)
            continue
        first, text = number / (len(shapes) + 1), f"{bench.name}'s layer"

        def on_progress(share: float, first: float = first, text: str = text) -> None:
            context.on_progress(first + share / (len(shapes) + 1), text)

        outputs.append(work(bench, on_progress))
    return outputs, skipped


def model_bench_layer(engine: Engine) -> BenchLayer:
    """All MoE layers of the model."""
    model = engine.model
    all_experts = torch.ones(model.spec.router.experts, dtype=torch.bool)
    slabs = [
        slab
        for layer in moe_layers(model.transformer)
        for slab in layer.store.serve(layer.layer, ExpertRequest(all_experts))
    ]
    tokens = model.transformer.dtype
    return BenchLayer(Path(model.name).name, model.spec.router, tuple(slabs), compute_dtype=tokens)


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
    return BenchLayer(shape.name, shape.router, (random_slab(shape, device),), shape.unique_experts)


def layer_runner(moe: MoE, observation: LayerObservation, policy: Policy) -> Callable[[], Tensor]:
    """Runs the layer of an observed forward under a policy: gate, selection, experts, shared."""
    scores = observation.scores
    rows, tokens, _ = observation.x.shape
    span = torch.full((rows,), tokens)
    step = ForwardContext(
        window=Window(torch.zeros_like(span), tokens, span),
        cache=None,
        policy=policy,
        recorder=NullRecorder(),
        voters=scores.voters,
        progress=scores.progress,
        forward=scores.forward_indices,
    )
    return lambda: moe(observation.x, step, scores.importance)


@dataclass(frozen=True)
class ScoredBlock:
    """The input and the router scores of one block in one layer."""

    x: Tensor  # [N, H]
    scores: Scores


def make_blocks(context: StudyContext, bench: BenchLayer, tokens: int) -> list[ScoredBlock]:
    """Blocks of real decoding forwards of the model's own layers, one row at a time.

    For a random layer, blocks of a router with the skew that the paper reports. Empty where
    ``tokens`` is not a valid block size for this plan or model.
    """
    if bench.typical_unique is None:
        try:
            prompts = context.questions()[:NUM_PROMPTS]
            observations = collect_observations(
                context.engine,
                prompts,
                batch_size=1,
                max_forwards=FORWARDS_PER_PROMPT,
                block=tokens,
            )
        except CoterieError:
            return []
        return [
            ScoredBlock(observation.x.flatten(0, 1), observation.scores)
            for observation in observations
        ]
    skew = find_skew(bench.router, bench.typical_unique)
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (bench.inputs(tokens, generator), skewed_scores(bench.router, tokens, skew, generator))
        for _ in range(INPUTS_PER_WIDTH)
    ]
    return [ScoredBlock(x, scores) for x, scores in pairs]


@dataclass(frozen=True)
class RoutedBlocks:
    """Blocks routed under one policy; ``used`` and ``pairs`` are means over them."""

    run: Callable[[], Tensor]
    used: float  # unique experts
    pairs: float  # token-expert pairs


def route_blocks(
    bench: BenchLayer, scored_blocks: Sequence[ScoredBlock], policy: str
) -> RoutedBlocks:
    """Route these blocks under a policy; ``run`` then times the experts without the routing."""
    parsed = parse_policy(policy)
    routings = [
        route_on_device(replace(block.scores), parsed, bench.device) for block in scored_blocks
    ]
    return RoutedBlocks(
        run=rotate_inputs(bench, [block.x for block in scored_blocks], routings),
        used=sum(int(routing.used.sum()) for routing in routings) / len(routings),
        pairs=sum(int((routing.topk_ids >= 0).sum()) for routing in routings) / len(routings),
    )


def rotate_inputs(
    bench: BenchLayer, xs: Sequence[Tensor], routings: Sequence[Routing]
) -> Callable[[], Tensor]:
    """Run the experts; each call uses the next input and routing, and the next slab."""
    calls = iter(range(1 << 62))

    def run() -> Tensor:
        call = next(calls)
        index, slab = call % len(routings), bench.slabs[call % len(bench.slabs)]
        return ops.run_experts(xs[index], routings[index], slab)

    return run
