"""Rows that can share a forward, and that forward."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coterie import ops
from coterie.decoding import BlockUpdate, SequenceState
from coterie.decoding.kv_schemes import ForwardPass
from coterie.decoding.sequence import first_index_of
from coterie.engine.cuda_graphs import CudaGraphs
from coterie.engine.generation_config import GenerationConfig
from coterie.engine.kv_pool import KVCachePool
from coterie.errors import NonFiniteLogitsError
from coterie.model.cache import KVCache
from coterie.model.forward_context import CoresetState, ForwardContext
from coterie.model.transformer import Transformer
from coterie.offload.traffic import Traffic
from coterie.routing import Vanilla
from coterie.telemetry import ExpertCounter, NullRecorder, Recorder, RecorderGroup, TensorRecorder
from coterie.values import DecodeProgress, LogitsSummary, Policy, Window

VANILLA = Vanilla()
NULL_RECORDER = NullRecorder()


@dataclass  # not frozen: it counts what its row went through
class ActiveSequence:
    """A row in the engine: its cache row, its policy, and what it has cost."""

    number: int
    sequence: SequenceState
    cache_row: int
    policy: Policy
    generation: GenerationConfig
    embeddings: Tensor | None = None  # [length, H], where masks are fed what was last proposed
    coresets: tuple[int, Tensor] | None = None  # a block, and its [L, E] of the step before
    prefills: int = 0
    commits: int = 0
    traffic_before: Traffic | None = None  # by everybody, before it
    start_time: float = field(default_factory=time.perf_counter)

    @property
    def next_pass(self) -> ForwardPass:
        """The forward it waits for."""
        if self.sequence.next_pass is None:
            raise RuntimeError(f"row {self.number} is finished")
        return self.sequence.next_pass

    def next_policy(self) -> Policy:
        """The policy of the forward it waits for: elsewhere than in decoding, only where asked."""
        kind = self.next_pass.kind
        routing_mode = (
            self.generation.commit_routing if kind == "commit" else self.generation.prefill_routing
        )
        return self.policy if kind == "decode" or routing_mode == "policy" else VANILLA

    def reuse_tolerance(self) -> float | None:
        """How much of its votes a coreset may lose before the block leaves it; None where each
        forward elects anew, as all do that do not decode."""
        return self.generation.reuse_tolerance if self.next_pass.kind == "decode" else None

    def previous_coresets(self) -> Tensor | None:
        """[L, E]: the coresets of the block's step before, if it had one."""
        block, coresets = self.coresets or (None, None)
        return coresets if block == self.sequence.block.index else None


def group_sequences(sequences: Iterable[ActiveSequence]) -> list[list[ActiveSequence]]:
    """Slots whose next forwards agree in everything but positions, in order of arrival."""
    grouped: dict[tuple[object, ...], list[ActiveSequence]] = {}
    for active in sequences:
        next_pass = active.next_pass
        has_embeddings = active.embeddings is not None
        key = (
            *(next_pass.width, next_pass.kind, next_pass.causal_block, next_pass.use_cache),
            *(active.next_policy(), active.reuse_tolerance(), has_embeddings),
        )
        grouped.setdefault(key, []).append(active)
    return list(grouped.values())


def run_forward(
    transformer: Transformer,
    pool: KVCachePool,
    group: Sequence[ActiveSequence],
    counter: ExpertCounter,
    user_recorder: Recorder = NULL_RECORDER,
    *,
    graphs: CudaGraphs | None = None,
    record_all: bool = False,
) -> list[BlockUpdate]:
    """One forward of rows that agree (``groups``); every row then moves on to its next.

    Decoding forwards that nobody watches are played from ``graphs``, where they take them. Only
    decoding forwards are counted, and shown to the watcher unless it is to see ``every`` one. If
    logits are not finite this raises, and no row has moved.
    """
    next_pass, device = group[0].next_pass, transformer.device
    rows, cache_rows = (
        tuple(active.number for active in group),
        [active.cache_row for active in group],
    )
    # What is played again shall not change in shape, and who watches is shown whole blocks.
    skip_unused = (
        device.type == "cpu" and graphs is None and isinstance(user_recorder, NullRecorder)
    )
    tokens, context = _forward_inputs(group, skip_unused=skip_unused)
    context = replace(context, coresets=_coresets(group, transformer))
    blocks = [active.sequence.block.index for active in group]

    def cache() -> KVCache | None:
        return pool.rows(cache_rows) if next_pass.use_cache else None

    can_replay = (
        next_pass.kind == "decode"
        and isinstance(user_recorder, NullRecorder)
        and context.embeddings is None
    )
    if graphs is not None and can_replay and graphs.can_run(context):
        graph_context = replace(context, cache=pool.full_cache() if next_pass.use_cache else None)
        logits, forward_counter = graphs.run(tokens, graph_context, cache_rows, rows)
    else:
        forward_counter = ExpertCounter()
        other_recorder = user_recorder if record_all else NULL_RECORDER
        pass_recorder = (
            RecorderGroup((forward_counter, user_recorder))
            if next_pass.kind == "decode"
            else other_recorder
        )
        pass_recorder.on_forward(rows)
        device_context = _to_device(replace(context, cache=cache(), recorder=pass_recorder), device)
        logits = transformer(tokens.to(device), device_context)
    # The one read that ends a step, whatever the number of rows.
    summary = ops.summarize_logits(logits, group[0].sequence.request.mask_id).to_host()
    if not bool(torch.isfinite(summary.logsumexp).all()):
        raise _non_finite_error(transformer, tokens, replace(context, cache=cache()))
    try:
        logits_positions = [_logits_positions(active, skip_unused=skip_unused) for active in group]
        updates = [
            _advance_sequence(transformer, active, positions, *logits_slice)
            for active, positions, logits_slice in zip(
                group,
                logits_positions,
                _split_logits(logits_positions, logits, summary),
                strict=True,
            )
        ]
    except NonFiniteLogitsError as error:
        raise _non_finite_error(transformer, tokens, replace(context, cache=cache())) from error
    if context.coresets is not None:
        for active, block, coresets in zip(
            group, blocks, context.coresets.current.unbind(1), strict=True
        ):
            active.coresets = block, coresets
    counter.merge(forward_counter)
    return updates


def _forward_inputs(
    group: Sequence[ActiveSequence], *, skip_unused: bool
) -> tuple[Tensor, ForwardContext]:
    """The tokens [B, W] and the step of a forward, on the host, without cache and recorder."""
    context = ForwardContext(
        window=_window(group),
        cache=None,
        policy=group[0].next_policy(),
        recorder=NULL_RECORDER,
        logits_indices=_logits_indices(group, skip_unused=skip_unused),
        voters=_voters(group),
        progress=_progress(group),
        forward=tuple(active.sequence.steps.total for active in group),
        embeddings=_embeddings(group),
    )
    return torch.stack([active.sequence.canvas.tokens[_span(active)] for active in group]), context


def _coresets(group: Sequence[ActiveSequence], transformer: Transformer) -> CoresetState | None:
    """What the rows' blocks had in the step before, on the device: it is never read here."""
    reuse_tolerance, spec = group[0].reuse_tolerance(), transformer.spec
    if reuse_tolerance is None:
        return None
    shape = (len(spec.moe_layers), spec.router.experts)
    no_coresets = torch.zeros(shape, dtype=torch.bool, device=transformer.device)
    previous = [
        no_coresets if (coresets := active.previous_coresets()) is None else coresets
        for active in group
    ]
    return CoresetState.of(reuse_tolerance, torch.stack(previous, dim=1))


def _non_finite_error(
    transformer: Transformer, tokens: Tensor, context: ForwardContext
) -> NonFiniteLogitsError:
    """What to raise over such a forward."""
    device = transformer.device
    source = _first_non_finite(transformer, tokens.to(device), _to_device(context, device))
    return NonFiniteLogitsError(f"{source} NaN or infinite numbers: no token was written")


def _to_device(context: ForwardContext, device: torch.device) -> ForwardContext:
    """The same step with what routing reads on the device. Windows stay: their reach is asked."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    progress = context.progress
    if progress is not None:
        progress = DecodeProgress(**{name: move(value) for name, value in vars(progress).items()})
    return replace(
        context,
        logits_indices=move(context.logits_indices),
        voters=move(context.voters),
        progress=progress,
    )


def _first_non_finite(transformer: Transformer, tokens: Tensor, context: ForwardContext) -> str:
    """Where numbers stop being finite: the same forward once more, watched."""
    trace, last = TensorRecorder(), transformer.spec.layers
    transformer(tokens, replace(context, recorder=trace))
    for layer, x in trace.outputs:
        if not bool(torch.isfinite(x).all()):
            names = {-1: "the embedding gives", last: "the last norm gives"}
            return names.get(layer, f"layer {layer} gives")
    return "the head gives"


def _split_logits(
    positions: Sequence[Tensor], logits: Tensor, summary: LogitsSummary | None
) -> Iterator[tuple[Tensor, LogitsSummary | None]]:
    first = 0
    for part in positions:
        rows = slice(first, first + len(part))
        yield logits[rows], None if summary is None else summary[rows]
        first = rows.stop


def _advance_sequence(
    transformer: Transformer,
    active: ActiveSequence,
    positions: Tensor,
    logits: Tensor,
    summary: LogitsSummary | None,
) -> BlockUpdate:
    """Give a row its logits ``at`` these positions; refresh what its masks are fed."""
    next_pass, sequence = active.next_pass, active.sequence
    if not next_pass.is_denoising:
        active.prefills += next_pass.kind == "prefill"
        active.commits += next_pass.kind == "commit"
        return sequence.receive(None)
    smooth = sequence.request.unmask.smooth
    if smooth is None or active.embeddings is None:
        return sequence.receive(logits, summary, positions - sequence.block.start)
    step, block = sequence.steps.total, sequence.block
    in_block = slice(block.start - next_pass.start, block.stop - next_pass.start)
    update = sequence.receive(logits[in_block], None if summary is None else summary[in_block])
    tokens = sequence.canvas.tokens[next_pass.start : next_pass.stop]
    embedded = transformer.embed(tokens.to(logits.device)[None])[0]
    expected = torch.softmax(logits, dim=-1).to(embedded.dtype) @ transformer.embedding
    masked = tokens == sequence.request.mask_id
    active.embeddings[next_pass.start : next_pass.stop] = smooth.mix_embeddings(
        embedded, expected, masked, step
    )
    return update


def _span(active: ActiveSequence) -> slice:
    return slice(active.next_pass.start, active.next_pass.stop)


def _logits_positions(active: ActiveSequence, *, skip_unused: bool) -> Tensor:
    """Positions [n] whose logits are used: of the block (``sparing``: those that can change
    something), or the window's where masks are fed them."""
    next_pass, block = active.next_pass, active.sequence.block
    if not next_pass.is_denoising:
        return torch.arange(0)
    if active.embeddings is not None:
        return torch.arange(next_pass.start, next_pass.stop)
    return (
        block.start + active.sequence.logits_indices()
        if skip_unused
        else torch.arange(block.start, block.stop)
    )


def _logits_indices(group: Sequence[ActiveSequence], *, skip_unused: bool) -> Tensor:
    """[P] int64 into B*width."""
    width = group[0].next_pass.width
    positions = (
        _logits_positions(active, skip_unused=skip_unused) - active.next_pass.start
        for active in group
    )
    return torch.cat([b * width + indices for b, indices in enumerate(positions)])


def _window(group: Sequence[ActiveSequence]) -> Window:
    passes = [active.next_pass for active in group]
    return Window(
        start=torch.tensor([next_pass.start for next_pass in passes]),
        width=passes[0].width,
        visible=torch.tensor([next_pass.visible for next_pass in passes]),
        block=passes[0].causal_block,
    )


def _voters(group: Sequence[ActiveSequence]) -> Tensor | None:
    """[B, width] fp32: the live block and what is computed anew beside it; None: all there is."""
    passes = [active.next_pass for active in group]
    if all(next_pass.voters == (next_pass.start, next_pass.stop) for next_pass in passes):
        return None
    rows = []
    for next_pass in passes:
        position = torch.arange(next_pass.start, next_pass.stop)
        first, last = next_pass.voters
        rows.append((position >= first) & (position < last))
    return torch.stack(rows).float()


def _progress(group: Sequence[ActiveSequence]) -> DecodeProgress:
    masked, filled, uncertainty = [], [], []
    for active in group:
        canvas, span = active.sequence.canvas, _span(active)
        masked.append(canvas.tokens[span] == canvas.mask_id)
        end = first_index_of(
            canvas.tokens[canvas.prompt_length :].tolist(), active.sequence.request.eos_ids
        )
        last = canvas.length if end is None else canvas.prompt_length + end
        filled.append(torch.arange(span.start, span.stop) > last)
        uncertainty.append(1.0 - canvas.confidence[span])
    return DecodeProgress(*(torch.stack(part) for part in (masked, filled, uncertainty)))


def _embeddings(group: Sequence[ActiveSequence]) -> Tensor | None:
    embeddings = [
        active.embeddings[_span(active)] for active in group if active.embeddings is not None
    ]
    return torch.stack(embeddings) if embeddings else None
