"""Timing of whole answers: tokens per second by policy, for one request or several together."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.lab.bench.interleaved import ProgressCallback, Repeat, Sample, run_repeats
from coterie.lab.journal import Journal
from coterie.lab.problems import PROBLEM_MAKERS, draw_problem
from coterie.lab.records import Measurement, median_ratio
from coterie.model.weights import expert_bytes
from coterie.telemetry import Recorder
from coterie.values import Routing, Scores

SEED = 20_260_000  # of the prompts
VANILLA = "vanilla"
SERVED_POLICIES = (VANILLA, "des-vote:beta=0.15", "des-vote:beta=0.15,scope=batch")
SERVED_ROWS = (1, 2, 4, 8)
Prompts = Sequence[str | Sequence[int]]


@dataclass(frozen=True)
class AnswerTiming:
    """One policy with so many requests in progress: a sample of each repeat over all prompts."""

    name: str  # in records
    policy: str
    rows: int
    repeats: list[Sample]

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each repeat."""
        return [repeat["new_tokens"] / repeat["seconds"] for repeat in self.repeats]

    def measure(self) -> Measurement:
        return Measurement(self.name, "tokens/s", tuple(self.speeds))

    def facts(self, vanilla: AnswerTiming) -> dict[str, Any]:
        """Counts of the first repeat: means over its prompts, or sums."""
        return {**self.repeats[0]["counts"], "texts_as_vanilla": self._same_texts(vanilla)}

    def rows_facts(self, alone: AnswerTiming) -> dict[str, Any]:
        """Counts of the first repeat, against the policy's fewest rows."""
        return {
            "policy": self.policy,
            "rows": self.rows,
            **self.repeats[0]["counts"],
            "speedup": median_ratio(self.speeds, alone.speeds),
            "texts_as_alone": self._same_texts(alone),
        }

    def _same_texts(self, other: AnswerTiming) -> int:
        pairs = zip(self.repeats[0]["tokens"], other.repeats[0]["tokens"], strict=True)
        return sum(a == b for a, b in pairs)


def time_generation(
    engine: Engine,
    prompts: Prompts,
    policies: Sequence[str],
    *,
    num_repeats: int = 5,
    options: Mapping[str, object] | None = None,
    policy_options: Mapping[str, Mapping[str, object]] | None = None,
    journal: Journal | None = None,
    on_progress: ProgressCallback = lambda share, doing: None,
) -> list[AnswerTiming]:
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
        counts = _answer_counts(results)
        return {**_sample(results, sum(r.seconds for r in results)), "counts": counts}

    done = run_repeats(
        names, measure, repeats=num_repeats, warmups=1, journal=journal, on_progress=on_progress
    )
    return [AnswerTiming(name, name, 1, [repeat[name] for repeat in done]) for name in names]


def time_concurrency(
    engine: Engine,
    prompts: Prompts,
    policies: Sequence[str],
    rows: Sequence[int],
    *,
    num_repeats: int = 5,
    options: Mapping[str, object] | None = None,
    journal: Journal | None = None,
    on_progress: ProgressCallback = lambda share, doing: None,
) -> list[AnswerTiming]:
    """Times every policy with every number of rows in alternation, after a warm-up.

    The experts are counted in a run of their own, since a recorder slows forwards down.
    """
    counts = sorted(set(rows))
    settings = {setting_name(policy, n): (policy, n) for policy in policies for n in counts}

    def answer_all(name: str) -> Sample:
        policy, count = settings[name]
        engine.reset_cache()
        start = time.perf_counter()
        results = engine.generate(prompts, policy=policy, batch_size=count, **(options or {}))
        return _sample(results, time.perf_counter() - start)

    def count_experts(name: str) -> dict[str, Any]:
        """What decode forwards read: distinct experts of all rows, and their bytes."""
        counter, model = UnionCounter(), engine.model
        engine.set_recorder(counter)
        try:
            sample = answer_all(name)
        finally:
            engine.set_recorder(None)
        total = sum(map(int, counter.unions))
        size = expert_bytes(model.spec, model.transformer.dtype)
        return {
            "experts": total / len(counter.unions),
            "experts_total": model.spec.router.experts,
            "forwards": len(counter.unions) // len(model.spec.moe_layers),
            "expert_bytes_per_token": total * size / sample["new_tokens"],
        }

    def measure(name: str, number: int, _: Sequence[Repeat]) -> Sample:
        sample = answer_all(name)
        return sample if number else {**sample, "counts": count_experts(name)}

    done = run_repeats(
        list(settings), measure, repeats=num_repeats, warmups=1, journal=journal,
        on_progress=on_progress,
    )  # fmt: skip
    return [
        AnswerTiming(name, policy, count, [repeat[name] for repeat in done])
        for name, (policy, count) in settings.items()
    ]


def setting_name(policy: str, rows: int) -> str:
    return f"{policy} {rows} {'row' if rows == 1 else 'rows'}"


@dataclass  # not frozen: it accumulates
class UnionCounter(Recorder):
    """Counts the distinct experts that all rows of a forward use together."""

    unions: list[Tensor] = field(default_factory=list)  # one number for each layer and forward

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        self.unions.append(routing.used.sum())


def held_out_problems(count: int) -> list[str]:
    """Held-out problems of the embedded model, with alternating tasks."""
    rng = random.Random(SEED)
    tasks = list(PROBLEM_MAKERS.values())
    return [draw_problem(tasks[i % len(tasks)], rng, "test").prompt for i in range(count)]


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random token ids for a model without a tokenizer."""
    rng = random.Random(SEED)
    return [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def _sample(results: Sequence[Result], seconds: float) -> Sample:
    """JSON values of the answers to all prompts."""
    new_tokens, tokens = sum(r.new_tokens for r in results), [list(r.tokens) for r in results]
    return {"seconds": seconds, "new_tokens": new_tokens, "tokens": tokens}


def _answer_counts(results: Sequence[Result]) -> dict[str, Any]:
    """Means over answers, or sums; None without reuse, and without traffic."""
    count, forwards = len(results), sum(r.forwards for r in results)
    reuse_rates = [r.coreset_reuse_rate for r in results if r.coreset_reuse_rate is not None]
    traffic = [r.traffic for r in results if r.traffic is not None]
    total_traffic = sum(traffic[1:], start=traffic[0]) if traffic else None
    return {
        "experts_mean": sum(r.experts.mean for r in results) / count,
        "experts_total": results[0].experts.total,
        "expert_bytes": sum(r.expert_bytes for r in results) / count,
        "vote_mass_kept": sum(r.vote_mass_kept for r in results) / count,
        "forwards": forwards,
        "forwards_per_block": forwards / sum(r.blocks for r in results),
        "new_tokens": sum(r.new_tokens for r in results),
        "coresets_kept": sum(reuse_rates) / len(reuse_rates) if reuse_rates else None,
        "hit_rate": total_traffic and total_traffic.hit_rate,
        "bytes_moved": total_traffic and total_traffic.bytes_moved / count,
    }
