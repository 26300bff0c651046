"""One forward of a group: run or replay it, check its logits, advance its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coterie import ops
from coterie.decoding import BlockUpdate
from coterie.engine.active_sequence import ActiveSequence
from coterie.engine.batch import ForwardBatch, to_device
from coterie.engine.cuda_graphs import CudaGraphs
from coterie.engine.kv_pool import KVCachePool
from coterie.errors import NonFiniteLogitsError
from coterie.model.transformer import Transformer
from coterie.telemetry import ExpertCounter, Recorder, RecorderGroup, TensorRecorder
from coterie.values import LogitsSummary


def run_forward(
    transformer: Transformer,
    pool: KVCachePool,
    group: Sequence[ActiveSequence],
    counter: ExpertCounter,
    user_recorder: Recorder | None = None,
    *,
    graphs: CudaGraphs | None = None,
    record_all: bool = False,
) -> list[BlockUpdate]:
    """Run one forward of a group and advance each of its sequences.

    Unrecorded decode forwards are replayed from ``graphs`` where possible. ``counter`` counts
    decode forwards only. ``user_recorder`` sees decode forwards, or with ``record_all`` every
    forward. Raises NonFiniteLogitsError, and advances no sequence, if logits are not finite.
    """
    is_recorded = user_recorder is not None
    # A captured forward needs constant shapes, and a recorder expects whole blocks.
    skip_unused = transformer.device.type == "cpu" and graphs is None and not is_recorded
    batch = ForwardBatch.of(group, transformer, skip_unused=skip_unused)
    decode_rows = batch.decode_rows
    if graphs is not None and not is_recorded and _can_replay(transformer, graphs, batch):
        logits, forward_counter = _replay(graphs, pool, batch)
    else:
        forward_counter = ExpertCounter()
        recorders: list[Recorder] = [forward_counter] if decode_rows else []
        if user_recorder is not None and (decode_rows or record_all):
            recorders.append(user_recorder)
        logits = _run(transformer, pool, batch, RecorderGroup(tuple(recorders)))
    try:
        updates = _advance(transformer, batch, logits)
    except NonFiniteLogitsError as error:
        source = _non_finite_source(transformer, pool, batch)
        message = f"{source} returned NaN or infinite values; no token was written"
        raise NonFiniteLogitsError(message, batch.rows) from error
    counter.merge(forward_counter, decode_rows)
    return updates


def _can_replay(transformer: Transformer, graphs: CudaGraphs, batch: ForwardBatch) -> bool:
    context = batch.context
    own_input = context.embeddings is not None or transformer.self_conditioning is not None
    is_block = not context.committed and context.window.positions is None
    return bool(batch.decode_rows) and is_block and not own_input and graphs.can_run(context)


def _replay(
    graphs: CudaGraphs, pool: KVCachePool, batch: ForwardBatch
) -> tuple[Tensor, ExpertCounter]:
    context = replace(batch.context, cache=pool.full_cache() if batch.uses_cache else None)
    return graphs.run(batch.tokens, context, batch.cache_rows, batch.rows)


def _run(
    transformer: Transformer, pool: KVCachePool, batch: ForwardBatch, recorder: Recorder
) -> Tensor:
    """Logits [P, V] on the device."""
    cache = pool.rows(batch.cache_rows) if batch.uses_cache else None
    context = replace(batch.context, cache=cache, recorder=recorder)
    recorder.on_forward(batch.rows)
    device = transformer.device
    return transformer(batch.tokens.to(device), to_device(context, device))


def _advance(transformer: Transformer, batch: ForwardBatch, logits: Tensor) -> list[BlockUpdate]:
    """Give each sequence its logits; NonFiniteLogitsError before any sequence has advanced."""
    # The only read from the device in a step, whatever the number of sequences.
    mask_id = batch.sequences[0].sequence.request.mask_id
    summary = ops.summarize_logits(logits, mask_id).to_host()
    if not bool(torch.isfinite(summary.logsumexp).all()):
        raise NonFiniteLogitsError("logits are not finite")
    blocks = [active.sequence.block.index for active in batch.sequences]
    updates, stop = [], 0
    for active, positions in zip(batch.sequences, batch.positions, strict=True):
        rows = slice(stop, stop := stop + len(positions))
        updates.append(
            _advance_sequence(transformer, active, positions, logits[rows], summary[rows])
        )
    if (coresets := batch.context.coresets) is not None:
        per_sequence = coresets.current.unbind(1)
        for active, block, current in zip(batch.sequences, blocks, per_sequence, strict=True):
            active.coresets = block, current
    return updates


def _advance_sequence(
    transformer: Transformer,
    active: ActiveSequence,
    positions: Tensor,
    logits: Tensor,
    summary: LogitsSummary,
) -> BlockUpdate:
    next_pass, sequence = active.next_pass, active.sequence
    if not next_pass.is_denoising:
        active.prefills += next_pass.kind == "prefill"
        active.commits += next_pass.kind == "commit"
        return sequence.receive(None)
    active.computed_positions += next_pass.width
    if transformer.self_conditioning is not None:
        logits_at_temperature = logits / (sequence.temperature or 1.0)
        block, update = sequence.block.index, sequence.receive(logits, summary)
        active.expected = block, transformer.expected_embedding(logits_at_temperature)
        return update
    if sequence.request.unmask.smooth is None or active.embeddings is None:
        return sequence.receive(logits, summary, positions - sequence.block.start)
    step, block = sequence.steps.total, sequence.block
    own = block.contains(positions).nonzero()[:, 0]
    update = sequence.receive(
        logits[own.to(logits.device)], summary[own], positions[own] - block.start
    )
    _smooth_embeddings(transformer, active, positions, logits, step)
    return update


def _smooth_embeddings(
    transformer: Transformer, active: ActiveSequence, positions: Tensor, logits: Tensor, step: int
) -> None:
    """Mix the expected embedding into the masked ``positions``, for the next forward."""
    request, embeddings = active.sequence.request, active.embeddings
    assert request.unmask.smooth is not None
    assert embeddings is not None
    tokens = active.sequence.canvas.tokens[positions]
    embedded = transformer.embed(tokens.to(logits.device)[None])[0]
    expected = transformer.expected_embedding(logits)
    embeddings[positions.to(embeddings.device)] = request.unmask.smooth.mix_embeddings(
        embedded, expected, tokens == request.mask_id, step
    )


def _non_finite_source(transformer: Transformer, pool: KVCachePool, batch: ForwardBatch) -> str:
    """The first part of the model with a non-finite output, from running the forward again."""
    recorder, last = TensorRecorder(), transformer.spec.layers
    _run(transformer, pool, batch, recorder)
    for layer, x in recorder.outputs:
        if not bool(torch.isfinite(x).all()):
            return {-1: "the embedding", last: "the final norm"}.get(layer, f"layer {layer}")
    return "the head"
