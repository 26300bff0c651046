"""Recorders of what forwards route and compute, and counts of the experts that a row uses."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from coterie.values import Routing, Scores, expert_mask

RowId = Hashable


class Recorder:
    """Records nothing. A recorder is a subclass that overrides the hooks that it needs.

    A hook must not change what is computed and must not wait for the device.
    """

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        """A forward over these rows starts; calls up to the next ``on_forward`` belong to it."""

    def on_moe_input(self, layer: int, x: Tensor) -> None:
        """x [S, N, H] is the input of a layer's gate and experts; ``on_routed`` follows."""

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        """The scores of a layer's gate for S rows, and the routing that follows from them."""

    def on_layer_output(self, layer: int, x: Tensor) -> None:
        """x [B, W, H] after a layer, -1 being the embedding; or [P, H] as the head reads it."""


@dataclass(frozen=True)
class RecorderGroup(Recorder):
    """Calls each of several recorders, in order."""

    recorders: tuple[Recorder, ...]

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        for recorder in self.recorders:
            recorder.on_forward(rows)

    def on_moe_input(self, layer: int, x: Tensor) -> None:
        for recorder in self.recorders:
            recorder.on_moe_input(layer, x)

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        for recorder in self.recorders:
            recorder.on_routed(layer, scores, routing)

    def on_layer_output(self, layer: int, x: Tensor) -> None:
        for recorder in self.recorders:
            recorder.on_layer_output(layer, x)


@dataclass(frozen=True)
class ExpertCounts:
    """The experts that one row used in the recorded forwards; means are over forwards."""

    forwards: int
    layers: tuple[int, ...]  # layers that route
    per_layer: tuple[float, ...]  # unique experts of each of these layers
    mean: float
    max: int
    vanilla_per_layer: tuple[float, ...]  # of the unmodified model on the same scores
    vanilla_mean: float
    vote_mass_kept: float  # votes for the experts used / all votes
    hit_rate: float  # share of the voters' unmodified top-k that stays in their top-k
    coreset_steps: int  # layers of steps that had a previous coreset
    coreset_reuse_rate: float | None  # share of these that reused it; None if there were none
    reuse_vote_loss: float | None  # mean share of the fresh coreset's votes that reuse lost


@dataclass(frozen=True)
class _LayerRouting:
    """What counting needs of one layer of a forward. It is small: it holds no scores [S, N, E]."""

    layer: int
    experts: int
    topk_ids: Tensor  # [S, N, k]
    vanilla_ids: Tensor  # [S, N, k]
    votes: Tensor  # [S, N, k]: the router's probability of vanilla_ids
    voters: Tensor | None  # [S, N]
    reuse: Tensor | None  # [S, 3] fp64: had a previous coreset, reused it, share of votes lost

    def batch_key(self) -> tuple[object, ...]:
        """Equal for layers that can be counted in one batch."""
        return (
            self.topk_ids.shape,
            self.vanilla_ids.shape,
            self.experts,
            self.voters is None,
            self.reuse is None,
        )


LayerStats = tuple[tuple[int, ...], Tensor]
"""L layers of one forward, and their statistics [L, 9] (the columns of ``_batched_stats``)."""


@dataclass  # not frozen: it accumulates
class ExpertCounter(Recorder):
    """Counts experts row by row, in decoding forwards. Reading the counts waits for the device.

    The layers of a forward are counted in one batch, when the next forward starts or on reading.
    """

    _rows: tuple[RowId, ...] = ()
    _pending: list[_LayerRouting] = field(default_factory=list)
    _stats: dict[RowId, list[LayerStats]] = field(default_factory=dict)

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        self._flush()
        self._rows = rows

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        if self._pending and layer <= self._pending[-1].layer:
            self._flush()
        self._pending.append(_layer_routing(layer, scores, routing))

    def counts(self, row: RowId = 0) -> ExpertCounts:
        """The counts of one row; for an unknown row all zero, with vote mass and hit rate 1."""
        self._flush()
        layers: dict[int, list[list[float]]] = {}
        for layer, stats in _to_lists(self._stats.get(row, [])):
            layers.setdefault(layer, []).append(stats)
        return _summary(layers)

    def latest_counts(self, row: RowId = 0) -> ExpertCounts:
        """The counts of the last recorded forward of this row."""
        self._flush()
        by_layer: dict[int, list[list[float]]] = {}
        for forward in reversed(self._stats.get(row, [])):
            if not by_layer.keys().isdisjoint(forward[0]):
                break
            by_layer |= {layer: [stats] for layer, stats in _to_lists([forward])}
        return _summary(by_layer)

    def merge(self, other: ExpertCounter, rows: Iterable[RowId]) -> None:
        """Adds another counter's counts of some rows, such as those of a forward that succeeded."""
        self._flush()
        other._flush()
        for row in rows:
            history = other._stats.get(row, [])
            self._stats.setdefault(row, []).extend(history)

    def cloned_for(self, rows: tuple[RowId, ...]) -> ExpertCounter:
        """A copy in which the counts of rows 0, 1, .. belong to these rows."""
        self._flush()
        clone = ExpertCounter()
        for index, row in enumerate(rows):
            history = self._stats.get(index, [])
            clone._stats[row] = [(layers, stats.clone()) for layers, stats in history]
        return clone

    def drop_row(self, row: RowId) -> None:
        """Drops one row's counts."""
        self._flush()
        self._stats.pop(row, None)

    def _flush(self) -> None:
        for _, group in groupby(self._pending, _LayerRouting.batch_key):
            layers = list(group)
            stats = _batched_stats(layers).unflatten(0, (len(layers), -1))  # [L, S, 9]
            rows = self._rows or tuple(range(stats.shape[1]))
            layer_indices = tuple(record.layer for record in layers)
            for row, row_stats in zip(rows, stats.unbind(1), strict=True):
                self._stats.setdefault(row, []).append((layer_indices, row_stats))
        self._pending.clear()


@dataclass  # not frozen: it accumulates
class TensorRecorder(Recorder):
    """Keeps every tensor, in order. For parity and studies: memory grows with each forward."""

    rows: list[tuple[RowId, ...]] = field(default_factory=list)
    routings: list[tuple[int, Scores, Routing]] = field(default_factory=list)
    outputs: list[tuple[int, Tensor]] = field(default_factory=list)
    inputs: list[tuple[int, Tensor]] = field(default_factory=list)

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        self.rows.append(rows)

    def on_moe_input(self, layer: int, x: Tensor) -> None:
        self.inputs.append((layer, x))

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        self.routings.append((layer, scores, routing))

    def on_layer_output(self, layer: int, x: Tensor) -> None:
        self.outputs.append((layer, x))


def routing_stats(scores: Scores, routing: Routing) -> Tensor:
    """[S, 6] float64 of each row: unique experts, unique experts of the unmodified model, votes for
    used experts, all votes, top-k ids that routing keeps, all top-k ids.

    Unique experts count every position, because all are computed; the other columns count voters
    only. A vote is the router's probability of a token's own expert.
    """
    return _batched_stats([_layer_routing(scores.layer, scores, routing)])[:, :6]


def _layer_routing(layer: int, scores: Scores, routing: Routing) -> _LayerRouting:
    rows, tokens, experts = scores.logits.shape
    topk_ids, vanilla_ids = (
        x.view(rows, tokens, -1) for x in (routing.topk_ids, routing.vanilla_ids)
    )
    votes = scores.probability.gather(-1, vanilla_ids)
    return _LayerRouting(
        layer, experts, topk_ids, vanilla_ids, votes, scores.voters, _reuse_stats(scores, routing)
    )


def _reuse_stats(scores: Scores, routing: Routing) -> Tensor | None:
    """The ``reuse`` of ``_LayerRouting``; None if coresets are not reused."""
    reuse, previous = routing.coreset_reuse, scores.previous_coresets
    if reuse is None or previous is None:
        return None
    reusable = previous.coresets.any(-1)
    return torch.stack([reusable.double(), reuse.reused.double(), reuse.vote_loss], dim=-1)


def _batched_stats(records: Sequence[_LayerRouting]) -> Tensor:
    """[L * S, 9] of layers with one batch key: ``routing_stats``, then ``_LayerRouting.reuse``."""
    experts = records[0].experts
    topk_ids, vanilla_ids, votes = (
        torch.cat(parts)
        for parts in zip(
            *((record.topk_ids, record.vanilla_ids, record.votes) for record in records),
            strict=True,
        )
    )
    used, vanilla_used = (expert_mask(x.flatten(1), experts) for x in (topk_ids, vanilla_ids))
    covered = used.gather(-1, vanilla_ids.flatten(1)).view(vanilla_ids.shape)
    retained = (vanilla_ids.unsqueeze(-1) == topk_ids.unsqueeze(-2)).any(-1)
    choices = votes.new_full((len(votes),), votes[0].numel())
    voters = [record.voters for record in records if record.voters is not None]
    if voters:
        vote_weight = torch.cat(voters)
        can_vote = vote_weight > 0
        votes = votes * vote_weight.unsqueeze(-1)
        retained &= can_vote.unsqueeze(-1)
        choices = can_vote.sum(1) * vanilla_ids.shape[-1]
    columns = (
        used.sum(-1),
        vanilla_used.sum(-1),
        (votes.double() * covered).sum((1, 2)),
        votes.double().sum((1, 2)),
        retained.sum((1, 2)),
        choices,
    )
    counts = torch.stack([column.double() for column in columns], dim=-1)
    reuse = [record.reuse for record in records if record.reuse is not None]
    reuse_stats = torch.cat(reuse) if reuse else counts.new_zeros(len(counts), 3)
    return torch.cat([counts, reuse_stats], dim=-1)


def _to_lists(forwards: Sequence[LayerStats]) -> Iterator[tuple[int, list[float]]]:
    """Each layer with its statistics, after one wait for the device."""
    layers = [layer for layer_indices, _ in forwards for layer in layer_indices]
    rows = torch.cat([stats for _, stats in forwards]).tolist() if forwards else []
    return zip(layers, rows, strict=True)


def _summary(layers: dict[int, list[list[float]]]) -> ExpertCounts:
    ordered = sorted(layers)
    per_layer, vanilla = (
        tuple(_mean([stats[column] for stats in layers[layer]]) for layer in ordered)
        for column in (0, 1)
    )
    all_stats = [stats for layer in ordered for stats in layers[layer]]
    _, _, covered, votes, retained, choices, reusable, reused, vote_loss = (
        [sum(column) for column in zip(*all_stats, strict=True)] if all_stats else [0.0] * 9
    )
    return ExpertCounts(
        forwards=max((len(history) for history in layers.values()), default=0),
        layers=tuple(ordered),
        per_layer=per_layer,
        mean=_mean([stats[0] for stats in all_stats]),
        max=int(max((stats[0] for stats in all_stats), default=0)),
        vanilla_per_layer=vanilla,
        vanilla_mean=_mean([stats[1] for stats in all_stats]),
        vote_mass_kept=covered / votes if votes else 1.0,
        hit_rate=retained / choices if choices else 1.0,
        coreset_steps=int(reusable),
        coreset_reuse_rate=reused / reusable if reusable else None,
        reuse_vote_loss=vote_loss / reusable if reusable else None,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
