"""Traces made: real runs watched, forward by forward, those too that only write keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from coterie.engine.engine import Engine, Prompt
from coterie.engine.events import Result
from coterie.engine.generation_config import GenerationConfig
from coterie.engine.observation import LayerObservation, observe_forwards
from coterie.lab.replay.bit_packing import Floats, Mask
from coterie.lab.replay.trace import SCORED_KINDS, TraceForward, TraceHeader, TraceWriter
from coterie.loading.load import Model
from coterie.model.moe import MoE
from coterie.model.spec import ModelSpec
from coterie.model.weights import expert_bytes
from coterie.quantization import FORMATS
from coterie.routing.router import select_topk
from coterie.values import Scores


@dataclass  # not frozen: it gathers a forward's layers until all have come
class TraceRecorder:
    """Shown what ``watch`` sees, it writes each forward once its last layer has been."""

    writer: TraceWriter
    _observations: list[LayerObservation] = field(default_factory=list)
    _forward_index: int = 0

    def on_layer(self, observation: LayerObservation) -> None:
        self._observations.append(observation)
        if len(self._observations) == len(self.writer.header.layers):
            for row_index in range(len(observation.rows)):
                self.writer.write(
                    forward_record(self._observations, row_index, self._forward_index)
                )
            self._observations.clear()
            self._forward_index += 1


def record_trace(
    engine: Engine,
    prompts: Sequence[Prompt],
    writer: TraceWriter,
    *,
    policy: str = "vanilla",
    batch_size: int = 1,
    max_forwards: int | None = None,
    on_result: Callable[[Result], object] | None = None,
    **options: object,
) -> list[Result]:
    """Answer the prompts, ``rows`` at a time, each forward into ``writer``.

    A row is given up after so many ``forwards``; ``options`` are fields of ``Generation``.
    """
    on_layer = TraceRecorder(writer).on_layer
    return observe_forwards(
        *(engine, prompts, on_layer),
        policy=policy, batch_size=batch_size, layers=None, max_forwards=max_forwards, on_result=on_result, record_all=True,
        reset_cache=False, **options,
    )  # fmt: skip


def forward_record(
    observations: Sequence[LayerObservation], row_index: int, number: int
) -> TraceForward:
    """One row of a forward as a trace keeps it, from all its layers in order."""
    first = observations[0]
    scores, progress = first.scores, first.scores.progress
    tokens = scores.logits.shape[1] if first.kind in SCORED_KINDS else 0
    voters = _flags(scores.voters, row_index, tokens, default=True)
    vanilla_scores = [
        _vanilla_scores(observation.scores, row_index, tokens) for observation in observations
    ]
    return TraceForward(
        number=number,
        row=first.rows[row_index],
        decode_index=scores.forward_indices[row_index],
        block_start=first.starts[row_index] + (int(voters.argmax()) if tokens else 0),
        window_start=first.starts[row_index],
        voters=voters,
        masked=_flags(progress and progress.masked, row_index, tokens),
        filled=_flags(progress and progress.after_eos, row_index, tokens),
        vanilla_ids=np.stack([ids for ids, _, _ in vanilla_scores]),
        rank=np.stack([rank for _, rank, _ in vanilla_scores]),
        next_score=np.stack([next_score for _, _, next_score in vanilla_scores]),
        used=np.stack([_used_mask(observation, row_index) for observation in observations]),
        kind=first.kind,
    )


def trace_header(
    engine: Engine,
    *,
    policy: str,
    generation: GenerationConfig,
    prompts: Mapping[str, object],
    provenance: Mapping[str, object],
) -> TraceHeader:
    """What a trace of this engine says of itself."""
    model, spec = engine.model, engine.model.spec
    return TraceHeader(
        model=model.name,
        policy=policy,
        plan=generation.plan,
        unmask=generation.unmask,
        layers=spec.moe_layers,
        experts=spec.router.experts,
        k=spec.router.k,
        expert_bytes=bytes_by_precision(spec),
        biased_weight=spec.router.biased_weight,
        commit_routing=generation.commit_routing,
        prompts=prompts,
        provenance=provenance,
    )


def bias_of(model: Model) -> Floats | None:
    """[L, E] fp32 of the layers that route; None where the model has none."""
    layers = [model.transformer.layers[layer].feed_forward for layer in model.spec.moe_layers]
    biases = [layer.bias for layer in layers if isinstance(layer, MoE) and layer.bias is not None]
    return torch.stack(biases).float().cpu().numpy() if biases else None


def bytes_by_precision(spec: ModelSpec) -> dict[str, int]:
    """Of one routed expert, in 16 bits and in every format of ``quant``; packed, with what that
    adds, where this model's are."""
    formats = {"bf16": None, **FORMATS}
    specs = {name: replace(spec, expert_format=form) for name, form in formats.items()}
    return {
        name: expert_bytes(precision_spec, torch.bfloat16) for name, precision_spec in specs.items()
    }


def _vanilla_scores(
    scores: Scores, row_index: int, tokens: int
) -> tuple[np.ndarray, Floats, Floats]:
    """Own ids [N, k], what they score, and what the next would score, of one row; N is 0 or all."""
    if not tokens:
        empty = np.zeros((0, scores.router.k), np.float32)
        return empty.astype(np.int16), empty, empty[:, 0]
    row_scores = replace(
        scores,
        logits=scores.logits[row_index : row_index + 1],
        vanilla_ids=None
        if scores.vanilla_ids is None
        else scores.vanilla_ids[row_index : row_index + 1],
    )
    k = scores.router.k
    vanilla_ids = (
        select_topk(row_scores, None) if row_scores.vanilla_ids is None else row_scores.vanilla_ids
    )
    rank = row_scores.selection_scores.gather(-1, vanilla_ids)[0]
    next_id = select_topk(row_scores, None, min(k + 1, scores.router.experts))[..., -1:]
    next_score = row_scores.selection_scores.gather(-1, next_id)[0, :, 0]
    return vanilla_ids[0].cpu().numpy().astype(np.int16), _floats(rank), _floats(next_score)


def _used_mask(observation: LayerObservation, row_index: int) -> Mask:
    ids = (
        observation.routing.topk_ids.view(*observation.scores.logits.shape[:2], -1)[row_index]
        .cpu()
        .numpy()
    )
    mask = np.zeros(observation.scores.router.experts, dtype=bool)
    mask[ids[ids >= 0]] = True
    return mask


def _flags(tensor: Tensor | None, row_index: int, tokens: int, *, default: bool = False) -> Mask:
    if tensor is None:
        return np.full(tokens, default)
    return (tensor[row_index, :tokens] > 0).cpu().numpy()


def _floats(tensor: Tensor) -> Floats:
    return tensor.float().cpu().numpy()
