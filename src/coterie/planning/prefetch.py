"""What bringing experts before anybody asks for them would save, replayed over a trace.

Some of a layer's slots become a shelf for those who are guessed to come: they are brought while the
layer before computes, for as long as the link has nothing else to do, so that they delay nobody.
Who is asked for and lies there moves over into the layer's slots; who is not makes room for the
next guess. Nothing of this is in the engine: this is how it was decided not to be
(docs/decisions/0013-experts-come-when-they-are-asked-for.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.experts.eviction import Lru
from coterie.experts.slots import Slots
from coterie.planning.booking import (
    SelectedExperts,
    CountArray,
    TraceVotes,
    ReplayPolicy,
    recorded_experts,
)
from coterie.planning.coding import Mask
from coterie.planning.elections import select_from_trace
from coterie.planning.machine import HardwareModel, predict_seconds

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Moment:
    """What is known before a layer is asked: ``forward`` and ``layer`` by their places."""

    forward: int
    layer: int
    votes: Numbers  # [E] of the layer, in the forward before; zeros before the first
    before: (
        Mask  # [E] whom the layer before uses, in this forward; the last layer's, in the one before
    )


class Guess(Protocol):
    """Who will be asked for, as numbers [E]: the greatest first, nobody at 0."""

    def foresee(self, moment: Moment) -> Numbers: ...

    def learn(self, moment: Moment, used: Mask) -> None:
        """What came of it."""
        ...


@dataclass(frozen=True)
class Nobody:
    """No guess: every expert comes when it is asked for."""

    def foresee(self, moment: Moment) -> Numbers:
        return np.zeros(len(moment.votes))

    def learn(self, moment: Moment, used: Mask) -> None:
        del moment, used


@dataclass(frozen=True)
class Voted:
    """Who had votes in this layer lately; a vote counts ``decay`` of itself a forward later."""

    decay: float
    sums: dict[int, Numbers] = field(default_factory=dict)

    def foresee(self, moment: Moment) -> Numbers:
        before = self.sums.get(moment.layer, np.zeros(len(moment.votes)))
        self.sums[moment.layer] = before * self.decay + moment.votes
        return self.sums[moment.layer]

    def learn(self, moment: Moment, used: Mask) -> None:
        del moment, used


@dataclass(frozen=True)
class Together:
    """Who was used together with those that the layer before uses now, as often as it was."""

    counts: dict[int, Numbers] = field(default_factory=dict)  # [E before, E] by layer

    def foresee(self, moment: Moment) -> Numbers:
        counts = self.counts.get(moment.layer)
        if counts is None:
            return np.zeros(len(moment.votes))
        return counts[moment.before].sum(0) / max(1, int(moment.before.sum()))

    def learn(self, moment: Moment, used: Mask) -> None:
        count = len(used)
        counts = self.counts.setdefault(moment.layer, np.zeros((count, count)))
        counts += np.outer(moment.before, used)


@dataclass(frozen=True)
class Told:
    """What somebody has worked out beforehand: [F, L, E]."""

    table: Numbers

    def foresee(self, moment: Moment) -> Numbers:
        return self.table[moment.forward, moment.layer]

    def learn(self, moment: Moment, used: Mask) -> None:
        del moment, used


@dataclass(frozen=True)
class Ahead:
    """What became of a play: experts used, those of them that were waited for, and all that came
    before they were asked for; [P, L] each. Who was ``useful`` was asked for afterwards."""

    used: CountArray
    waited: CountArray
    early: CountArray
    useful: CountArray
    seconds: float  # of all forwards

    @property
    def moved(self) -> int:
        return int(self.waited.sum() + self.early.sum())


def play_ahead(
    memory: TraceVotes,
    play: ReplayPolicy,
    chosen: SelectedExperts | None,
    guess: Guess,
    *,
    slots: int,
    shelf: int,
    machine: HardwareModel,
    size: int,
) -> Ahead:
    """Every forward of a trace of single rows; ``chosen`` None for a policy that asks who is there.

    ``shelf`` of a layer's ``slots`` hold who is guessed, so that memory is the same without.
    """
    trace, experts = memory.trace, memory.trace.header.experts
    layers = len(trace.header.layers)
    books = [Slots(experts, slots - shelf, Lru()) for _ in range(layers)]
    shelves: list[set[int]] = [set() for _ in range(layers)]
    used, waited, early, useful = (
        np.zeros((len(trace.forwards), layers), np.int64) for _ in "4444"
    )
    idle, before, total = 0.0, np.zeros(experts, dtype=bool), 0.0
    for at, forward in enumerate(trace.forwards):
        for layer in range(layers):
            votes = memory.votes[at - 1][layer] if at else np.zeros(experts)
            moment = Moment(at, layer, votes, before)
            room = min(shelf, int(idle * machine.link_bandwidth / size))
            found = foreseen(guess.foresee(moment), books[layer].resident, shelf)
            shelves[layer], came = brought(shelves[layer], found, room, shelf)
            early[at, layer] = came
            here = books[layer].resident
            here[list(shelves[layer])] = True
            if chosen is not None:
                wanted = chosen.used[at, layer]
            elif play.routes(forward):
                wanted = select_from_trace(trace, play.policy, [forward], layer, here)[0]
            else:
                wanted = recorded_experts(forward)[layer]
            loads = {one for wave in books[layer].serve(wanted) for one, _ in wave.loads}
            useful[at, layer] = len(loads & shelves[layer])
            used[at, layer] = wanted.sum()
            waited[at, layer] = len(loads) - useful[at, layer]
            shelves[layer] -= loads
            guess.learn(moment, wanted)
            took, idle = layer_time(machine, used[at, layer], waited[at, layer], size, layers)
            before, total = wanted, total + took
    return Ahead(used, waited, early, useful, total)


def foreseen(scores: Numbers, resident: Mask, many: int) -> list[int]:
    """The ``many`` likeliest of those who are not in the slots."""
    scores = np.where(resident, 0.0, scores)
    order = np.lexsort((np.arange(len(scores)), -scores))[:many]
    return [int(one) for one in order if scores[one] > 0]


def brought(lie: set[int], wanted: list[int], room: int, places: int) -> tuple[set[int], int]:
    """Who lies on a shelf of so many places once ``room`` of those who are wanted have come, the
    likeliest first, and how many did. Others stay while nobody needs their place."""
    coming = [one for one in wanted if one not in lie][:room]
    kept = {one for one in wanted if one in lie} | set(coming)
    others = sorted(lie - kept)[: places - len(kept)]
    return kept | set(others), len(coming)


def layer_time(
    machine: HardwareModel, used: int, waited: int, size: int, layers: int
) -> tuple[float, float]:
    """Seconds of a layer, and for how many of them the link has nothing to do."""
    whole, _ = predict_seconds(machine, np.array([[used]]), np.array([[waited]]), size)
    took = float(whole[0]) - machine.other_seconds * (1 - 1 / layers)
    copying = waited * size / machine.link_bandwidth + (waited > 0) * machine.transfer_latency
    return took, max(0.0, took - copying)
