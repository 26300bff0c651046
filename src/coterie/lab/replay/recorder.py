"""Records traces: every forward of a real run, including those that only write keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.engine.engine import Engine, Prompt
from coterie.engine.events import Result
from coterie.engine.generation_config import GenerationConfig
from coterie.engine.observation import LayerObservation, check_whole_blocks, observe_forwards
from coterie.lab.replay.trace import (
    SCORED_KINDS,
    Floats,
    Mask,
    RouterBlocks,
    TraceForward,
    TraceHeader,
)
from coterie.lab.replay.trace_file import TraceWriter
from coterie.loading.load import Model
from coterie.model.moe import MoE
from coterie.model.spec import ModelSpec
from coterie.model.weights import expert_bytes
from coterie.quantization import FORMATS
from coterie.routing.router import admitted_experts, select_topk, vanilla_ids
from coterie.values import Scores


def record_trace(
    engine: Engine,
    prompts: Sequence[Prompt],
    writer: TraceWriter,
    *,
    batch_size: int = 1,
    **options: Any,
) -> list[Result]:
    """Answer the prompts and write each forward; ``options`` are those of ``observe_forwards``."""
    observations: list[LayerObservation] = []
    numbers = count()

    def on_layer(observation: LayerObservation) -> None:
        """Writes a forward once its last layer was observed."""
        observations.append(observation)
        if len(observations) == len(writer.header.layers):
            number = next(numbers)
            for row in range(len(observation.rows)):
                writer.write(forward_record(observations, row, number))
            observations.clear()

    return observe_forwards(
        engine, prompts, on_layer, batch_size=batch_size, record_all=True, **options
    )


def forward_record(observations: Sequence[LayerObservation], row: int, number: int) -> TraceForward:
    """The trace record of one row of a forward, from the observations of all its layers."""
    first = observations[0]
    scores, progress = first.scores, first.scores.progress
    tokens = scores.logits.shape[1] if first.kind in SCORED_KINDS else 0
    voters = _flags(scores.voters, row, tokens, default=True)
    layers = [_topk_scores(observation.scores, row, tokens) for observation in observations]
    ids, rank, next_score = (np.stack(parts) for parts in zip(*layers, strict=True))
    return TraceForward(
        number=number,
        row=first.rows[row],
        decode_index=scores.forward_indices[row],
        block_start=first.starts[row] + (int(voters.argmax()) if tokens else 0),
        window_start=first.starts[row],
        voters=voters,
        masked=_flags(progress and progress.masked, row, tokens),
        filled=_flags(progress and progress.after_eos, row, tokens),
        vanilla_ids=ids,
        rank=rank,
        next_score=next_score,
        used=np.stack([_used_mask(observation, row) for observation in observations]),
        kind=first.kind,
        router_blocks=_router_blocks(observations, row) if tokens else None,
    )


def trace_header(
    engine: Engine,
    *,
    policy: str,
    generation: GenerationConfig,
    prompts: Mapping[str, object],
    provenance: Mapping[str, object],
) -> TraceHeader:
    """The header of a trace of this engine; ConfigError if ``generation`` cannot be traced."""
    check_whole_blocks(generation)
    model, spec, router = engine.model, engine.model.spec, engine.model.spec.router
    return TraceHeader(
        *(model.name, policy, generation.kv_cache, generation.unmask),
        *(spec.moe_layers, router.experts, router.k, bytes_by_precision(spec)),
        biased_weight=router.biased_weight,
        commit_routing=generation.commit_routing,
        prompts=prompts,
        provenance=provenance,
    )


def bias_of(model: Model) -> Floats | None:
    """The selection bias [L, E] fp32 of the layers with a router; None where there is none."""
    layers = [model.transformer.layers[layer].feed_forward for layer in model.spec.moe_layers]
    biases = [layer.bias for layer in layers if isinstance(layer, MoE) and layer.bias is not None]
    return torch.stack(biases).float().cpu().numpy() if biases else None


def bytes_by_precision(spec: ModelSpec) -> dict[str, int]:
    """Bytes of one routed expert in bf16 and in every quantised format, in the model's layout."""
    formats = {"bf16": None, **FORMATS}.items()
    specs = {name: replace(spec, expert_format=form) for name, form in formats}
    return {name: expert_bytes(each, torch.bfloat16) for name, each in specs.items()}


def _topk_scores(scores: Scores, row: int, tokens: int) -> tuple[np.ndarray, Floats, Floats]:
    """One row's top-k ids [N, k], their scores [N, k] and the score of the next expert [N]."""
    k = scores.router.k
    if not tokens:
        empty = np.zeros((0, k), np.float32)
        return empty.astype(np.int16), empty, empty[:, 0]
    row_scores = _row_of(scores, row)
    topk_ids = vanilla_ids(row_scores)
    next_id = select_topk(row_scores, None, min(k + 1, scores.router.experts))[..., -1:]
    gathered = (row_scores.selection_scores.gather(-1, x)[0] for x in (topk_ids, next_id))
    rank, next_score = (scores.float().cpu().numpy() for scores in gathered)
    # Of the experts that the router drops before top-k, the next one may have a higher score.
    next_score = np.minimum(next_score[:, 0], rank[:, -1])
    return topk_ids[0].cpu().numpy().astype(np.int16), rank, next_score


def _router_blocks(observations: Sequence[LayerObservation], row: int) -> RouterBlocks | None:
    """The experts that the blocks of a row's window admit; None without a capacity."""
    layers = [admitted_experts(_row_of(each.scores, row)) for each in observations]
    masks = [mask[0] for mask in layers if mask is not None]  # [N, E] each
    if not masks:
        return None
    scores = observations[0].scores
    size = scores.router.block
    offset = 0 if scores.starts is None else int(scores.starts[row]) % size
    first_tokens = [max(0, start - offset) for start in range(0, offset + len(masks[0]), size)]
    admitted = torch.stack([mask[first_tokens] for mask in masks], dim=1)  # [B, L, E]
    return RouterBlocks(size, offset, admitted.cpu().numpy())


def _row_of(scores: Scores, row: int) -> Scores:
    """The scores of one row, as far as vanilla routing reads them."""
    only = slice(row, row + 1)
    starts, ids = (None if x is None else x[only] for x in (scores.starts, scores.vanilla_ids))
    return replace(scores, logits=scores.logits[only], vanilla_ids=ids, starts=starts)


def _used_mask(observation: LayerObservation, row: int) -> Mask:
    batch_shape = observation.scores.logits.shape[:2]
    ids = observation.routing.topk_ids.view(*batch_shape, -1)[row].cpu().numpy()
    mask = np.zeros(observation.scores.router.experts, dtype=bool)
    mask[ids[ids >= 0]] = True
    return mask


def _flags(tensor: Tensor | None, row: int, tokens: int, *, default: bool = False) -> Mask:
    if tensor is None:
        return np.full(tokens, default)
    return (tensor[row, :tokens] > 0).cpu().numpy()
