"""Replays over a grid: policies x caches x capacities x precisions x links, from one trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from coterie.errors import CoterieError
from coterie.lab.replay.cache_simulation import (
    CacheConfig,
    CacheReplay,
    ReplayPolicy,
    SelectedExperts,
    TraceVotes,
    VoteArray,
    depends_on_residents,
    depends_on_slots,
    replay_cache,
    select_experts,
)
from coterie.lab.replay.hardware_model import HardwareModel, PredictedTime, predict_time
from coterie.lab.replay.overlap import StepOverlap, measure_overlap
from coterie.lab.replay.policies import Fidelity, fidelity
from coterie.lab.replay.trace import Trace
from coterie.offload.capacity import Capacity
from coterie.offload.eviction import EVICTIONS, Eviction, parse_eviction
from coterie.offload.traffic import Traffic
from coterie.routing import Vanilla

BELADY = "belady"
EVICTION_NAMES = (*EVICTIONS, BELADY)
BASELINE_EVICTION = "lru"  # under which vanilla is compared with
ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class ReplayGrid:
    """What is asked: every combination is replayed."""

    replay_policies: Sequence[ReplayPolicy]
    evictions: Sequence[str]
    capacities: Sequence[Capacity]
    expert_bytes: Mapping[str, int]  # bytes of an expert, by precision
    links: Mapping[str, HardwareModel]  # by what was typed
    warm: VoteArray | None = None

    def cases(self) -> list[ReplayCase]:
        """Every combination, links turning fastest."""
        combinations = product(
            self.replay_policies, self.evictions, self.capacities, self.expert_bytes, self.links
        )
        return [ReplayCase(*case) for case in combinations]


@dataclass(frozen=True)
class ReplayCase:
    """One point of a grid."""

    replay_policy: ReplayPolicy
    eviction: str
    capacity: Capacity
    precision: str
    link: str


@dataclass(frozen=True)
class ReplayPoint:
    """What became of a case; ``clock`` is a prediction, all else is counted."""

    case: ReplayCase
    fidelity: Fidelity
    slots: int
    experts: float  # used of a layer, in a forward that decodes
    loads: float  # of these, those that had to come
    traffic: Traffic  # of all forwards, those that decode and those that only write keys
    predicted_time: PredictedTime
    vote_share: float
    coresets_reused: float | None  # with drift: of a block's later steps, how many kept theirs

    def to_dict(self) -> dict[str, object]:
        """Flat; bytes are of all forwards, or laid on each one that decodes."""
        case, traffic = self.case, self.traffic
        return {
            "policy": str(case.replay_policy),
            "replayed": self.fidelity,
            "cache": case.eviction,
            "capacity": case.capacity.text,
            "slots": self.slots,
            "precision": case.precision,
            "link": case.link,
            "forwards": traffic.forwards,
            "experts": self.experts,
            "loads": self.loads,
            "hit_rate": traffic.hit_rate,
            "bytes_moved": traffic.bytes_moved,
            "bytes_a_forward": traffic.bytes_moved / traffic.forwards,
            "bytes_avoided": traffic.bytes_saved,
            "bytes_avoided_against_vanilla": traffic.bytes_saved_vs_vanilla,
            "saved_against_vanilla": traffic.fraction_saved,
            "ms": 1e3 * self.predicted_time.forward_seconds,
            "stall_ms": 1e3 * self.predicted_time.stall_seconds,
            "votes_kept": self.vote_share,
            "coresets_kept": self.coresets_reused,
        }


@dataclass(frozen=True)
class ReplayResult:
    """The grid's points in its order, and how alike steps are under each policy."""

    points: tuple[ReplayPoint, ...]
    overlaps: Mapping[str, StepOverlap]
    steps_per_block: float


def replay(
    trace: Trace, grid: ReplayGrid, on_progress: ProgressCallback | None = None
) -> ReplayResult:
    """Replay it all; ``told`` hears (points done, points in all).

    Raises CoterieError, before anything is replayed, for what the trace cannot say.
    """
    check_grid(grid)
    fidelities: dict[str, Fidelity] = {
        str(replay_policy): fidelity(replay_policy.policy) for replay_policy in grid.replay_policies
    }
    evictions = {
        eviction: eviction_of(eviction) for eviction in (*grid.evictions, BASELINE_EVICTION)
    }
    slots_by_case = {case: slots_of(trace, grid, case) for case in grid.cases()}
    cache_replays = CacheReplays(TraceVotes.of(trace), grid.warm, evictions)
    points: list[ReplayPoint] = []
    selections: dict[str, SelectedExperts] = {}
    for case, slot_count in slots_by_case.items():
        cache_replay = cache_replays.get(case.replay_policy, case.eviction, slot_count)
        vanilla_replay = cache_replays.get(ReplayPolicy(Vanilla()), BASELINE_EVICTION, slot_count)
        # Where what is in fast memory changes a coreset, the first cache's stands for the policy's.
        selections.setdefault(str(case.replay_policy), cache_replay.selected)
        expert_bytes, is_decode = (
            grid.expert_bytes[case.precision],
            cache_replays.trace_votes.is_decode,
        )
        hardware, reusable = grid.links[case.link], cache_replay.selected.reusable
        point = ReplayPoint(
            case,
            fidelities[str(case.replay_policy)],
            slot_count,
            experts=float(cache_replay.used[is_decode].mean()),
            loads=float(cache_replay.loads[is_decode].mean()),
            traffic=replay_traffic(
                cache_replay, vanilla_replay, expert_bytes, forwards=int(is_decode.sum())
            ),
            predicted_time=predict_time(
                hardware,
                cache_replay.used,
                cache_replay.loads,
                expert_bytes,
                decode_forwards=int(is_decode.sum()),
            ),
            vote_share=vote_share(cache_replays.trace_votes, cache_replay.selected),
            coresets_reused=cache_replay.selected.reused / reusable if reusable else None,
        )
        points.append(point)
        if on_progress is not None:
            on_progress(len(points), len(slots_by_case))
    overlaps = {
        name: measure_overlap(cache_replays.trace_votes, selected.used)
        for name, selected in selections.items()
    }
    return ReplayResult(tuple(points), overlaps, steps_per_block(trace))


def check_grid(grid: ReplayGrid) -> None:
    """Raises for what nobody could replay: an optimum over what is not known beforehand."""
    for replay_policy in grid.replay_policies:
        if BELADY in grid.evictions and depends_on_residents(replay_policy):
            raise CoterieError(
                f"{replay_policy} elects by what is in fast memory, so that nobody can know whom it will "
                f"use: {BELADY} cannot be replayed with it; leave one of the two out"
            )


@dataclass  # not frozen: it keeps what was played
class CacheReplays:
    """Every policy and cache, played once."""

    trace_votes: TraceVotes
    warm: VoteArray | None
    evictions: Mapping[str, Eviction | None]
    _selected: dict[tuple[str, int | None], SelectedExperts | None] = field(default_factory=dict)
    _cache_replays: dict[tuple[str, str, int], CacheReplay] = field(default_factory=dict)

    def get(self, replay_policy: ReplayPolicy, eviction: str, slots: int) -> CacheReplay:
        name, slot_limit = str(replay_policy), slots if depends_on_slots(replay_policy) else None
        if (name, slot_limit) not in self._selected:
            selected = (
                None
                if depends_on_residents(replay_policy)
                else select_experts(self.trace_votes, replay_policy, slot_limit)
            )
            self._selected[name, slot_limit] = selected
        key = (name, eviction, slots)
        if key not in self._cache_replays:
            cache_config = CacheConfig(self.evictions[eviction], slots, self.warm)
            self._cache_replays[key] = replay_cache(
                self.trace_votes, replay_policy, self._selected[name, slot_limit], cache_config
            )
        return self._cache_replays[key]


def eviction_of(name: str) -> Eviction | None:
    """The rule; None for Belady's optimum, which is of what it is replayed with."""
    return None if name == BELADY else parse_eviction(name)


def slots_of(trace: Trace, grid: ReplayGrid, case: ReplayCase) -> int:
    """Of each layer, in this case."""
    layers, experts = len(trace.header.layers), trace.header.experts
    return case.capacity.slots(
        layers=layers, experts=experts, expert_bytes=grid.expert_bytes[case.precision]
    )


def replay_traffic(
    cache_replay: CacheReplay, vanilla: CacheReplay, expert_bytes: int, *, forwards: int
) -> Traffic:
    """Of all forwards and layers, where an expert weighs ``size`` and so many forwards decode."""
    used, loads, vanilla_loads = (
        int(x.sum()) for x in (cache_replay.used, cache_replay.loads, vanilla.loads)
    )
    return Traffic.from_counts(
        forwards, expert_bytes, experts_used=used, misses=loads, vanilla_misses=vanilla_loads
    )


def vote_share(trace_votes: TraceVotes, selected: SelectedExperts) -> float:
    """Share of all votes, of forwards that decode, that are for experts used."""
    decode_indices = [
        index
        for index, forward in enumerate(trace_votes.trace.forwards)
        if forward.kind == "decode"
    ]
    selected_votes = sum(
        (trace_votes.votes[index] * selected.used[index]).sum() for index in decode_indices
    )
    return float(selected_votes / sum(trace_votes.votes[index].sum() for index in decode_indices))


def steps_per_block(trace: Trace) -> float:
    """Decoding forwards that a block took in the run."""
    decode = [forward for forward in trace.forwards if forward.kind == "decode"]
    return len(decode) / len({(forward.row, forward.block_start) for forward in decode})


def decoding_only(trace: Trace) -> Trace:
    """Without the forwards that only write keys."""
    decode = tuple(forward for forward in trace.forwards if forward.kind == "decode")
    return replace(trace, forwards=decode)
