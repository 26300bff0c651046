"""The inputs of one forward over a group of sequences.

Shapes: B sequences, W positions of the window, L MoE layers, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.decoding.sequence import first_index_of
from coterie.engine.active_sequence import ActiveSequence
from coterie.model.forward_context import CoresetState, ForwardContext
from coterie.model.transformer import Transformer
from coterie.values import DecodeProgress, Window

PROGRESS_FIELDS = tuple(vars(DecodeProgress()))


@dataclass(frozen=True)
class ForwardBatch:
    """One forward of sequences that ``group_sequences`` put together.

    Tensors are on the host, except previous coresets and embeddings. ``context`` has no KV cache
    and no recorder yet. ``positions`` [n] of each sequence are those that get logits.
    """

    sequences: Sequence[ActiveSequence]
    tokens: Tensor  # [B, W]
    context: ForwardContext
    positions: Sequence[Tensor]

    @staticmethod
    def of(
        group: Sequence[ActiveSequence], transformer: Transformer, *, skip_unused: bool
    ) -> ForwardBatch:
        """The batch of a group; ``skip_unused`` omits logits that cannot change the block."""
        positions = [_logits_positions(active, skip_unused=skip_unused) for active in group]
        context = ForwardContext(
            window=_window(group),
            cache=None,
            policy=group[0].next_policy(),
            committed=group[0].next_pass.committed,
            commit_policy=group[0].commit_policy(),
            logits_indices=_logits_indices(group, positions),
            voters=_voters(group),
            progress=_progress(group),
            forward=tuple(active.sequence.steps.total for active in group),
            coresets=_coresets(group, transformer),
            embeddings=_embeddings(group),
            expected=_expected(group),
            encodes=not any(active.next_pass.is_denoising for active in group),
        )
        tokens = torch.stack([active.sequence.input_tokens(active.next_pass) for active in group])
        return ForwardBatch(group, tokens, context, positions)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(active.number for active in self.sequences)

    @property
    def cache_rows(self) -> list[int]:
        return [active.cache_row for active in self.sequences]

    @property
    def decode_rows(self) -> tuple[int, ...]:
        """The rows of decode forwards; others may be commits."""
        return tuple(each.number for each in self.sequences if each.next_pass.kind == "decode")

    @property
    def uses_cache(self) -> bool:
        return self.sequences[0].next_pass.use_cache


def to_device(context: ForwardContext, device: torch.device) -> ForwardContext:
    """The context with routing's inputs on the device; the window stays on the host."""
    tensors = {name: tensor.to(device) for name, tensor in routing_inputs(context).items()}
    return with_routing_inputs(context, tensors)


def routing_inputs(context: ForwardContext) -> dict[str, Tensor]:
    """The tensors of a context, except the window's and those that are on the device."""
    tensors = {"logits_indices": context.logits_indices, "voters": context.voters}
    tensors |= vars(context.progress or DecodeProgress())
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def with_routing_inputs(context: ForwardContext, tensors: Mapping[str, Tensor]) -> ForwardContext:
    """The context with these tensors in place of its ``routing_inputs``."""
    return replace(
        context,
        logits_indices=tensors.get("logits_indices"),
        voters=tensors.get("voters"),
        progress=DecodeProgress(**{name: tensors.get(name) for name in PROGRESS_FIELDS}),
    )


def _logits_positions(active: ActiveSequence, *, skip_unused: bool) -> Tensor:
    """The canvas positions [n] that need logits."""
    next_pass, sequence = active.next_pass, active.sequence
    if not next_pass.is_denoising:
        return torch.arange(0)
    computed = next_pass.positions
    # Smoothed masks mix the expected embedding of every position of the window.
    if active.embeddings is not None:
        return computed
    in_block = computed[sequence.block.contains(computed)]
    return sequence.logits_positions(in_block) if skip_unused else in_block


def _logits_indices(group: Sequence[ActiveSequence], positions: Sequence[Tensor]) -> Tensor:
    """The same positions as indices [P] int64 into the flattened B*W."""
    passes = [active.next_pass for active in group]
    parts = zip(passes, positions, strict=True)
    return torch.cat(
        [
            row * each.width + torch.searchsorted(each.positions, part)
            for row, (each, part) in enumerate(parts)
        ]
    )


def _window(group: Sequence[ActiveSequence]) -> Window:
    passes = [active.next_pass for active in group]
    skips = any(next_pass.skipped for next_pass in passes)
    return Window(
        start=torch.tensor([next_pass.start for next_pass in passes]),
        width=passes[0].width,
        visible=torch.tensor([next_pass.visible for next_pass in passes]),
        block=passes[0].causal_block,
        positions=torch.stack([each.positions for each in passes]) if skips else None,
    )


def _voters(group: Sequence[ActiveSequence]) -> Tensor | None:
    """[B, W] fp32: 1 where a position may vote; None if all positions may."""
    passes = [active.next_pass for active in group]
    if all(next_pass.voters == (next_pass.start, next_pass.stop) for next_pass in passes):
        return None
    masks = []
    for next_pass in passes:
        position = next_pass.positions
        first, last = next_pass.voters
        masks.append((position >= first) & (position < last))
    return torch.stack(masks).float()


def _progress(group: Sequence[ActiveSequence]) -> DecodeProgress:
    masked, after_eos, uncertainty = [], [], []
    for active in group:
        canvas, positions = active.sequence.canvas, active.next_pass.positions
        masked.append(canvas.tokens[positions] == canvas.mask_id)
        answer = canvas.tokens[canvas.prompt_length :].tolist()
        end = first_index_of(answer, active.sequence.request.eos_ids)
        last = canvas.length if end is None else canvas.prompt_length + end
        after_eos.append(positions > last)
        uncertainty.append(1.0 - canvas.confidence[positions])
    return DecodeProgress(*(torch.stack(part) for part in (masked, after_eos, uncertainty)))


def _coresets(group: Sequence[ActiveSequence], transformer: Transformer) -> CoresetState | None:
    """The blocks' previous coresets, on the device; all-false where a block has none."""
    reuse_tolerance, spec = group[0].reuse_tolerance(), transformer.spec
    if reuse_tolerance is None:
        return None
    shape = (len(spec.moe_layers), spec.router.experts)
    empty = torch.zeros(shape, dtype=torch.bool, device=transformer.device)
    previous = [active.previous_coresets() for active in group]
    stacked = torch.stack([empty if part is None else part for part in previous], dim=1)
    return CoresetState.of(reuse_tolerance, stacked)


def _expected(group: Sequence[ActiveSequence]) -> Tensor | None:
    """Expected embeddings [B, W, H] on the device, 0 in first steps; None if all are 0."""
    if not group[0].next_pass.is_denoising:
        return None
    expected = [active.previous_expected() for active in group]
    given = next((part for part in expected if part is not None), None)
    if given is None:
        return None
    return torch.stack([torch.zeros_like(given) if part is None else part for part in expected])


def _embeddings(group: Sequence[ActiveSequence]) -> Tensor | None:
    embeddings = [
        active.embeddings[active.next_pass.positions.to(active.embeddings.device)]
        for active in group
        if active.embeddings is not None
    ]
    return torch.stack(embeddings) if embeddings else None
