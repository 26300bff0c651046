"""Decoding forwards, watched: what each gate read, thought and chose, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coterie.decoding.kv_schemes import PassKind
from coterie.engine.engine import Engine, Prompt
from coterie.engine.events import Finished, Result
from coterie.errors import CoterieError
from coterie.loading.load import Model
from coterie.model.moe import MoE
from coterie.telemetry import Recorder, RowId, TensorRecorder
from coterie.values import Policy, Routing, Scores


@dataclass(frozen=True)
class LayerObservation:
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
    kind: PassKind = "decode"


def observe_forwards(
    engine: Engine,
    prompts: Sequence[Prompt],
    on_layer: Callable[[LayerObservation], None],
    *,
    policy: str | Policy = "vanilla",
    batch_size: int = 16,
    layers: Collection[int] | None = None,
    max_forwards: int | None = None,
    on_result: Callable[[Result], object] | None = None,
    record_all: bool = False,
    reset_cache: bool = False,
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
    if reset_cache and batch_size != 1:
        raise ValueError(
            f"{batch_size} rows share a memory, which cannot be emptied for one of them"
        )

    def start_and_kind(row: int) -> tuple[int, PassKind]:
        sequence = observer.sequence(row)
        if sequence.next_pass is None:
            return 0, "decode"
        return sequence.next_pass.start - sequence.canvas.prompt_length, sequence.next_pass.kind

    recorder = _ObservationRecorder(on_layer, start_and_kind, _routing_layers(engine.model, layers))
    generation = engine.generation.replace(**options)
    observer = Engine(
        engine.model, policy=policy, generation=generation, recorder=recorder, record_all=record_all
    )
    results: dict[int, Result] = {}
    remaining = iter(prompts)
    while True:
        for _, prompt in zip(range(batch_size - len(observer.rows)), remaining, strict=False):
            if reset_cache:
                observer.reset_cache()
            observer.submit(prompt)  # a new engine numbers its rows from 0
        if not observer.rows:
            return [results[row] for row in sorted(results)]
        for event in observer.step():
            if isinstance(event, Finished):
                results[event.row] = event.result
                if on_result is not None:
                    on_result(event.result)
            elif (
                max_forwards is not None
                and event.forward >= max_forwards
                and event.row in observer.rows
            ):
                results[event.row] = observer.result(event.row)
                observer.cancel(event.row)


def collect_observations(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    policy: str | Policy = "vanilla",
    batch_size: int = 16,
    layers: Collection[int] | None = None,
    max_forwards: int | None = None,
    **options: object,
) -> list[LayerObservation]:
    """Everything that ``watch`` shows, kept. Memory grows by H + E numbers a position and layer."""
    observations: list[LayerObservation] = []
    observe_forwards(
        engine,
        prompts,
        observations.append,
        policy=policy,
        batch_size=batch_size,
        layers=layers,
        max_forwards=max_forwards,
        on_result=None,
        record_all=False,
        reset_cache=False,
        **options,
    )
    return observations


@dataclass(frozen=True)
class FirstForwardTrace:
    """A first decoding forward, whole; ``block`` is where the live block lies in its window."""

    trace: TensorRecorder
    block: slice


def first_forward(
    engine: Engine, prompts: Sequence[Prompt], *, policy: str | Policy = "vanilla"
) -> FirstForwardTrace:
    """Everything about the first decoding forward of these prompts, kept; then they are given up.

    ``policy`` sees the rows in the order of the prompts. Raises CoterieError where the prompts do
    not come to one forward together: equal lengths do.
    """
    trace = TensorRecorder()
    observer = Engine(engine.model, policy=policy, generation=engine.generation, recorder=trace)
    for prompt in prompts:
        observer.submit(prompt)
    block = slice(0)
    while observer.rows and not trace.rows:
        sequence = observer.sequence(observer.rows[0])
        block_start = sequence.block.start - (sequence.next_pass.start if sequence.next_pass else 0)
        block = slice(block_start, block_start + sequence.block.width)
        observer.step()
    if trace.rows != [tuple(range(len(prompts)))]:
        raise CoterieError("these prompts do not share their first decoding forward")
    return FirstForwardTrace(trace, block)


@torch.inference_mode()
def moe_output(model: Model, observation: LayerObservation, routing: Routing) -> Tensor:
    """[S, N, H]: what the watched layer makes of the same input under another routing.

    The whole layer, shared expert included, with the model's own weights out of their store.
    """
    layer = model.transformer.layers[observation.layer].feed_forward
    if not isinstance(layer, MoE):
        raise CoterieError(f"layer {observation.layer} has no experts")
    return layer.apply(observation.x, routing)


@dataclass  # not frozen: it follows the forwards
class _ObservationRecorder(Recorder):
    """The recorder that turns what it is shown into ``Watched``."""

    on_layer: Callable[[LayerObservation], None]
    start_and_kind: Callable[
        [int], tuple[int, PassKind]
    ]  # where a row's window starts, and what for
    layers: frozenset[int]
    _rows: tuple[int, ...] = ()
    _moe_inputs: dict[int, Tensor] = field(default_factory=dict)

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        self._rows = tuple(row for row in rows if isinstance(row, int))
        self._moe_inputs.clear()

    def on_moe_input(self, layer: int, x: Tensor) -> None:
        if layer in self.layers:
            self._moe_inputs[layer] = x

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        if layer not in self.layers:
            return
        # Whoever routes these scores again need not find the model's own choice again.
        vanilla_ids = routing.vanilla_ids.view(*scores.logits.shape[:2], -1)
        starts, kinds = zip(*map(self.start_and_kind, self._rows), strict=True)
        x, scores = self._moe_inputs.pop(layer), replace(scores, vanilla_ids=vanilla_ids)
        self.on_layer(LayerObservation(layer, self._rows, starts, x, scores, routing, kinds[0]))


def _routing_layers(model: Model, layers: Collection[int] | None) -> frozenset[int]:
    moe_layers = frozenset(model.spec.moe_layers)
    selected = moe_layers if layers is None else frozenset(layers)
    if not selected <= moe_layers:
        unknown = ", ".join(map(str, sorted(selected - moe_layers)))
        raise CoterieError(f"no experts in layers {unknown}; there are in {sorted(moe_layers)}")
    return selected
