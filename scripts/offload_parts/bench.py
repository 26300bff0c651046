"""What all parts share: the model's folder, drawn routing, policies and sizes of memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from coterie.experts.capacity import Capacity
from coterie.experts.eviction import Lru
from coterie.families import Config, recognise
from coterie.keys import from_json
from coterie.model.spec import ModelSpec
from coterie.planning.booking import Booked, Cache, Memory, Play, asks_residents, book, choose
from coterie.planning.judging import Judgement
from coterie.planning.synthetic import MINI, Law, Shape, synthetic
from coterie.planning.trace import Trace
from coterie.results import Measure
from coterie.routing import parse_policy

Found = tuple[str, list[Measure], dict[str, object]]
"""A record's title, measures and facts."""

SHARE = "35%"
Arm = tuple[Play, str]
"""A policy, and the experts that memory holds."""

VANILLA, VOTE, RESIDENT = "vanilla", "des-vote:beta=0.1", "resident-vote:beta=0.1"


def play(policy: str, drift: float | None = None, *, commits: bool = True) -> Play:
    return Play(parse_policy(policy), drift, commits)


POLICIES = (play(VANILLA), play(VOTE), play(RESIDENT), play(RESIDENT, 0.05))


def spec_of(folder: Path) -> ModelSpec:
    config = Config.of(folder / "config.json")
    return recognise(config).read(config)


def law_of(path: Path) -> Law:
    return from_json(Law, json.loads(path.read_text())["facts"]["as read off"]["law"])


@dataclass(frozen=True)
class Bench:
    """The model, and the law by which its routing is drawn."""

    folder: Path
    spec: ModelSpec
    law: Law

    @property
    def size(self) -> int:
        return self.spec.expert_stride

    def drawn(self, layers: int, blocks: int) -> Trace:
        router = self.spec.router
        shape = Shape(layers, router.experts, router.k, steps=MINI.steps)
        return synthetic(shape, self.law, blocks=blocks, seed=7)

    def slots(self, share: str) -> int:
        layers, experts = len(self.spec.moe_layers), self.spec.router.experts
        return Capacity.parse(share).slots(layers=layers, experts=experts, size=self.size)

    def foretold(self, trace: Trace, arm: Arm) -> Booked:
        """What a replay says that is used and loaded."""
        memory, (one, share) = Memory.of(trace), arm
        chosen = None if asks_residents(one) else choose(memory, one)
        return book(memory, one, chosen, Cache(Lru(), self.slots(share)))

    def about(self, trace: Trace) -> dict[str, object]:
        router = self.spec.router
        return {
            "layers": len(trace.about.layers),
            "experts": router.experts,
            "expert_bytes": self.size,
            "forwards": len(trace.forwards),
            "steps_a_block": MINI.steps,
            "threads": torch.get_num_threads(),
            "drawn": dict(trace.about.made),
        }


def named(arm: Arm) -> str:
    one, share = arm
    commits = "" if one.commits else ", commits vanilla"
    return f"{one}{commits}, {share} in memory"


def tell(judged: Judgement) -> None:
    for one in judged.runs:
        said = "learnt from" if one.taught else "foretold"
        print(f"{one.name}: {1e3 * one.seconds:.2f} ms, {said}, off by {one.off_by:+.1%}")
    print(f"worst {max(judged.held_out):.1%} of those not learnt from", flush=True)
