"""Timing of whole answers: tokens per second, forwards and forwards per block by policy."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.lab.problems import PROBLEM_MAKERS, draw_problem
from coterie.lab.records import Measurement

SEED = 20_260_000  # of the prompts
VANILLA = "vanilla"
ProgressCallback = Callable[[float, str], None]


class GenerationCounts(TypedDict):
    """Results other than times: means or sums over the prompts of one repeat."""

    experts_mean: float
    experts_total: int
    expert_bytes: float
    vote_mass_kept: float
    forwards: int
    forwards_per_block: float
    new_tokens: int
    texts_as_vanilla: int
    coresets_kept: float | None  # fraction of reused coresets; None without reuse
    hit_rate: float | None  # None, like the next, if all experts are in memory
    bytes_moved: float | None  # per answer, prefills and commits included


@dataclass(frozen=True)
class GenerationTiming:
    """One policy: its results by repeat and prompt."""

    policy: str
    repeats: list[list[Result]]

    def measure(self) -> Measurement:
        """Tokens per second; one sample is one repeat over all prompts."""
        samples = [
            sum(r.new_tokens for r in results) / sum(r.seconds for r in results)
            for results in self.repeats
        ]
        return Measurement(self.policy, "tokens/s", tuple(samples))

    def facts(self, vanilla: GenerationTiming) -> GenerationCounts:
        results = self.repeats[0]
        reuse_shares = [r.coreset_reuse_rate for r in results if r.coreset_reuse_rate is not None]
        pairs = zip(results, vanilla.repeats[0], strict=True)
        traffic = [r.traffic for r in results if r.traffic is not None]
        total_traffic = sum(traffic[1:], start=traffic[0]) if traffic else None
        return GenerationCounts(
            experts_mean=sum(r.experts.mean for r in results) / len(results),
            experts_total=results[0].experts.total,
            expert_bytes=sum(r.expert_bytes for r in results) / len(results),
            vote_mass_kept=sum(r.vote_mass_kept for r in results) / len(results),
            forwards=sum(r.forwards for r in results),
            forwards_per_block=sum(r.forwards for r in results) / sum(r.blocks for r in results),
            new_tokens=sum(r.new_tokens for r in results),
            texts_as_vanilla=sum(a.tokens == b.tokens for a, b in pairs),
            coresets_kept=sum(reuse_shares) / len(reuse_shares) if reuse_shares else None,
            hit_rate=None if total_traffic is None else total_traffic.hit_rate,
            bytes_moved=None if total_traffic is None else total_traffic.bytes_moved / len(results),
        )


def held_out_problems(count: int) -> list[str]:
    """Held-out problems of the embedded model, with alternating tasks."""
    rng = random.Random(SEED)
    tasks = list(PROBLEM_MAKERS.values())
    return [draw_problem(tasks[i % len(tasks)], rng, "test").prompt for i in range(count)]


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random token ids for a model without a tokenizer."""
    rng = random.Random(SEED)
    return [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def time_generation(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    policies: Sequence[str],
    *,
    num_repeats: int = 5,
    options: Mapping[str, object] | None = None,
    policy_options: Mapping[str, Mapping[str, object]] | None = None,
    on_progress: ProgressCallback = lambda share, doing: None,
) -> list[GenerationTiming]:
    """Times all policies in alternation, vanilla first; the first repeat is a warm-up.

    ``policy_options`` are options of single policies. A cache of experts is emptied before every
    answer.
    """
    timings = [GenerationTiming(policy, []) for policy in dict.fromkeys([VANILLA, *policies])]
    total, completed = (num_repeats + 1) * len(timings) * len(prompts), 0
    for repeat in range(num_repeats + 1):
        for timing in timings:
            results = []
            merged_options = {**(options or {}), **(policy_options or {}).get(timing.policy, {})}
            for prompt in prompts:
                engine.reset_cache()
                results.append(engine.generate(prompt, policy=timing.policy, **merged_options))
                completed += 1
                on_progress(completed / total, timing.policy)
            if repeat:
                timing.repeats.append(results)
    return timings
