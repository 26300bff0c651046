"""Layers of experts that are timed: the model's own, and ones of a large model's true shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

import torch
from torch import Tensor

from coterie.bench.shapes import Shape, random_slab
from coterie.bench.timing import name
from coterie.engine.engine import Engine
from coterie.engine.load import free_memory
from coterie.engine.watch import Watched
from coterie.model.moe import MoE
from coterie.model.step import Step
from coterie.model.transformer import Transformer
from coterie.naming import CoterieError
from coterie.study.lab import Lab
from coterie.telemetry import Null
from coterie.values import Demand, Panels, Policy, RouterSpec, Slab, Window

Tell = Callable[[float], None]  # the share that is done
Out = TypeVar("Out")

MARGIN = 2 << 30  # bytes left free beside a large layer


class BenchFacts(TypedDict):
    """What a record keeps of a bench."""

    name: str
    random: bool
    experts: int
    k: int
    hidden: int
    width: int
    dtype: str
    expert_bytes: int


def called(bench: BenchFacts) -> str:
    """As a sentence speaks of it."""
    if bench["random"]:
        return f"a random layer of {bench['name']}'s shape"
    return f"the {bench['name']} model's own layer"


@dataclass(frozen=True)
class Bench:
    """Experts ready to be timed. Several slabs of one shape take turns, so that no layer stays in
    the cache only because it is timed again and again."""

    name: str
    router: RouterSpec
    slabs: tuple[Slab, ...]
    unique: float | None = None  # of random layers: what a block of 32 uses, as their router routes
    computing: torch.dtype | None = None  # of the tokens; None: as the weights

    @property
    def random(self) -> bool:
        """Whether the weights are, and so what the router thinks."""
        return self.unique is not None

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
        return self.computing or self.dtype

    @property
    def expert_bytes(self) -> int:
        slab = self.slabs[0]
        # In panels the two weights of a slab are one tensor.
        packed = isinstance(slab.gate_up, Panels)
        return (slab.gate_up.nbytes + (0 if packed else slab.down.nbytes)) // len(slab.gate_up)

    def flops(self, pairs: float) -> float:
        """Of so many token-expert pairs: three products, a multiplication and a sum each."""
        return 6.0 * self.hidden * self.width * pairs

    def facts(self) -> BenchFacts:
        return BenchFacts(
            name=self.name,
            random=self.random,
            experts=self.router.experts,
            k=self.router.k,
            hidden=self.hidden,
            width=self.width,
            dtype=name(self.dtype),
            expert_bytes=self.expert_bytes,
        )

    def inputs(self, tokens: int, draw: torch.Generator) -> Tensor:
        """Random hidden states [tokens, H]."""
        return torch.randn(tokens, self.hidden, generator=draw).to(self.device, self.tokens_dtype)


def benches(engine: Engine, shapes: Sequence[Shape]) -> Iterator[Bench | str]:
    """The model's own layers, then one layer of each shape, or why it was left out.

    Whoever takes the next one lets the last one go, for two may not fit.
    """
    yield own_bench(engine)
    for shape in shapes:
        yield large_bench(shape, engine.model.transformer.device)


def at_each(
    lab: Lab, shapes: Sequence[Shape], work: Callable[[Bench, Tell], Out]
) -> tuple[list[Out], list[str]]:
    """What ``work`` makes of every bench, and sentences about those that were left out."""
    found: list[Out] = []
    skipped: list[str] = []
    for number, bench in enumerate(benches(lab.engine, shapes)):
        if isinstance(bench, str):
            skipped.append(bench)
            continue
        first, said = number / (len(shapes) + 1), f"{bench.name}'s layer"

        def tell(share: float, first: float = first, said: str = said) -> None:
            lab.tell(first + share / (len(shapes) + 1), said)

        found.append(work(bench, tell))
    return found, skipped


def own_bench(engine: Engine) -> Bench:
    """All of the model's own layers that route."""
    model = engine.model
    everybody = torch.ones(model.spec.router.experts, dtype=torch.bool)
    slabs = [
        slab
        for layer in moe_layers(model.transformer)
        for slab in layer.store.serve(layer.layer, Demand(everybody))
    ]
    tokens = model.transformer.dtype
    return Bench(Path(model.name).name, model.spec.router, tuple(slabs), computing=tokens)


def moe_layers(transformer: Transformer) -> list[MoE]:
    """The layers that route; raises CoterieError where there are none."""
    halves = [layer.feed_forward for layer in transformer.layers]
    found = [half for half in halves if isinstance(half, MoE)]
    if not found:
        raise CoterieError("no layer of this model has experts: there is nothing to time")
    return found


def large_bench(shape: Shape, device: torch.device) -> Bench | str:
    """A random layer of that shape, or a sentence that says why there is none."""
    free = free_memory(device)
    if free is not None and free < shape.bytes + MARGIN:
        return (
            f"A layer of {shape.name}'s shape was left out: it needs {shape.bytes / 2**30:.1f} GiB "
            f"and {MARGIN / 2**30:.0f} to spare, and {free / 2**30:.1f} GiB were free."
        )
    return Bench(shape.name, shape.router, (random_slab(shape, device),), shape.unique)


def whole_layer(moe: MoE, watched: Watched, policy: Policy) -> Callable[[], Tensor]:
    """Runs a watched forward's layer again under any policy: gate, selection, experts, shared."""
    scores = watched.scores
    rows, tokens, _ = watched.x.shape
    span = torch.full((rows,), tokens)
    step = Step(
        window=Window(torch.zeros_like(span), tokens, span),
        cache=None,
        policy=policy,
        recorder=Null(),
        voters=scores.voters,
        progress=scores.progress,
        forward=scores.forward,
    )
    return lambda: moe(watched.x, step, scores.importance)
