"""What happened in a forward: a recorder is shown it, keeps tensors, and reads them later."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from coterie.values import Routing, Scores, membership

Row = Hashable


class Recorder(Protocol):
    """Looks on. Nothing here may change what is computed, or wait for the device."""

    def began(self, rows: tuple[Row, ...]) -> None:
        """A forward over these rows starts; what is shown before the next ``began`` is theirs."""
        ...

    def fed(self, layer: int, x: Tensor) -> None:
        """x [S, N, H] that a layer's gate and experts read; ``routed`` follows."""
        ...

    def routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        """What a layer's gate thought of S rows, and what came of it."""
        ...

    def layer_output(self, layer: int, x: Tensor) -> None:
        """x [B, W, H] after a layer; before the first (-1), and [P, H] as the head reads it."""
        ...


@dataclass(frozen=True)
class Null:
    """Records nothing."""

    def began(self, rows: tuple[Row, ...]) -> None:
        del rows

    def fed(self, layer: int, x: Tensor) -> None:
        del layer, x

    def routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        del layer, scores, routing

    def layer_output(self, layer: int, x: Tensor) -> None:
        del layer, x


@dataclass(frozen=True)
class Together:
    """Shows each recorder everything, in order."""

    recorders: tuple[Recorder, ...]

    def began(self, rows: tuple[Row, ...]) -> None:
        for recorder in self.recorders:
            recorder.began(rows)

    def fed(self, layer: int, x: Tensor) -> None:
        for recorder in self.recorders:
            recorder.fed(layer, x)

    def routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        for recorder in self.recorders:
            recorder.routed(layer, scores, routing)

    def layer_output(self, layer: int, x: Tensor) -> None:
        for recorder in self.recorders:
            recorder.layer_output(layer, x)


@dataclass(frozen=True)
class Counts:
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
    coresets_kept: float | None  # of these, the share that did; None where none could
    drift: float | None  # mean share of a fresh coreset's votes lost by that; 0 where it moved


@dataclass(frozen=True)
class _Shown:
    """What a layer leaves behind of a forward until it is counted: small, whatever it scored."""

    layer: int
    experts: int
    ids: Tensor  # [S, N, k]
    own: Tensor  # [S, N, k]
    votes: Tensor  # [S, N, k]: the router's probability of ``own``
    voters: Tensor | None  # [S, N]
    settled: Tensor | None  # [S, 3] fp64: whether a coreset could stay, whether it did, votes lost

    def alike(self) -> tuple[object, ...]:
        """Equal for layers that can be counted together."""
        return (
            self.ids.shape,
            self.own.shape,
            self.experts,
            self.voters is None,
            self.settled is None,
        )


Figures = tuple[tuple[int, ...], Tensor]
"""Layers of one forward, and their figures [L, 9]."""


@dataclass  # not frozen: it gathers
class Counting:
    """Counts experts row by row. Show it decoding forwards only; reading waits for the device.

    A forward's layers are counted together, once it is over or somebody asks.
    """

    _rows: tuple[Row, ...] = ()
    _shown: list[_Shown] = field(default_factory=list)
    _seen: dict[Row, list[Figures]] = field(default_factory=dict)

    def began(self, rows: tuple[Row, ...]) -> None:
        self._settle()
        self._rows = rows

    def fed(self, layer: int, x: Tensor) -> None:
        del layer, x

    def routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        if self._shown and layer <= self._shown[-1].layer:
            self._settle()
        self._shown.append(_shown(layer, scores, routing))

    def layer_output(self, layer: int, x: Tensor) -> None:
        del layer, x

    def counts(self, row: Row = 0) -> Counts:
        """The counts of one row; all zero (and vote mass 1) when it was never shown."""
        self._settle()
        layers: dict[int, list[list[float]]] = {}
        for layer, figure in _read(self._seen.get(row, [])):
            layers.setdefault(layer, []).append(figure)
        return _summary(layers)

    def latest(self, row: Row = 0) -> Counts:
        """The counts of the last forward that was shown with this row."""
        self._settle()
        found: dict[int, list[list[float]]] = {}
        for seen in reversed(self._seen.get(row, [])):
            if not found.keys().isdisjoint(seen[0]):
                break
            found |= {layer: [figure] for layer, figure in _read([seen])}
        return _summary(found)

    def absorb(self, other: Counting) -> None:
        """Add what another was shown, such as a forward that has come out well."""
        self._settle()
        other._settle()
        for row, seen in other._seen.items():
            self._seen.setdefault(row, []).extend(seen)

    def renewed(self, rows: tuple[Row, ...]) -> Counting:
        """What was shown of rows 0, 1, .. as if of these, in memory of its own."""
        self._settle()
        fresh = Counting()
        for number, row in enumerate(rows):
            seen = self._seen.get(number, [])
            fresh._seen[row] = [(layers, figures.clone()) for layers, figures in seen]
        return fresh

    def forget(self, row: Row) -> None:
        """Drop one row's counts."""
        self._settle()
        self._seen.pop(row, None)

    def _settle(self) -> None:
        for _, group in groupby(self._shown, _Shown.alike):
            layers = list(group)
            each = _figures(layers).unflatten(0, (len(layers), -1))  # [L, S, 9]
            rows = self._rows or tuple(range(each.shape[1]))
            told = tuple(one.layer for one in layers)
            for row, figure in zip(rows, each.unbind(1), strict=True):
                self._seen.setdefault(row, []).append((told, figure))
        self._shown.clear()


@dataclass  # not frozen: it gathers
class Tracing:
    """Keeps every tensor it is shown, in order. For parity and studies: memory grows."""

    rows: list[tuple[Row, ...]] = field(default_factory=list)
    routings: list[tuple[int, Scores, Routing]] = field(default_factory=list)
    outputs: list[tuple[int, Tensor]] = field(default_factory=list)
    inputs: list[tuple[int, Tensor]] = field(default_factory=list)  # of the layers that route

    def began(self, rows: tuple[Row, ...]) -> None:
        self.rows.append(rows)

    def fed(self, layer: int, x: Tensor) -> None:
        self.inputs.append((layer, x))

    def routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        self.routings.append((layer, scores, routing))

    def layer_output(self, layer: int, x: Tensor) -> None:
        self.outputs.append((layer, x))


def figures(scores: Scores, routing: Routing) -> Tensor:
    """[S, 6] float64 of each row: unique experts, vanilla's unique experts, votes for experts
    used, all votes, choices kept, all choices.

    Every position counts for the unique experts, for all are computed; votes and choices are those
    of the row's voters. Votes are ``masked`` ones: the router's probability of own experts.
    """
    return _figures([_shown(scores.layer, scores, routing)])[:, :6]


def _shown(layer: int, scores: Scores, routing: Routing) -> _Shown:
    rows, tokens, experts = scores.logits.shape
    ids, own = (x.view(rows, tokens, -1) for x in (routing.ids, routing.own))
    votes = scores.probability.gather(-1, own)
    return _Shown(layer, experts, ids, own, votes, scores.voters, _settled(scores, routing))


def _settled(scores: Scores, routing: Routing) -> Tensor | None:
    """See ``_Shown``; None where coresets are not kept."""
    settled, incumbents = routing.settled, scores.incumbents
    if settled is None or incumbents is None:
        return None
    could = incumbents.coresets.any(-1)
    return torch.stack([could.double(), settled.kept.double(), settled.lost], dim=-1)


def _figures(shown: Sequence[_Shown]) -> Tensor:
    """[L * S, 9] of layers that are alike: see ``figures``, then ``_Shown.settled``."""
    experts = shown[0].experts
    ids, own, votes = (
        torch.cat(parts)
        for parts in zip(*((each.ids, each.own, each.votes) for each in shown), strict=True)
    )
    used, used_own = (membership(x.flatten(1), experts) for x in (ids, own))
    elected = used.gather(-1, own.flatten(1)).view(own.shape)
    kept = (own.unsqueeze(-1) == ids.unsqueeze(-2)).any(-1)
    voters = [each.voters for each in shown if each.voters is not None]
    if voters:
        voice = torch.cat(voters)
        votes, kept = votes * voice.unsqueeze(-1), kept & (voice > 0).unsqueeze(-1)
        choices = (voice > 0).sum(1) * own.shape[-1]
    else:
        choices = torch.full((len(own),), own.shape[1] * own.shape[2], device=own.device)
    columns = (
        used.sum(-1),
        used_own.sum(-1),
        (votes.double() * elected).sum((1, 2)),
        votes.double().sum((1, 2)),
        kept.sum((1, 2)),
        choices,
    )
    counted = torch.stack([column.double() for column in columns], dim=-1)
    settled = [each.settled for each in shown if each.settled is not None]
    stayed = torch.cat(settled) if settled else counted.new_zeros(len(counted), 3)
    return torch.cat([counted, stayed], dim=-1)


def _read(seen: Sequence[Figures]) -> Iterator[tuple[int, list[float]]]:
    """The layers and numbers of many small tensors, in one wait for the device."""
    layers = [layer for told, _ in seen for layer in told]
    numbers = torch.cat([figure for _, figure in seen]).tolist() if seen else []
    return zip(layers, numbers, strict=True)


def _summary(layers: dict[int, list[list[float]]]) -> Counts:
    ordered = sorted(layers)
    per_layer, vanilla = (
        tuple(_mean([figure[column] for figure in layers[layer]]) for layer in ordered)
        for column in (0, 1)
    )
    everything = [figure for layer in ordered for figure in layers[layer]]
    _, _, elected, votes, kept, choices, could, stayed, lost = (
        [sum(column) for column in zip(*everything, strict=True)] if everything else [0.0] * 9
    )
    return Counts(
        forwards=max((len(seen) for seen in layers.values()), default=0),
        layers=tuple(ordered),
        per_layer=per_layer,
        mean=_mean([figure[0] for figure in everything]),
        max=int(max((figure[0] for figure in everything), default=0)),
        vanilla_per_layer=vanilla,
        vanilla_mean=_mean([figure[1] for figure in everything]),
        vote_mass_kept=elected / votes if votes else 1.0,
        hit_rate=kept / choices if choices else 1.0,
        coreset_steps=int(could),
        coresets_kept=stayed / could if could else None,
        drift=lost / could if could else None,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
