"""What happened in a forward: a recorder is shown it, keeps tensors, and reads them later."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from coterie.values import Routing, Scores, expert_mask

RowId = Hashable


class Recorder(Protocol):
    """Looks on. Nothing here may change what is computed, or wait for the device."""

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        """A forward over these rows starts; what is shown before the next ``began`` is theirs."""
        ...

    def on_moe_input(self, layer: int, x: Tensor) -> None:
        """x [S, N, H] that a layer's gate and experts read; ``routed`` follows."""
        ...

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        """What a layer's gate thought of S rows, and what came of it."""
        ...

    def on_layer_output(self, layer: int, x: Tensor) -> None:
        """x [B, W, H] after a layer; before the first (-1), and [P, H] as the head reads it."""
        ...


@dataclass(frozen=True)
class NullRecorder:
    """Records nothing."""

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        del rows

    def on_moe_input(self, layer: int, x: Tensor) -> None:
        del layer, x

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        del layer, scores, routing

    def on_layer_output(self, layer: int, x: Tensor) -> None:
        del layer, x


@dataclass(frozen=True)
class RecorderGroup:
    """Shows each recorder everything, in order."""

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
    """The experts one row used, over the forwards that were shown; means are over forwards."""

    forwards: int
    layers: tuple[int, ...]  # those that route
    per_layer: tuple[float, ...]  # unique experts of each of these layers
    mean: float
    max: int
    vanilla_per_layer: tuple[float, ...]  # what the unmodified model uses on the same scores
    vanilla_mean: float
    vote_mass_kept: float  # masked votes for the experts used / all masked votes
    hit_rate: float  # share of the voters' own choices that they kept
    coreset_steps: int  # layers of a block's later steps, which could keep a coreset
    coreset_reuse_rate: float | None  # of these, the share that did; None where none could
    reuse_vote_loss: (
        float | None
    )  # mean share of a fresh coreset's votes lost by that; 0 where it moved


@dataclass(frozen=True)
class _LayerRouting:
    """What a layer leaves behind of a forward until it is counted: small, whatever it scored."""

    layer: int
    experts: int
    topk_ids: Tensor  # [S, N, k]
    vanilla_ids: Tensor  # [S, N, k]
    votes: Tensor  # [S, N, k]: the router's probability of ``own``
    voters: Tensor | None  # [S, N]
    reuse: Tensor | None  # [S, 3] fp64: whether a coreset could stay, whether it did, votes lost

    def batch_key(self) -> tuple[object, ...]:
        """Equal for layers that can be counted together."""
        return (
            self.topk_ids.shape,
            self.vanilla_ids.shape,
            self.experts,
            self.voters is None,
            self.reuse is None,
        )


LayerStats = tuple[tuple[int, ...], Tensor]
"""Layers of one forward, and their figures [L, 9]."""


@dataclass  # not frozen: it gathers
class ExpertCounter:
    """Counts experts row by row. Show it decoding forwards only; reading waits for the device.

    A forward's layers are counted together, once it is over or somebody asks.
    """

    _rows: tuple[RowId, ...] = ()
    _pending: list[_LayerRouting] = field(default_factory=list)
    _stats: dict[RowId, list[LayerStats]] = field(default_factory=dict)

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        self._flush()
        self._rows = rows

    def on_moe_input(self, layer: int, x: Tensor) -> None:
        del layer, x

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        if self._pending and layer <= self._pending[-1].layer:
            self._flush()
        self._pending.append(_layer_routing(layer, scores, routing))

    def on_layer_output(self, layer: int, x: Tensor) -> None:
        del layer, x

    def counts(self, row: RowId = 0) -> ExpertCounts:
        """The counts of one row; all zero (and vote mass 1) when it was never shown."""
        self._flush()
        layers: dict[int, list[list[float]]] = {}
        for layer, stats in _to_lists(self._stats.get(row, [])):
            layers.setdefault(layer, []).append(stats)
        return _summary(layers)

    def latest_counts(self, row: RowId = 0) -> ExpertCounts:
        """The counts of the last forward that was shown with this row."""
        self._flush()
        by_layer: dict[int, list[list[float]]] = {}
        for forward in reversed(self._stats.get(row, [])):
            if not by_layer.keys().isdisjoint(forward[0]):
                break
            by_layer |= {layer: [stats] for layer, stats in _to_lists([forward])}
        return _summary(by_layer)

    def merge(self, other: ExpertCounter) -> None:
        """Add what another was shown, such as a forward that has come out well."""
        self._flush()
        other._flush()
        for row, history in other._stats.items():
            self._stats.setdefault(row, []).extend(history)

    def cloned_for(self, rows: tuple[RowId, ...]) -> ExpertCounter:
        """What was shown of rows 0, 1, .. as if of these, in memory of its own."""
        self._flush()
        clone = ExpertCounter()
        for index, row in enumerate(rows):
            history = self._stats.get(index, [])
            clone._stats[row] = [(layers, stats.clone()) for layers, stats in history]
        return clone

    def drop_row(self, row: RowId) -> None:
        """Drop one row's counts."""
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


@dataclass  # not frozen: it gathers
class TensorRecorder:
    """Keeps every tensor it is shown, in order. For parity and studies: memory grows."""

    rows: list[tuple[RowId, ...]] = field(default_factory=list)
    routings: list[tuple[int, Scores, Routing]] = field(default_factory=list)
    outputs: list[tuple[int, Tensor]] = field(default_factory=list)
    inputs: list[tuple[int, Tensor]] = field(default_factory=list)  # of the layers that route

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        self.rows.append(rows)

    def on_moe_input(self, layer: int, x: Tensor) -> None:
        self.inputs.append((layer, x))

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        self.routings.append((layer, scores, routing))

    def on_layer_output(self, layer: int, x: Tensor) -> None:
        self.outputs.append((layer, x))


def routing_stats(scores: Scores, routing: Routing) -> Tensor:
    """[S, 6] float64 of each row: unique experts, vanilla's unique experts, votes for experts
    used, all votes, choices kept, all choices.

    Every position counts for the unique experts, for all are computed; votes and choices are those
    of the row's voters. Votes are ``masked`` ones: the router's probability of own experts.
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
    """See ``_Shown``; None where coresets are not kept."""
    reuse, previous = routing.coreset_reuse, scores.previous_coresets
    if reuse is None or previous is None:
        return None
    reusable = previous.coresets.any(-1)
    return torch.stack([reusable.double(), reuse.reused.double(), reuse.vote_loss], dim=-1)


def _batched_stats(records: Sequence[_LayerRouting]) -> Tensor:
    """[L * S, 9] of layers that are alike: see ``figures``, then ``_Shown.settled``."""
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
    voters = [record.voters for record in records if record.voters is not None]
    if voters:
        vote_weight = torch.cat(voters)
        votes, retained = (
            votes * vote_weight.unsqueeze(-1),
            retained & (vote_weight > 0).unsqueeze(-1),
        )
        choices = (vote_weight > 0).sum(1) * vanilla_ids.shape[-1]
    else:
        choices = torch.full(
            (len(vanilla_ids),),
            vanilla_ids.shape[1] * vanilla_ids.shape[2],
            device=vanilla_ids.device,
        )
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
    """The layers and numbers of many small tensors, in one wait for the device."""
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
