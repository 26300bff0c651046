"""A policy replayed over a trace: the experts that each forward uses, and the copies they need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.errors import CoterieError
from coterie.lab.replay.policies import election_of, forward_votes, select_from_trace
from coterie.lab.replay.trace import Mask, Trace, TraceForward
from coterie.offload.eviction import Belady, Eviction
from coterie.offload.slot_table import Slots
from coterie.routing import format_policy
from coterie.routing.reuse import reuse_masks
from coterie.values import Policy

CountArray = NDArray[np.int64]
VoteArray = NDArray[np.float64]

FORWARDS_PER_ELECTION = 64  # forwards that elect in one call where they are independent


@dataclass(frozen=True)
class TraceVotes:
    """What every policy shares: the votes of each forward, and the rows of each batch."""

    trace: Trace
    votes: tuple[VoteArray, ...]  # of each forward, [L, E]
    passes: tuple[tuple[int, ...], ...]  # indices of the rows that shared a forward pass

    @staticmethod
    def of(trace: Trace) -> TraceVotes:
        """Raises CoterieError for a trace without a forward that decodes."""
        if not trace.decode_indices:
            raise CoterieError("the trace holds no forward that decodes")
        indices = range(len(trace.forwards))
        groups = groupby(indices, key=lambda index: trace.forwards[index].number)
        votes = tuple(forward_votes(trace, forward) for forward in trace.forwards)
        return TraceVotes(trace, votes, tuple(tuple(members) for _, members in groups))

    @property
    def mean_votes(self) -> VoteArray:
        """[L, E] mean over forwards: the votes that a warm start begins with."""
        return np.mean(self.votes, axis=0)

    @property
    def is_decode(self) -> Mask:
        """[P]: whether each pass decodes."""
        return np.array([self.trace.forwards[rows[0]].kind == "decode" for rows in self.passes])


@dataclass(frozen=True)
class SelectedExperts:
    """The experts of each row of each forward, [F, L, E].

    ``reused`` of ``reusable`` (row, layer) pairs kept the coreset of the previous step.
    """

    used: Mask
    reused: int = 0
    reusable: int = 0


@dataclass(frozen=True)
class CacheReplay:
    """The outcome of a cache and a policy: experts used and loaded by each pass, [P, L]."""

    selected: SelectedExperts
    used: CountArray
    loads: CountArray


@dataclass(frozen=True)
class ReplayPolicy:
    """A policy and how it is applied; prefill forwards stay as recorded.

    ``reuse_tolerance``: the share of its votes that a reused coreset may lose; None: no reuse.
    ``routes_commits``: whether the policy also routes forwards that commit a block.
    """

    policy: Policy
    reuse_tolerance: float | None = None
    routes_commits: bool = False

    def routes(self, forward: TraceForward) -> bool:
        """Whether the policy routes this forward."""
        return forward.kind == "decode" or (self.routes_commits and forward.kind == "commit")

    @property
    def depends_on_residents(self) -> bool:
        """Whether cached experts change what the policy elects."""
        return election_of(self.policy).resident_bonus > 0

    @property
    def depends_on_slots(self) -> bool:
        """Whether the number of slots changes what the policy elects."""
        return election_of(self.policy).max_experts == "slots"

    def __str__(self) -> str:
        tolerance = self.reuse_tolerance
        suffix = "" if tolerance is None else f" coreset-reuse={tolerance:g}"
        return format_policy(self.policy) + suffix


@dataclass(frozen=True)
class CacheConfig:
    """An expert cache: slots of each layer and the eviction policy; None: Belady's optimum.

    ``warm`` [L, E]: votes of earlier runs; the experts with most votes are cached at the start.
    """

    eviction: Eviction | None
    slots: int
    warm: VoteArray | None = None

    def make_slots(self, experts: int, uses: Sequence[Sequence[Mask]]) -> list[Slots]:
        """Slots of every layer; ``uses`` are each layer's future experts, for Belady alone."""
        evictions = [self.eviction or Belady.from_uses(future) for future in uses]
        warm = [None] * len(uses) if self.warm is None else list(self.warm)
        pairs = zip(evictions, warm, strict=True)
        return [Slots(experts, self.slots, eviction, votes) for eviction, votes in pairs]


@dataclass  # not frozen: it changes with every forward
class CoresetHistory:
    """The last coreset of every row while its block lasts, and counts of reuse."""

    reuse_tolerance: float | None
    reused: int = 0
    reusable: int = 0
    last_coresets: dict[int, tuple[int, Mask]] = field(default_factory=dict)

    def reuse(self, forward: TraceForward, fresh: Mask, votes: VoteArray) -> Mask:
        """The coreset [L, E] to use: the previous one where it loses few votes, else ``fresh``."""
        block, previous = self.last_coresets.get(forward.row, (None, fresh))
        if forward.kind != "decode":
            return fresh
        used = fresh
        if self.reuse_tolerance is not None and block == forward.block_start:
            arrays = (torch.from_numpy(np.ascontiguousarray(x)) for x in (previous, fresh, votes))
            used = reuse_masks(*arrays, reuse_tolerance=self.reuse_tolerance).numpy()
            self.reused += int((used == previous).all(-1).sum())
            self.reusable += len(used)
        self.last_coresets[forward.row] = (forward.block_start, used)
        return used


def select_experts(
    trace_votes: TraceVotes, replay_policy: ReplayPolicy, slots: int | None = None
) -> SelectedExperts:
    """The experts that a policy selects, for policies that ignore what is cached.

    ``slots``: the cache slots of each layer; None: enough for all experts.
    """
    trace, used = trace_votes.trace, recorded_experts(trace_votes.trace.forwards)
    for indices in _election_batches(trace_votes, replay_policy):
        rows = [trace.forwards[index] for index in indices]
        for ordinal in range(len(trace.header.layers)):
            mask = select_from_trace(trace, replay_policy.policy, rows, ordinal, slots=slots)
            used[list(indices), ordinal] = mask
    history = CoresetHistory(replay_policy.reuse_tolerance)
    for index, forward in enumerate(trace.forwards):
        used[index] = history.reuse(forward, used[index], trace_votes.votes[index])
    return SelectedExperts(used, history.reused, history.reusable)


def recorded_experts(forwards: Sequence[TraceForward]) -> Mask:
    """[F, L, E]: the experts of forwards that the policy does not route."""
    return np.stack([f.vanilla_mask if f.kind == "commit" else f.used for f in forwards])


def replay_cache(
    trace_votes: TraceVotes,
    replay_policy: ReplayPolicy,
    selected: SelectedExperts | None,
    cache: CacheConfig,
) -> CacheReplay:
    """Serve a policy's experts from a cache; ``selected`` comes from ``select_experts``.

    It is None for a policy that prefers cached experts: each forward then depends on the last one.
    """
    trace, history = trace_votes.trace, CoresetHistory(replay_policy.reuse_tolerance)
    used = recorded_experts(trace.forwards) if selected is None else selected.used
    pass_used = [_union(used, rows) for rows in trace_votes.passes]
    layers = range(len(trace.header.layers))
    uses = [[] if selected is None else [mask[layer] for mask in pass_used] for layer in layers]
    slots = cache.make_slots(trace.header.experts, uses)
    loads = []
    for index, rows in enumerate(trace_votes.passes):
        if selected is None:
            _elect_by_residents(trace_votes, replay_policy, rows, slots, used)
            for row in rows:
                used[row] = history.reuse(trace.forwards[row], used[row], trace_votes.votes[row])
            pass_used[index] = _union(used, rows)
        votes = np.sum([trace_votes.votes[row] for row in rows], axis=0)
        tables = zip(slots, pass_used[index], votes, strict=True)
        loads.append([sum(len(wave.loads) for wave in s.serve(u, v)) for s, u, v in tables])
    selected = selected or SelectedExperts(used, history.reused, history.reusable)
    return CacheReplay(selected, np.stack(pass_used).sum(-1), np.array(loads))


def _union(used: Mask, rows: Sequence[int]) -> Mask:
    """[L, E]: the experts that any of these rows uses."""
    return np.logical_or.reduce(used[list(rows)], axis=0)


def _elect_by_residents(
    trace_votes: TraceVotes,
    replay_policy: ReplayPolicy,
    rows: Sequence[int],
    slots: Sequence[Slots],
    used: Mask,
) -> None:
    """Write the experts of these rows of one pass into ``used``, given the cached ones."""
    trace, policy = trace_votes.trace, replay_policy.policy
    routed = [row for row in rows if replay_policy.routes(trace.forwards[row])]
    for batch in _group_by_width(trace, routed):
        forwards = [trace.forwards[row] for row in batch]
        for ordinal, table in enumerate(slots):
            used[batch, ordinal] = select_from_trace(
                trace, policy, forwards, ordinal, table.resident, slots=table.capacity
            )


def _election_batches(
    trace_votes: TraceVotes, replay_policy: ReplayPolicy
) -> Iterator[Sequence[int]]:
    """Indices of forwards that elect in one call: of one width, or the rows of one pass."""
    trace = trace_votes.trace
    routed = [i for i, forward in enumerate(trace.forwards) if replay_policy.routes(forward)]
    if election_of(replay_policy.policy).scope == "batch":
        yield from (rows for rows in trace_votes.passes if rows[0] in routed)
        return
    for group in _group_by_width(trace, routed):
        for first in range(0, len(group), FORWARDS_PER_ELECTION):
            yield group[first : first + FORWARDS_PER_ELECTION]


def _group_by_width(trace: Trace, indices: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(trace.forwards[index].tokens, []).append(index)
    return list(groups.values())
