"""What all parts share: the model's folder, drawn routing, policies and sizes of memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from coterie.families import ModelConfig, detect_family
from coterie.keys import from_json
from coterie.lab.records import Measurement
from coterie.lab.replay.cache_simulation import (
    CacheConfig,
    CacheReplay,
    ReplayPolicy,
    TraceVotes,
    depends_on_residents,
    replay_cache,
    select_experts,
)
from coterie.lab.replay.judging import ClockValidation
from coterie.lab.replay.synthetic import LLADA2_MINI, RoutingLaw, SyntheticShape, synthetic_trace
from coterie.lab.replay.trace import Trace
from coterie.model.spec import ModelSpec
from coterie.offload.capacity import Capacity
from coterie.offload.eviction import Lru
from coterie.routing import parse_policy

Found = tuple[str, list[Measurement], dict[str, object]]
"""A record's title, measures and facts."""

SHARE = "35%"
Arm = tuple[ReplayPolicy, str]
"""A policy, and the experts that memory holds."""

VANILLA, VOTE, RESIDENT = "vanilla", "des-vote:beta=0.1", "resident-vote:beta=0.1"


def play(policy: str, drift: float | None = None, *, commits: bool = True) -> ReplayPolicy:
    return ReplayPolicy(parse_policy(policy), drift, commits)


POLICIES = (play(VANILLA), play(VOTE), play(RESIDENT), play(RESIDENT, 0.05))


def spec_of(folder: Path) -> ModelSpec:
    config = ModelConfig.of(folder / "config.json")
    return detect_family(config).read_spec(config)


def law_of(path: Path) -> RoutingLaw:
    return from_json(RoutingLaw, json.loads(path.read_text())["facts"]["as read off"]["law"])


@dataclass(frozen=True)
class Bench:
    """The model, and the law by which its routing is drawn."""

    folder: Path
    spec: ModelSpec
    law: RoutingLaw

    @property
    def size(self) -> int:
        return self.spec.expert_stride

    def drawn(self, layers: int, blocks: int) -> Trace:
        router = self.spec.router
        shape = SyntheticShape(layers, router.experts, router.k, steps=LLADA2_MINI.steps)
        return synthetic_trace(shape, self.law, blocks=blocks, seed=7)

    def slots(self, share: str) -> int:
        layers, experts = len(self.spec.moe_layers), self.spec.router.experts
        return Capacity.parse(share).slots(layers=layers, experts=experts, expert_bytes=self.size)

    def foretold(self, trace: Trace, arm: Arm) -> CacheReplay:
        """What a replay says that is used and loaded."""
        memory, (one, share) = TraceVotes.of(trace), arm
        chosen = None if depends_on_residents(one) else select_experts(memory, one)
        return replay_cache(memory, one, chosen, CacheConfig(Lru(), self.slots(share)))

    def about(self, trace: Trace) -> dict[str, object]:
        router = self.spec.router
        return {
            "layers": len(trace.header.layers),
            "experts": router.experts,
            "expert_bytes": self.size,
            "forwards": len(trace.forwards),
            "steps_a_block": LLADA2_MINI.steps,
            "threads": torch.get_num_threads(),
            "drawn": dict(trace.header.provenance),
        }


def named(arm: Arm) -> str:
    one, share = arm
    commits = "" if one.routes_commits else ", commits vanilla"
    return f"{one}{commits}, {share} in memory"


def tell(judged: ClockValidation) -> None:
    for one in judged.predictions:
        said = "learnt from" if one.used_for_fit else "foretold"
        print(
            f"{one.name}: {1e3 * one.measured_seconds:.2f} ms, {said}, off by {one.relative_error:+.1%}"
        )
    print(f"worst {max(judged.held_out_errors):.1%} of those not learnt from", flush=True)
