"""Replays of a trace over a grid of policies, evictions, capacities, precisions and links."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ConfigError
from coterie.keys import Key, to_json
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
from coterie.lab.replay.hardware_model import HardwareModel, predict_seconds
from coterie.lab.replay.policies import Fidelity, fidelity
from coterie.lab.replay.trace import Mask, Trace
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
    """The outcome of a case. Seconds are predicted, of all forwards per decoding one."""

    case: ReplayCase
    fidelity: Fidelity
    slots: int
    experts: float  # used by a layer in a decoding forward
    loads: float  # of these, the ones that were copied
    traffic: Traffic  # of all forwards
    forward_seconds: float
    stall_seconds: float  # in which nothing is computed
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
            "ms": 1e3 * self.forward_seconds,
            "stall_ms": 1e3 * self.stall_seconds,
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
            "traced_under": header.policy, "plan": header.kv_cache, "unmask": header.unmask,
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
    seconds, stalls = predict_seconds(grid.links[case.link], run.used, run.loads, size)
    point = ReplayPoint(
        case,
        fidelity(case.replay_policy.policy),
        slots,
        experts=float(run.used[is_decode].mean()),
        loads=float(run.loads[is_decode].mean()),
        traffic=Traffic(count, size, used, used - misses, transfers, baseline),
        forward_seconds=float(seconds.sum()) / count,
        stall_seconds=float(stalls.sum()) / count,
        vote_share=vote_share(trace_votes, selected),
        coresets_reused=selected.reused / selected.reusable if selected.reusable else None,
    )
    return point, selected


LayerMeans = tuple[float, ...]
METRICS = ("step_jaccard", "block_jaccard", "step_cosine", "block_cosine")


@dataclass(frozen=True)
class StepOverlap:
    """Means over pairs of consecutive decoding forwards of a row, for each layer; empty without.

    ``steps`` pairs lie within one block, ``blocks`` pairs span two. Jaccard: experts in both over
    experts in either. Cosine: of the votes.
    """

    steps: Annotated[int, Key("steps")]
    blocks: Annotated[int, Key("blocks")]
    step_jaccard: Annotated[LayerMeans, Key("step_jaccard")]
    block_jaccard: Annotated[LayerMeans, Key("block_jaccard")]
    step_cosine: Annotated[LayerMeans, Key("step_cosine")]
    block_cosine: Annotated[LayerMeans, Key("block_cosine")]

    def mean(self, name: str) -> float | None:
        """The mean over layers of one of the METRICS."""
        values = to_json(self)[name]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, object]:
        return {**to_json(self), "means": {name: self.mean(name) for name in METRICS}}


def measure_overlap(trace_votes: TraceVotes, used: Mask) -> StepOverlap:
    """The overlap of the experts used, [F, L, E], and of the trace's votes."""
    forwards, votes = trace_votes.trace.forwards, trace_votes.votes
    pairs: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # whether in one block
    last_of_row: dict[int, int] = {}
    for index in trace_votes.trace.decode_indices:
        row, block = forwards[index].row, forwards[index].block_start
        if (previous := last_of_row.get(row)) is not None:
            pairs[forwards[previous].block_start == block].append((previous, index))
        last_of_row[row] = index
    groups = within, between = (pairs[True], pairs[False])
    return StepOverlap(
        *(len(within), len(between)),
        *(_means([jaccard(used[a], used[b]) for a, b in group]) for group in groups),
        *(_means([cosine(votes[a], votes[b]) for a, b in group]) for group in groups),
    )


def jaccard(first: Mask, second: Mask) -> NDArray[np.float64]:
    """[L] from masks [L, E]; 1 where both are empty."""
    union = (first | second).sum(-1)
    return np.where(union > 0, (first & second).sum(-1) / np.maximum(union, 1), 1.0)


def cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L] from vectors [L, E]; 0 where one is zero."""
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.where(norms > 0, (first * second).sum(-1) / np.maximum(norms, 1e-300), 0.0)


def _means(values: list[NDArray[np.float64]]) -> LayerMeans:
    return tuple(np.mean(values, axis=0).tolist()) if values else ()
