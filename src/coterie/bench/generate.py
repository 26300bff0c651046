"""Whole answers, timed: tokens a second, forwards, and forwards a block, policy beside policy."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from coterie.engine.engine import Engine
from coterie.engine.event import Result
from coterie.problems import TASKS, draw
from coterie.results import Measure

SEED = 20_260_000  # of the prompts; they lie in the held-out split
VANILLA = "vanilla"
Tell = Callable[[float, str], None]


class Counted(TypedDict):
    """What does not depend on the clock: means or sums over the prompts of one turn."""

    experts_mean: float
    experts_total: int
    expert_bytes: float
    vote_mass_kept: float
    forwards: int
    forwards_per_block: float
    new_tokens: int
    texts_as_vanilla: int
    coresets_kept: float | None  # of later steps' layers, mean over prompts; None without drift
    hit_rate: float | None  # of experts used; None where all are in memory, and so below
    bytes_moved: float | None  # an answer, prompt and commits among it


@dataclass(frozen=True)
class Line:
    """One policy: its results, turn by turn and prompt by prompt."""

    policy: str
    turns: list[list[Result]]

    def measure(self) -> Measure:
        """One sample is one turn: all prompts' new tokens over all their seconds."""
        samples = [
            sum(r.new_tokens for r in done) / sum(r.seconds for r in done) for done in self.turns
        ]
        return Measure(self.policy, "tokens/s", tuple(samples))

    def facts(self, vanilla: Line) -> Counted:
        done = self.turns[0]
        kept = [r.coresets_kept for r in done if r.coresets_kept is not None]
        pairs = zip(done, vanilla.turns[0], strict=True)
        traffic = [r.traffic for r in done if r.traffic is not None]
        moved = sum(traffic[1:], start=traffic[0]) if traffic else None
        return Counted(
            experts_mean=sum(r.experts.mean for r in done) / len(done),
            experts_total=done[0].experts.total,
            expert_bytes=sum(r.expert_bytes for r in done) / len(done),
            vote_mass_kept=sum(r.vote_mass_kept for r in done) / len(done),
            forwards=sum(r.forwards for r in done),
            forwards_per_block=sum(r.forwards for r in done) / sum(r.blocks for r in done),
            new_tokens=sum(r.new_tokens for r in done),
            texts_as_vanilla=sum(a.tokens == b.tokens for a, b in pairs),
            coresets_kept=sum(kept) / len(kept) if kept else None,
            hit_rate=None if moved is None else moved.hit_rate,
            bytes_moved=None if moved is None else moved.bytes_moved / len(done),
        )


def problems(count: int) -> list[str]:
    """Held-out problems that the model in the package can solve, the tasks taking turns."""
    rng = random.Random(SEED)
    makers = list(TASKS.values())
    return [draw(makers[i % len(makers)], rng, "test").prompt for i in range(count)]


def random_prompts(count: int, length: int, below: int) -> list[list[int]]:
    """Ids for a model that knows no words."""
    rng = random.Random(SEED)
    return [[rng.randrange(below) for _ in range(length)] for _ in range(count)]


def time_generation(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    policies: Sequence[str],
    *,
    turns: int = 5,
    options: Mapping[str, object] | None = None,
    apart: Mapping[str, Mapping[str, object]] | None = None,
    tell: Tell = lambda share, doing: None,
) -> list[Line]:
    """Policies take turns, vanilla first; one turn before the first is not kept. ``apart``: of some
    policies, options of their own. A memory that does not hold all experts is emptied before every
    answer."""
    lines = [Line(policy, []) for policy in dict.fromkeys([VANILLA, *policies])]
    whole, done = (turns + 1) * len(lines) * len(prompts), 0
    for turn in range(turns + 1):
        for line in lines:
            results, own = [], {**(options or {}), **(apart or {}).get(line.policy, {})}
            for prompt in prompts:
                engine.empty()
                results.append(engine.generate(prompt, policy=line.policy, **own))
                done += 1
                tell(done / whole, line.policy)
            if turn:
                line.turns.append(results)
    return lines
