"""Decoding forwards, watched: what each gate read, thought and chose, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coterie.decoding.plans import Kind
from coterie.engine.engine import Engine, Prompt
from coterie.engine.event import Finished, Result
from coterie.engine.load import Model
from coterie.model.moe import MoE
from coterie.naming import CoterieError
from coterie.telemetry import Row, Tracing
from coterie.values import Policy, Routing, Scores


@dataclass(frozen=True)
class Watched:
    """One layer that routes, in one forward of the S rows that shared it.

    ``rows`` are the places of their prompts in what was asked. Row s computed the N positions from
    ``starts[s]`` on, counted from its first new token. ``scores.forward`` numbers the forwards.
    """

    layer: int
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    x: Tensor  # [S, N, H], what the gate and the experts read
    scores: Scores
    routing: Routing
    kind: Kind = "decode"


def watch(
    engine: Engine,
    prompts: Sequence[Prompt],
    see: Callable[[Watched], None],
    *,
    policy: str | Policy = "vanilla",
    rows: int = 16,
    layers: Collection[int] | None = None,
    forwards: int | None = None,
    heard: Callable[[Result], object] | None = None,
    every: bool = False,
    fresh: bool = False,
    **options: object,
) -> list[Result]:
    """Answer the prompts, ``rows`` at a time, showing ``see`` every decoding forward as it goes.

    With ``every``, those too that compute the prompt's keys or a finished block's. Nothing is kept,
    so memory does not grow. Only ``layers`` are shown (None: all that route), and
    a row is given up after so many ``forwards``. ``engine`` lends its model and its generation,
    of which ``options`` change fields; its own rows are left alone. ``fresh``: one row at a time,
    and the experts' memory is emptied before each. Returns what became of each prompt; ``heard`` is
    told of those that end by themselves as they do.
    """
    if fresh and rows != 1:
        raise ValueError(f"{rows} rows share a memory, which cannot be emptied for one of them")

    def place(row: int) -> tuple[int, Kind]:
        asked = own.row(row)
        if asked.look is None:
            return 0, "decode"
        return asked.look.start - asked.canvas.prompt, asked.look.kind

    eye = _Eye(see, place, _routing_layers(engine.model, layers))
    generation = engine.generation.but(**options)
    own = Engine(engine.model, policy=policy, generation=generation, watcher=eye, every=every)
    found: dict[int, Result] = {}
    waiting = iter(prompts)
    while True:
        for _, prompt in zip(range(rows - len(own.rows)), waiting, strict=False):
            if fresh:
                own.empty()
            own.submit(prompt)  # a new engine numbers its rows from 0
        if not own.rows:
            return [found[row] for row in sorted(found)]
        for event in own.step():
            if isinstance(event, Finished):
                found[event.row] = event.result
                if heard is not None:
                    heard(event.result)
            elif forwards is not None and event.forward >= forwards and event.row in own.rows:
                found[event.row] = own.result(event.row)
                own.cancel(event.row)


def collect(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    policy: str | Policy = "vanilla",
    rows: int = 16,
    layers: Collection[int] | None = None,
    forwards: int | None = None,
    **options: object,
) -> list[Watched]:
    """Everything that ``watch`` shows, kept. Memory grows by H + E numbers a position and layer."""
    seen: list[Watched] = []
    watch(
        engine,
        prompts,
        seen.append,
        policy=policy,
        rows=rows,
        layers=layers,
        forwards=forwards,
        heard=None,
        every=False,
        fresh=False,
        **options,
    )
    return seen


@dataclass(frozen=True)
class First:
    """A first decoding forward, whole; ``block`` is where the live block lies in its window."""

    trace: Tracing
    block: slice


def first_forward(
    engine: Engine, prompts: Sequence[Prompt], *, policy: str | Policy = "vanilla"
) -> First:
    """Everything about the first decoding forward of these prompts, kept; then they are given up.

    ``policy`` sees the rows in the order of the prompts. Raises CoterieError where the prompts do
    not come to one forward together: equal lengths do.
    """
    trace = Tracing()
    own = Engine(engine.model, policy=policy, generation=engine.generation, watcher=trace)
    for prompt in prompts:
        own.submit(prompt)
    block = slice(0)
    while own.rows and not trace.rows:
        row = own.row(own.rows[0])
        first = row.block.start - (row.look.start if row.look else 0)
        block = slice(first, first + row.block.width)
        own.step()
    if trace.rows != [tuple(range(len(prompts)))]:
        raise CoterieError("these prompts do not share their first decoding forward")
    return First(trace, block)


@torch.inference_mode()
def moe_output(model: Model, watched: Watched, routing: Routing) -> Tensor:
    """[S, N, H]: what the watched layer makes of the same input under another routing.

    The whole layer, shared expert included, with the model's own weights out of their store.
    """
    layer = model.transformer.layers[watched.layer].feed_forward
    if not isinstance(layer, MoE):
        raise CoterieError(f"layer {watched.layer} has no experts")
    return layer.apply(watched.x, routing)


@dataclass  # not frozen: it follows the forwards
class _Eye:
    """The recorder that turns what it is shown into ``Watched``."""

    see: Callable[[Watched], None]
    place: Callable[[int], tuple[int, Kind]]  # where a row's window starts, and what for
    layers: frozenset[int]
    _rows: tuple[int, ...] = ()
    _fed: dict[int, Tensor] = field(default_factory=dict)

    def began(self, rows: tuple[Row, ...]) -> None:
        self._rows = tuple(row for row in rows if isinstance(row, int))
        self._fed.clear()

    def fed(self, layer: int, x: Tensor) -> None:
        if layer in self.layers:
            self._fed[layer] = x

    def routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        if layer not in self.layers:
            return
        # Whoever routes these scores again need not find the model's own choice again.
        own = routing.own.view(*scores.logits.shape[:2], -1)
        starts, kinds = zip(*map(self.place, self._rows), strict=True)
        x, scores = self._fed.pop(layer), replace(scores, own=own)
        self.see(Watched(layer, self._rows, starts, x, scores, routing, kinds[0]))

    def layer_output(self, layer: int, x: Tensor) -> None:
        del layer, x


def _routing_layers(model: Model, layers: Collection[int] | None) -> frozenset[int]:
    there = frozenset(model.spec.moe_layers)
    wanted = there if layers is None else frozenset(layers)
    if not wanted <= there:
        strangers = ", ".join(map(str, sorted(wanted - there)))
        raise CoterieError(f"no experts in layers {strangers}; there are in {sorted(there)}")
    return wanted
