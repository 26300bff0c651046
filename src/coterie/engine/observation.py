"""Observation of forwards: the input, the scores and the routing of each MoE layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from coterie.decoding.kv_schemes import PassKind, parse_kv_scheme
from coterie.engine.engine import Engine, Prompt
from coterie.engine.events import Finished, Result
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import ConfigError, GenerationError
from coterie.loading.load import Model
from coterie.model.moe import MoE
from coterie.telemetry import Recorder, RowId, TensorRecorder
from coterie.values import Policy, Routing, Scores


@dataclass(frozen=True)
class LayerObservation:
    """One MoE layer in one forward of S sequences.

    ``rows`` are the indices of their prompts. Sequence s computed N positions from ``starts[s]``
    on, counted from its first new token. ``scores.forward_indices`` numbers its denoising
    forwards.
    """

    layer: int
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    x: Tensor  # [S, N, H], the input of the gate and the experts
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
    """Decode prompts, ``batch_size`` at a time, and observe each MoE layer of their forwards.

    ``on_layer`` sees decode forwards, and with ``record_all`` those that write keys too; nothing
    is stored. Commits are separate forwards. ``layers`` limits the observed layers (None: all MoE
    layers). A sequence is cancelled after ``max_forwards``.

    The model and the generation options are those of ``engine``, and ``options`` override fields of
    the latter; requests of ``engine`` itself are not touched. ``reset_cache`` resets the expert
    cache before each prompt; it needs a batch size of 1. Returns the result of each prompt.
    ``on_result`` gets each result of a sequence that was not cancelled, as it finishes.
    """
    if reset_cache and batch_size != 1:
        raise ValueError(f"`reset_cache` needs a batch size of 1, not {batch_size}")

    def start_and_kind(row: int) -> tuple[int, PassKind]:
        sequence = observer.sequence(row)
        if sequence.next_pass is None:
            return 0, "decode"
        return sequence.next_pass.start - sequence.canvas.prompt_length, sequence.next_pass.kind

    recorder = _ObservationRecorder(on_layer, start_and_kind, _routing_layers(engine.model, layers))
    generation = _observable(engine.generation.replace(**options))
    observer = Engine(
        engine.model, policy=policy, generation=generation, recorder=recorder, record_all=record_all
    )
    results: dict[int, Result] = {}
    remaining = iter(prompts)
    while True:
        for _, prompt in zip(range(batch_size - len(observer.rows)), remaining, strict=False):
            if reset_cache:
                observer.reset_cache()
            observer.submit(prompt)  # a new engine numbers its requests from 0
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


def check_whole_blocks(generation: GenerationConfig) -> None:
    """Raises ConfigError if forwards do not compute whole blocks."""
    if generation.skip_settled is not None:
        raise ConfigError("`skip_settled`: observed and scored forwards have whole blocks")


def collect_observations(
    engine: Engine, prompts: Sequence[Prompt], **options: Any
) -> list[LayerObservation]:
    """All observations of ``observe_forwards`` in a list: H + E numbers per position and layer."""
    observations: list[LayerObservation] = []
    observe_forwards(engine, prompts, observations.append, **options)
    return observations


@dataclass(frozen=True)
class FirstForwardTrace:
    """All tensors of a first decode forward; ``block`` is the span of the block in its window."""

    trace: TensorRecorder
    block: slice


def first_forward(
    engine: Engine, prompts: Sequence[Prompt], *, policy: str | Policy = "vanilla"
) -> FirstForwardTrace:
    """Record the first decode forward of some prompts, which are then cancelled.

    Raises GenerationError if the prompts do not share that forward. Prompts of equal length do.
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
        raise GenerationError(
            "the prompts do not share their first decode forward; prompts of equal length do"
        )
    return FirstForwardTrace(trace, block)


@torch.inference_mode()
def moe_output(model: Model, observation: LayerObservation, routing: Routing) -> Tensor:
    """[S, N, H]: the output of an observed MoE layer for the same input under another routing.

    Shared experts are included. Raises ConfigError if the layer has no experts.
    """
    layer = model.transformer.layers[observation.layer].feed_forward
    if not isinstance(layer, MoE):
        raise ConfigError(f"layer {observation.layer} has no experts")
    return layer.apply(observation.x, routing)


@dataclass  # not frozen: it holds the state of the current forward
class _ObservationRecorder(Recorder):
    """A recorder that passes a ``LayerObservation`` to ``on_layer``."""

    on_layer: Callable[[LayerObservation], None]
    start_and_kind: Callable[[int], tuple[int, PassKind]]  # of a row's window
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
        # Routing these scores again can then skip the top-k of vanilla routing.
        vanilla_ids = routing.vanilla_ids.view(*scores.logits.shape[:2], -1)
        starts, kinds = zip(*map(self.start_and_kind, self._rows), strict=True)
        x, scores = self._moe_inputs.pop(layer), replace(scores, vanilla_ids=vanilla_ids)
        self.on_layer(LayerObservation(layer, self._rows, starts, x, scores, routing, kinds[0]))


def _observable(generation: GenerationConfig) -> GenerationConfig:
    """The options with separate commits; raises as ``check_whole_blocks`` does."""
    check_whole_blocks(generation)
    separate = parse_kv_scheme(generation.kv_cache).with_separate_commits()
    return generation.replace(kv_cache=str(separate))


def _routing_layers(model: Model, layers: Collection[int] | None) -> frozenset[int]:
    moe_layers = frozenset(model.spec.moe_layers)
    selected = moe_layers if layers is None else frozenset(layers)
    if not selected <= moe_layers:
        unknown = ", ".join(map(str, sorted(selected - moe_layers)))
        raise ConfigError(f"layers {unknown} have no experts; MoE layers: {sorted(moe_layers)}")
    return selected
