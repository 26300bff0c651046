"""Timing of whole answers: tokens per second, forwards and forwards per block by policy."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.lab.bench.interleaved import ProgressCallback, Repeat, Sample, run_repeats
from coterie.lab.journal import Journal
from coterie.lab.problems import PROBLEM_MAKERS, draw_problem
from coterie.lab.records import Measurement

SEED = 20_260_000  # of the prompts
VANILLA = "vanilla"


@dataclass(frozen=True)
class GenerationTiming:
    """One policy: a sample of each repeat over all prompts, from ``answer_sample``."""

    policy: str
    repeats: list[Sample]

    def measure(self) -> Measurement:
        """Tokens per second; one sample is one repeat over all prompts."""
        speeds = [repeat["new_tokens"] / repeat["seconds"] for repeat in self.repeats]
        return Measurement(self.policy, "tokens/s", tuple(speeds))

    def facts(self, vanilla: GenerationTiming) -> dict[str, Any]:
        """Counts of the first repeat: means over its prompts, or sums."""
        first, reference = self.repeats[0], vanilla.repeats[0]
        pairs = zip(first["tokens"], reference["tokens"], strict=True)
        return {**first["counts"], "texts_as_vanilla": sum(a == b for a, b in pairs)}


def answer_sample(results: Sequence[Result]) -> Sample:
    """JSON values of the answers to all prompts: their time, their tokens and other counts."""
    count, new_tokens = len(results), sum(r.new_tokens for r in results)
    reuse_rates = [r.coreset_reuse_rate for r in results if r.coreset_reuse_rate is not None]
    traffic = [r.traffic for r in results if r.traffic is not None]
    total_traffic = sum(traffic[1:], start=traffic[0]) if traffic else None
    forwards = sum(r.forwards for r in results)
    counts = {
        "experts_mean": sum(r.experts.mean for r in results) / count,
        "experts_total": results[0].experts.total,
        "expert_bytes": sum(r.expert_bytes for r in results) / count,
        "vote_mass_kept": sum(r.vote_mass_kept for r in results) / count,
        "forwards": forwards,
        "forwards_per_block": forwards / sum(r.blocks for r in results),
        "new_tokens": new_tokens,
        # None without reuse, and without traffic.
        "coresets_kept": sum(reuse_rates) / len(reuse_rates) if reuse_rates else None,
        "hit_rate": None if total_traffic is None else total_traffic.hit_rate,
        "bytes_moved": None if total_traffic is None else total_traffic.bytes_moved / count,
    }
    seconds, tokens = sum(r.seconds for r in results), [list(r.tokens) for r in results]
    return {"seconds": seconds, "new_tokens": new_tokens, "tokens": tokens, "counts": counts}


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
    journal: Journal | None = None,
    on_progress: ProgressCallback = lambda share, doing: None,
) -> list[GenerationTiming]:
    """Times vanilla and the policies in alternation, after a warm-up.

    ``policy_options`` are options of single policies. A cache of experts is emptied before every
    answer.
    """
    names = list(dict.fromkeys([VANILLA, *policies]))

    def measure(policy: str, number: int, _: Sequence[Repeat]) -> Sample:
        merged_options = {**(options or {}), **(policy_options or {}).get(policy, {})}
        results = []
        for prompt in prompts:
            engine.reset_cache()
            results.append(engine.generate(prompt, policy=policy, **merged_options))
        return answer_sample(results)

    done = run_repeats(
        names, measure, repeats=num_repeats, warmups=1, journal=journal, on_progress=on_progress
    )
    return [GenerationTiming(policy, [repeat[policy] for repeat in done]) for policy in names]
