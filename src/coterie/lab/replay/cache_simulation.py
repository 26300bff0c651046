"""A policy replayed over a trace: whom each forward uses, and what must be moved for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.errors import CoterieError
from coterie.lab.replay.bit_packing import Mask
from coterie.lab.replay.policies import (
    election_of,
    forward_votes,
    prefers_residents,
    select_from_trace,
)
from coterie.lab.replay.trace import Trace, TraceForward
from coterie.offload.eviction import Belady, Eviction
from coterie.offload.slot_table import Slots
from coterie.routing import format_policy
from coterie.routing.reuse import reuse_masks
from coterie.values import Policy

CountArray = NDArray[np.int64]
VoteArray = NDArray[np.float64]
EvictionFactory = Callable[[int], Eviction]

FORWARDS_PER_ELECTION = 64  # forwards that elect together where they do not depend on each other


@dataclass(frozen=True)
class TraceVotes:
    """What is not the policy's: votes of each forward, and which forwards were one."""

    trace: Trace
    votes: tuple[VoteArray, ...]  # of each forward, [L, E]
    passes: tuple[tuple[int, ...], ...]  # places of the rows that shared a forward

    @staticmethod
    def of(trace: Trace) -> TraceVotes:
        """Raises CoterieError for a trace without a forward that decodes."""
        if not any(forward.kind == "decode" for forward in trace.forwards):
            raise CoterieError("the trace holds no forward that decodes")
        indices = range(len(trace.forwards))
        groups = groupby(indices, key=lambda place: trace.forwards[place].number)
        votes = tuple(forward_votes(trace, forward) for forward in trace.forwards)
        return TraceVotes(trace, votes, tuple(tuple(members) for _, members in groups))

    @property
    def mean_votes(self) -> VoteArray:
        """[L, E] of a forward: what a warm start begins with."""
        return np.mean(self.votes, axis=0)

    @property
    def is_decode(self) -> Mask:
        """[P]: which forwards decode."""
        first_forwards = [self.trace.forwards[indices[0]] for indices in self.passes]
        return np.array([forward.kind == "decode" for forward in first_forwards])


@dataclass(frozen=True)
class SelectedExperts:
    """Whom each row of each forward uses: [F, L, E]; and of how many (row, layer) it was kept from
    the step before, where there was one."""

    used: Mask
    reused: int = 0
    reusable: int = 0


@dataclass(frozen=True)
class CacheReplay:
    """What one cache moves for one policy: experts used and loaded, [P, L], of each forward of all
    rows together."""

    selected: SelectedExperts
    used: CountArray
    loads: CountArray

    @property
    def hit_rate(self) -> float:
        return 1 - self.loads.sum() / max(1, self.used.sum())


@dataclass(frozen=True)
class ReplayPolicy:
    """A policy, how much of its votes a coreset may lose before a block moves on from it, and
    whether forwards that commit are routed by it too; the prompt's are as they were."""

    policy: Policy
    reuse_tolerance: float | None = None
    routes_commits: bool = False

    def routes(self, forward: TraceForward) -> bool:
        """Whether this forward is the policy's to route."""
        return forward.kind == "decode" or (self.routes_commits and forward.kind == "commit")

    def __str__(self) -> str:
        return format_policy(self.policy) + (
            "" if self.reuse_tolerance is None else f" --drift {self.reuse_tolerance:g}"
        )


def select_experts(
    trace_votes: TraceVotes, replay_policy: ReplayPolicy, slots: int | None = None
) -> SelectedExperts:
    """Whom a policy uses that does not ask what is in fast memory, of which each layer has so many
    ``slots`` (None: for all)."""
    trace, layers = trace_votes.trace, len(trace_votes.trace.header.layers)
    used = np.stack([recorded_experts(forward) for forward in trace.forwards])
    for indices in _election_batches(trace_votes, replay_policy):
        forwards = [trace.forwards[index] for index in indices]
        for ordinal in range(layers):
            selected = select_from_trace(
                trace, replay_policy.policy, forwards, ordinal, slots=slots
            )
            used[list(indices), ordinal] = selected
    history, reused, reusable = CoresetHistory(replay_policy.reuse_tolerance), 0, 0
    for index, forward in enumerate(trace.forwards):
        used[index], newly_reused, newly_reusable = history.reuse(
            forward, used[index], trace_votes.votes[index]
        )
        reused, reusable = reused + newly_reused, reusable + newly_reusable
    return SelectedExperts(used, reused, reusable)


def recorded_experts(forward: TraceForward) -> Mask:
    """[L, E]: who is used where the policy has no say."""
    return forward.vanilla_mask if forward.kind == "commit" else forward.used


@dataclass(frozen=True)
class CacheConfig:
    """Slots of each layer and who leaves them; ``rule`` None is Belady's optimum.

    ``warm`` [L, E]: votes of earlier runs, whose best are there from the start.
    """

    eviction: Eviction | None
    slots: int
    warm: VoteArray | None = None

    def make_slots(self, experts: int, used: Sequence[Sequence[Mask]]) -> list[Slots]:
        """Of every layer; ``used`` tells of each what its forwards will use, for Belady alone."""
        evictions = [self.eviction or Belady.from_uses(future) for future in used]
        warm = [None] * len(used) if self.warm is None else list(self.warm)
        return [
            Slots(experts, self.slots, eviction, votes)
            for eviction, votes in zip(evictions, warm, strict=True)
        ]


def replay_cache(
    trace_votes: TraceVotes,
    replay_policy: ReplayPolicy,
    selected: SelectedExperts | None,
    cache: CacheConfig,
) -> CacheReplay:
    """Serve a policy's experts out of a cache.

    ``chosen`` is what ``choose`` gave, or None where a policy asks what is in fast memory; then
    the optimum is not defined, for nobody knows what will be used.
    """
    if selected is None:
        return _replay_resident_aware(trace_votes, replay_policy, cache)
    pass_used = [_union_of_rows(selected.used, indices) for indices in trace_votes.passes]
    layers, experts = len(trace_votes.trace.header.layers), trace_votes.trace.header.experts
    slots = cache.make_slots(
        experts, [[used[layer] for used in pass_used] for layer in range(layers)]
    )
    loads = [
        _count_loads(slots, used, _sum_of_votes(trace_votes, indices))
        for indices, used in zip(trace_votes.passes, pass_used, strict=True)
    ]
    return CacheReplay(selected, np.stack(pass_used).sum(-1), np.array(loads))


@dataclass  # not frozen: it remembers
class CoresetHistory:
    """The last coreset of every row, while its block lasts."""

    reuse_tolerance: float | None
    last_coresets: dict[int, tuple[int, Mask]] = field(default_factory=dict)

    def reuse(self, forward: TraceForward, fresh: Mask, votes: VoteArray) -> tuple[Mask, int, int]:
        """[L, E] that is used in place of ``fresh``; layers that stayed, and layers that could."""
        block, previous = self.last_coresets.get(forward.row, (None, fresh))
        if forward.kind != "decode":
            return fresh, 0, 0
        if self.reuse_tolerance is None or block != forward.block_start:
            self.last_coresets[forward.row] = (forward.block_start, fresh)
            return fresh, 0, 0
        arrays = (torch.from_numpy(np.ascontiguousarray(x)) for x in (previous, fresh, votes))
        used = reuse_masks(*arrays, reuse_tolerance=self.reuse_tolerance).numpy()
        self.last_coresets[forward.row] = (forward.block_start, used)
        return used, int((used == previous).all(-1).sum()), len(used)


def _replay_resident_aware(
    trace_votes: TraceVotes, replay_policy: ReplayPolicy, cache: CacheConfig
) -> CacheReplay:
    """As ``book``, forward by forward, each electing by what the one before has left."""
    trace = trace_votes.trace
    slots = cache.make_slots(trace.header.experts, [()] * len(trace.header.layers))
    used_by_row = np.stack([recorded_experts(forward) for forward in trace.forwards])
    loads, used = [], []
    history, reused, reusable = CoresetHistory(replay_policy.reuse_tolerance), 0, 0
    for indices in trace_votes.passes:
        forwards = [trace.forwards[index] for index in indices]
        routed_indices = [index for index in indices if replay_policy.routes(trace.forwards[index])]
        for batch in _group_by_width(trace_votes, routed_indices):
            rows = [trace.forwards[index] for index in batch]
            for layer, layer_slots in enumerate(slots):
                used_by_row[batch, layer] = select_from_trace(
                    trace,
                    replay_policy.policy,
                    rows,
                    layer,
                    layer_slots.resident,
                    slots=layer_slots.capacity,
                )
        for index, forward in zip(indices, forwards, strict=True):
            votes = trace_votes.votes[index]
            used_by_row[index], newly_reused, newly_reusable = history.reuse(
                forward, used_by_row[index], votes
            )
            reused, reusable = reused + newly_reused, reusable + newly_reusable
        pass_used = _union_of_rows(used_by_row, indices)
        used.append(pass_used.sum(-1))
        loads.append(_count_loads(slots, pass_used, _sum_of_votes(trace_votes, indices)))
    return CacheReplay(
        SelectedExperts(used_by_row, reused, reusable), np.array(used), np.array(loads)
    )


def _count_loads(slots: Sequence[Slots], used: Mask, votes: VoteArray) -> list[int]:
    """Experts that must come, of each layer, for these [L, E] to be used."""
    return [
        sum(len(wave.loads) for wave in layer_slots.serve(used[layer], votes[layer]))
        for layer, layer_slots in enumerate(slots)
    ]


def depends_on_residents(replay_policy: ReplayPolicy) -> bool:
    return prefers_residents(replay_policy.policy)


def depends_on_slots(replay_policy: ReplayPolicy) -> bool:
    """Whether it elects otherwise where fast memory has room for others."""
    return election_of(replay_policy.policy).max_experts == "slots"


def _union_of_rows(used: Mask, indices: Sequence[int]) -> Mask:
    """[L, E]: who is used by any of these rows."""
    return np.logical_or.reduce(used[list(indices)], axis=0)


def _sum_of_votes(trace_votes: TraceVotes, indices: Sequence[int]) -> VoteArray:
    return np.sum([trace_votes.votes[index] for index in indices], axis=0)


def _election_batches(
    trace_votes: TraceVotes, replay_policy: ReplayPolicy
) -> Iterator[Sequence[int]]:
    """Places of forwards that may elect in one call: of one width; where rows elect jointly, those
    that shared a forward."""
    forwards = trace_votes.trace.forwards
    if election_of(replay_policy.policy).scope == "batch":
        yield from (
            indices for indices in trace_votes.passes if replay_policy.routes(forwards[indices[0]])
        )
        return
    routed_indices = [
        index for index, forward in enumerate(forwards) if replay_policy.routes(forward)
    ]
    for group in _group_by_width(trace_votes, routed_indices):
        yield from (
            group[first : first + FORWARDS_PER_ELECTION]
            for first in range(0, len(group), FORWARDS_PER_ELECTION)
        )


def _group_by_width(trace_votes: TraceVotes, indices: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(trace_votes.trace.forwards[index].tokens, []).append(index)
    return list(groups.values())
