"""A policy replayed over a trace: whom each forward uses, and what must be moved for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.experts.eviction import Belady, Eviction
from coterie.experts.slots import Slots
from coterie.naming import CoterieError
from coterie.planning.coding import Mask
from coterie.planning.elections import elected, election_of, prefers_residents, votes_of
from coterie.planning.trace import Forward, Trace
from coterie.routing import spell
from coterie.routing.persistent import persisted
from coterie.values import Policy

Counts = NDArray[np.int64]
Votes = NDArray[np.float64]
Starts = Callable[[int], Eviction]

BATCH = 64  # forwards that elect together where they do not depend on each other


@dataclass(frozen=True)
class Memory:
    """What is not the policy's: votes of each forward, and which forwards were one."""

    trace: Trace
    votes: tuple[Votes, ...]  # of each forward, [L, E]
    passes: tuple[tuple[int, ...], ...]  # places of the rows that shared a forward

    @staticmethod
    def of(trace: Trace) -> Memory:
        """Raises CoterieError for a trace without a forward that decodes."""
        if not any(forward.kind == "decode" for forward in trace.forwards):
            raise CoterieError("the trace holds no forward that decodes")
        places = range(len(trace.forwards))
        shared = groupby(places, key=lambda place: trace.forwards[place].number)
        votes = tuple(votes_of(trace, forward) for forward in trace.forwards)
        return Memory(trace, votes, tuple(tuple(members) for _, members in shared))

    @property
    def mean_votes(self) -> Votes:
        """[L, E] of a forward: what a warm start begins with."""
        return np.mean(self.votes, axis=0)

    @property
    def decoding(self) -> Mask:
        """[P]: which forwards decode."""
        first = [self.trace.forwards[places[0]] for places in self.passes]
        return np.array([forward.kind == "decode" for forward in first])


@dataclass(frozen=True)
class Chosen:
    """Whom each row of each forward uses: [F, L, E]; and of how many (row, layer) it was kept from
    the step before, where there was one."""

    used: Mask
    kept: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Booked:
    """What one cache moves for one policy: experts used and loaded, [P, L], of each forward of all
    rows together."""

    chosen: Chosen
    used: Counts
    loads: Counts

    @property
    def hit_rate(self) -> float:
        return 1 - self.loads.sum() / max(1, self.used.sum())


@dataclass(frozen=True)
class Play:
    """A policy, how much of its votes a coreset may lose before a block moves on from it, and
    whether forwards that commit are routed by it too; the prompt's are as they were."""

    policy: Policy
    drift: float | None = None
    commits: bool = False

    def routes(self, forward: Forward) -> bool:
        """Whether this forward is the policy's to route."""
        return forward.kind == "decode" or (self.commits and forward.kind == "commit")

    def __str__(self) -> str:
        return spell(self.policy) + ("" if self.drift is None else f" --drift {self.drift:g}")


def choose(memory: Memory, play: Play, slots: int | None = None) -> Chosen:
    """Whom a policy uses that does not ask what is in fast memory, of which each layer has so many
    ``slots`` (None: for all)."""
    trace, layers = memory.trace, len(memory.trace.about.layers)
    used = np.stack([unrouted(forward) for forward in trace.forwards])
    for places in _elections(memory, play):
        forwards = [trace.forwards[place] for place in places]
        for ordinal in range(layers):
            found = elected(trace, play.policy, forwards, ordinal, slots=slots)
            used[list(places), ordinal] = found
    last, kept, steps = Remembered(play.drift), 0, 0
    for place, forward in enumerate(trace.forwards):
        used[place], stayed, came = last.settle(forward, used[place], memory.votes[place])
        kept, steps = kept + stayed, steps + came
    return Chosen(used, kept, steps)


def unrouted(forward: Forward) -> Mask:
    """[L, E]: who is used where the policy has no say."""
    return forward.own if forward.kind == "commit" else forward.used


@dataclass(frozen=True)
class Cache:
    """Slots of each layer and who leaves them; ``rule`` None is Belady's optimum.

    ``warm`` [L, E]: votes of earlier runs, whose best are there from the start.
    """

    rule: Eviction | None
    slots: int
    warm: Votes | None = None

    def over(self, experts: int, used: Sequence[Sequence[Mask]]) -> list[Slots]:
        """Of every layer; ``used`` tells of each what its forwards will use, for Belady alone."""
        rules = [self.rule or Belady.of(future) for future in used]
        warm = [None] * len(used) if self.warm is None else list(self.warm)
        return [
            Slots(experts, self.slots, rule, votes) for rule, votes in zip(rules, warm, strict=True)
        ]


def book(memory: Memory, play: Play, chosen: Chosen | None, cache: Cache) -> Booked:
    """Serve a policy's experts out of a cache.

    ``chosen`` is what ``choose`` gave, or None where a policy asks what is in fast memory; then
    the optimum is not defined, for nobody knows what will be used.
    """
    if chosen is None:
        return _book_residents(memory, play, cache)
    together = [_either(chosen.used, places) for places in memory.passes]
    layers, experts = len(memory.trace.about.layers), memory.trace.about.experts
    slots = cache.over(experts, [[used[layer] for used in together] for layer in range(layers)])
    loads = [
        _served(slots, used, _sum(memory, places))
        for places, used in zip(memory.passes, together, strict=True)
    ]
    return Booked(chosen, np.stack(together).sum(-1), np.array(loads))


@dataclass  # not frozen: it remembers
class Remembered:
    """The last coreset of every row, while its block lasts."""

    drift: float | None
    last: dict[int, tuple[int, Mask]] = field(default_factory=dict)

    def settle(self, forward: Forward, fresh: Mask, votes: Votes) -> tuple[Mask, int, int]:
        """[L, E] that is used in place of ``fresh``; layers that stayed, and layers that could."""
        block, before = self.last.get(forward.row, (None, fresh))
        if forward.kind != "decode":
            return fresh, 0, 0
        if self.drift is None or block != forward.block:
            self.last[forward.row] = (forward.block, fresh)
            return fresh, 0, 0
        arrays = (torch.from_numpy(np.ascontiguousarray(x)) for x in (before, fresh, votes))
        used = persisted(*arrays, drift=self.drift).numpy()
        self.last[forward.row] = (forward.block, used)
        return used, int((used == before).all(-1).sum()), len(used)


def _book_residents(memory: Memory, play: Play, cache: Cache) -> Booked:
    """As ``book``, forward by forward, each electing by what the one before has left."""
    trace = memory.trace
    slots = cache.over(trace.about.experts, [()] * len(trace.about.layers))
    chosen = np.stack([unrouted(forward) for forward in trace.forwards])
    loads, used = [], []
    last, kept, steps = Remembered(play.drift), 0, 0
    for places in memory.passes:
        forwards = [trace.forwards[place] for place in places]
        routed = [place for place in places if play.routes(trace.forwards[place])]
        for ours in _of_one_width(memory, routed):
            rows = [trace.forwards[place] for place in ours]
            for layer, here in enumerate(slots):
                chosen[ours, layer] = elected(
                    trace, play.policy, rows, layer, here.resident, slots=here.capacity
                )
        for place, forward in zip(places, forwards, strict=True):
            votes = memory.votes[place]
            chosen[place], stayed, came = last.settle(forward, chosen[place], votes)
            kept, steps = kept + stayed, steps + came
        together = _either(chosen, places)
        used.append(together.sum(-1))
        loads.append(_served(slots, together, _sum(memory, places)))
    return Booked(Chosen(chosen, kept, steps), np.array(used), np.array(loads))


def _served(slots: Sequence[Slots], used: Mask, votes: Votes) -> list[int]:
    """Experts that must come, of each layer, for these [L, E] to be used."""
    return [
        sum(len(wave.loads) for wave in here.serve(used[layer], votes[layer]))
        for layer, here in enumerate(slots)
    ]


def asks_residents(play: Play) -> bool:
    return prefers_residents(play.policy)


def asks_slots(play: Play) -> bool:
    """Whether it elects otherwise where fast memory has room for others."""
    return election_of(play.policy).most == "slots"


def _either(used: Mask, places: Sequence[int]) -> Mask:
    """[L, E]: who is used by any of these rows."""
    return np.logical_or.reduce(used[list(places)], axis=0)


def _sum(memory: Memory, places: Sequence[int]) -> Votes:
    return np.sum([memory.votes[place] for place in places], axis=0)


def _elections(memory: Memory, play: Play) -> Iterator[Sequence[int]]:
    """Places of forwards that may elect in one call: of one width; where rows elect jointly, those
    that shared a forward."""
    forwards = memory.trace.forwards
    if election_of(play.policy).scope == "batch":
        yield from (places for places in memory.passes if play.routes(forwards[places[0]]))
        return
    routed = [place for place, forward in enumerate(forwards) if play.routes(forward)]
    for ours in _of_one_width(memory, routed):
        yield from (ours[at : at + BATCH] for at in range(0, len(ours), BATCH))


def _of_one_width(memory: Memory, places: Sequence[int]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for place in places:
        found.setdefault(memory.trace.forwards[place].tokens, []).append(place)
    return list(found.values())
