"""Layers of experts that are timed: the model's own, and ones of a large model's true shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

import torch
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.engine.observation import LayerObservation
from coterie.errors import CoterieError
from coterie.lab.bench.shapes import LayerShape, random_slab
from coterie.lab.bench.timing import dtype_name
from coterie.lab.study.context import StudyContext
from coterie.loading.free_memory import free_memory
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import MoE
from coterie.model.transformer import Transformer
from coterie.telemetry import NullRecorder
from coterie.values import ExpertRequest, PackedExperts, Policy, RouterSpec, Slab, Window

ProgressCallback = Callable[[float], None]  # the share that is done
T = TypeVar("T")

MEMORY_MARGIN = 2 << 30  # bytes left free beside a large layer


class BenchLayerInfo(TypedDict):
    """What a record keeps of a bench."""

    name: str
    random: bool
    experts: int
    k: int
    hidden: int
    width: int
    dtype: str
    expert_bytes: int


def layer_description(bench: BenchLayerInfo) -> str:
    """As a sentence speaks of it."""
    if bench["random"]:
        return f"a random layer of {bench['name']}'s shape"
    return f"the {bench['name']} model's own layer"


@dataclass(frozen=True)
class BenchLayer:
    """Experts ready to be timed. Several slabs of one shape take turns, so that no layer stays in
    the cache only because it is timed again and again."""

    name: str
    router: RouterSpec
    slabs: tuple[Slab, ...]
    typical_unique: float | None = (
        None  # of random layers: what a block of 32 uses, as their router routes
    )
    compute_dtype: torch.dtype | None = None  # of the tokens; None: as the weights

    @property
    def random(self) -> bool:
        """Whether the weights are, and so what the router thinks."""
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
        # In panels the two weights of a slab are one tensor.
        packed = isinstance(slab.gate_up, PackedExperts)
        return (slab.gate_up.nbytes + (0 if packed else slab.down.nbytes)) // len(slab.gate_up)

    def flops(self, pairs: float) -> float:
        """Of so many token-expert pairs: three products, a multiplication and a sum each."""
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
    """The model's own layers, then one layer of each shape, or why it was left out.

    Whoever takes the next one lets the last one go, for two may not fit.
    """
    yield model_bench_layer(engine)
    for shape in shapes:
        yield random_bench_layer(shape, engine.model.transformer.device)


def for_each_layer(
    context: StudyContext,
    shapes: Sequence[LayerShape],
    work: Callable[[BenchLayer, ProgressCallback], T],
) -> tuple[list[T], list[str]]:
    """What ``work`` makes of every bench, and sentences about those that were left out."""
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
    """All of the model's own layers that route."""
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
    """The layers that route; raises CoterieError where there are none."""
    feed_forwards = [layer.feed_forward for layer in transformer.layers]
    layers = [feed_forward for feed_forward in feed_forwards if isinstance(feed_forward, MoE)]
    if not layers:
        raise CoterieError("no layer of this model has experts: there is nothing to time")
    return layers


def random_bench_layer(shape: LayerShape, device: torch.device) -> BenchLayer | str:
    """A random layer of that shape, or a sentence that says why there is none."""
    free = free_memory(device)
    if free is not None and free < shape.bytes + MEMORY_MARGIN:
        return (
            f"A layer of {shape.name}'s shape was left out: it needs {shape.bytes / 2**30:.1f} GiB "
            f"and {MEMORY_MARGIN / 2**30:.0f} to spare, and {free / 2**30:.1f} GiB were free."
        )
    return BenchLayer(shape.name, shape.router, (random_slab(shape, device),), shape.unique_experts)


def layer_runner(moe: MoE, observation: LayerObservation, policy: Policy) -> Callable[[], Tensor]:
    """Runs a watched forward's layer again under any policy: gate, selection, experts, shared."""
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
