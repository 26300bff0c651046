"""Replays of a trace over a grid of policies, evictions, capacities, precisions and links."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

from coterie.errors import ConfigError
from coterie.lab.replay.cache_simulation import (
    CacheConfig,
    CacheReplay,
    ReplayPolicy,
    SelectedExperts,
    TraceVotes,
    VoteArray,
    replay_cache,
    select_experts,
)
from coterie.lab.replay.hardware_model import HardwareModel, PredictedTime, predict_time
from coterie.lab.replay.overlap import StepOverlap, measure_overlap
from coterie.lab.replay.policies import Fidelity, fidelity
from coterie.lab.replay.trace import Trace
from coterie.offload.capacity import Capacity
from coterie.offload.eviction import EVICTIONS, Eviction, parse_eviction
from coterie.offload.traffic import Traffic, Transfer
from coterie.routing import Vanilla

BELADY = "belady"
EVICTION_NAMES = (*EVICTIONS, BELADY)
BASELINE_EVICTION = "lru"  # vanilla with LRU is the baseline of all comparisons
ProgressCallback = Callable[[int, int], None]
CacheRuns = Callable[[ReplayPolicy, str, int], CacheReplay]


@dataclass(frozen=True)
class ReplayGrid:
    """The options of a replay; every combination is one case."""

    replay_policies: Sequence[ReplayPolicy]
    evictions: Sequence[str]
    capacities: Sequence[Capacity]
    expert_bytes: Mapping[str, int]  # bytes of an expert, by precision
    links: Mapping[str, HardwareModel]  # by name
    warm: VoteArray | None = None

    def cases(self) -> list[ReplayCase]:
        """Every combination; the link changes fastest."""
        axes = (self.replay_policies, self.evictions, self.capacities)
        return [ReplayCase(*case) for case in product(*axes, self.expert_bytes, self.links)]


@dataclass(frozen=True)
class ReplayCase:
    """One combination of a grid."""

    replay_policy: ReplayPolicy
    eviction: str
    capacity: Capacity
    precision: str
    link: str


@dataclass(frozen=True)
class ReplayPoint:
    """The outcome of a case; only ``predicted_time`` is not counted."""

    case: ReplayCase
    fidelity: Fidelity
    slots: int
    experts: float  # used by a layer in a decoding forward
    loads: float  # of these, the ones that were copied
    traffic: Traffic  # of all forwards
    predicted_time: PredictedTime
    vote_share: float
    coresets_reused: float | None  # with coreset reuse: share of later steps that reused one

    def to_dict(self) -> dict[str, object]:
        """A flat dictionary; bytes per forward spread all copies over the decoding forwards."""
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
    """The points of a grid in its order, and each policy's overlap of consecutive steps."""

    points: tuple[ReplayPoint, ...]
    overlaps: Mapping[str, StepOverlap]
    steps_per_block: float

    def to_dict(self, trace: Trace, path: Path) -> dict[str, object]:
        """The replay as JSON, with the recorded run."""
        header = trace.header
        return {
            "trace": str(path), "torn": trace.truncated, "model": header.model,
            "traced_under": header.policy, "plan": header.plan, "unmask": header.unmask,
            "layers": list(header.layers), "experts": header.experts,
            "prompts": dict(header.prompts), "made": dict(header.provenance),
            "forwards": trace.kinds, "steps_per_block": self.steps_per_block,
            "points": [point.to_dict() for point in self.points],
            "overlap": {name: overlap.to_dict() for name, overlap in self.overlaps.items()},
        }  # fmt: skip


def replay(
    trace: Trace, grid: ReplayGrid, on_progress: ProgressCallback | None = None
) -> ReplayResult:
    """Replay every case; ``on_progress`` receives (finished, total).

    Raises CoterieError before the first case for what a trace cannot replay.
    """
    by_residents = [str(policy) for policy in grid.replay_policies if policy.depends_on_residents]
    if BELADY in grid.evictions and by_residents:
        raise ConfigError(
            f"{', '.join(by_residents)}: the policy depends on the cached experts, so its uses are "
            f"not known beforehand; leave out {BELADY} or the policy"
        )
    for rule in grid.evictions:
        if (name := rule.partition(":")[0]) not in EVICTION_NAMES:
            known = ", ".join(sorted(EVICTION_NAMES))
            raise ConfigError(f"unknown eviction policy {name!r}; known: {known}")
    for replay_policy in grid.replay_policies:
        fidelity(replay_policy.policy)
    rules = {BASELINE_EVICTION, *grid.evictions} - {BELADY}
    evictions = {BELADY: None, **{rule: parse_eviction(rule) for rule in rules}}
    sizes = {"layers": len(trace.header.layers), "experts": trace.header.experts}
    slots_by_case = {
        case: case.capacity.slots(**sizes, expert_bytes=grid.expert_bytes[case.precision])
        for case in grid.cases()
    }
    votes = TraceVotes.of(trace)
    runs = _cache_runs(votes, evictions, grid.warm)
    points: list[ReplayPoint] = []
    selections: dict[str, SelectedExperts] = {}
    for case, slots in slots_by_case.items():
        point, selected = _replay_case(votes, runs, grid, case, slots)
        # Where cached experts change a coreset, the first eviction stands for the policy.
        selections.setdefault(str(case.replay_policy), selected)
        points.append(point)
        if on_progress is not None:
            on_progress(len(points), len(slots_by_case))
    overlaps = {name: measure_overlap(votes, each.used) for name, each in selections.items()}
    return ReplayResult(tuple(points), overlaps, steps_per_block(trace))


def vote_share(trace_votes: TraceVotes, selected: SelectedExperts) -> float:
    """Share of the votes of decoding forwards that goes to selected experts."""
    votes, indices = trace_votes.votes, trace_votes.trace.decode_indices
    total = sum(votes[index].sum() for index in indices)
    return float(sum((votes[index] * selected.used[index]).sum() for index in indices) / total)


def steps_per_block(trace: Trace) -> float:
    """Mean number of decoding forwards of a block."""
    decode = [trace.forwards[index] for index in trace.decode_indices]
    return len(decode) / len({(forward.row, forward.block_start) for forward in decode})


def decoding_only(trace: Trace) -> Trace:
    """The trace without forwards that only write keys."""
    return replace(trace, forwards=tuple(trace.forwards[index] for index in trace.decode_indices))


def _cache_runs(
    trace_votes: TraceVotes, evictions: Mapping[str, Eviction | None], warm: VoteArray | None
) -> CacheRuns:
    """Replays of a policy with an eviction policy and slots, each computed once."""

    @cache
    def select(replay_policy: ReplayPolicy, slots: int | None) -> SelectedExperts:
        return select_experts(trace_votes, replay_policy, slots)

    @cache
    def run(replay_policy: ReplayPolicy, eviction: str, slots: int) -> CacheReplay:
        limit = slots if replay_policy.depends_on_slots else None
        selected = None if replay_policy.depends_on_residents else select(replay_policy, limit)
        config = CacheConfig(evictions[eviction], slots, warm)
        return replay_cache(trace_votes, replay_policy, selected, config)

    return run


def _replay_case(
    trace_votes: TraceVotes, runs: CacheRuns, grid: ReplayGrid, case: ReplayCase, slots: int
) -> tuple[ReplayPoint, SelectedExperts]:
    run = runs(case.replay_policy, case.eviction, slots)
    vanilla = runs(ReplayPolicy(Vanilla()), BASELINE_EVICTION, slots)
    is_decode, selected = trace_votes.is_decode, run.selected
    count, size = int(is_decode.sum()), grid.expert_bytes[case.precision]
    used, misses, baseline = (int(x.sum()) for x in (run.used, run.loads, vanilla.loads))
    transfers = {"elsewhere": Transfer(misses, misses * size)}
    hardware = grid.links[case.link]
    point = ReplayPoint(
        case,
        fidelity(case.replay_policy.policy),
        slots,
        experts=float(run.used[is_decode].mean()),
        loads=float(run.loads[is_decode].mean()),
        traffic=Traffic(count, size, used, used - misses, transfers, baseline),
        predicted_time=predict_time(hardware, run.used, run.loads, size, decode_forwards=count),
        vote_share=vote_share(trace_votes, selected),
        coresets_reused=selected.reused / selected.reusable if selected.reusable else None,
    )
    return point, selected
