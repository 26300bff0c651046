"""Timing of requests in progress together: tokens per second by policy and number of rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from coterie.engine.engine import Engine
from coterie.lab.bench.interleaved import ProgressCallback, Repeat, Sample, run_repeats
from coterie.lab.journal import Journal
from coterie.lab.records import Measurement, median_ratio
from coterie.model.weights import expert_bytes
from coterie.telemetry import Recorder
from coterie.values import Routing, Scores

POLICIES = ("vanilla", "des-vote:beta=0.15", "des-vote:beta=0.15,scope=batch")
ROWS = (1, 2, 4, 8)


@dataclass  # not frozen: it accumulates
class UnionCounter(Recorder):
    """Counts the distinct experts that all rows of a forward use together."""

    unions: list[Tensor] = field(default_factory=list)  # one number for each layer and forward

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        self.unions.append(routing.used.sum())


@dataclass(frozen=True)
class ConcurrencyTiming:
    """One policy with so many rows: a sample of each repeat over all prompts."""

    policy: str
    rows: int
    repeats: list[Sample]

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each repeat."""
        return [repeat["new_tokens"] / repeat["seconds"] for repeat in self.repeats]

    def measure(self) -> Measurement:
        return Measurement(setting_name(self.policy, self.rows), "tokens/s", tuple(self.speeds))

    def facts(self, alone: ConcurrencyTiming) -> dict[str, Any]:
        """Counts of the first repeat, against the policy's fewest rows."""
        pairs = zip(self.repeats[0]["tokens"], alone.repeats[0]["tokens"], strict=True)
        return {
            "policy": self.policy,
            "rows": self.rows,
            **self.repeats[0]["counts"],
            "speedup": median_ratio(self.speeds, alone.speeds),
            "texts_as_alone": sum(a == b for a, b in pairs),
        }


def setting_name(policy: str, rows: int) -> str:
    return f"{policy} {rows} {'row' if rows == 1 else 'rows'}"


def time_concurrency(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    policies: Sequence[str],
    rows: Sequence[int],
    *,
    num_repeats: int = 5,
    options: Mapping[str, object] | None = None,
    journal: Journal | None = None,
    on_progress: ProgressCallback = lambda share, doing: None,
) -> list[ConcurrencyTiming]:
    """Times every policy with every number of rows in alternation, after a warm-up.

    The experts are counted in a run of their own, since a recorder slows forwards down.
    """
    settings = {setting_name(policy, count): (policy, count) for policy in policies
                for count in sorted(set(rows))}  # fmt: skip

    def measure(name: str, number: int, _: Sequence[Repeat]) -> Sample:
        policy, count = settings[name]
        sample = _answer_all(engine, prompts, policy, count, options or {})
        if number == 0:
            sample["counts"] = _count_experts(engine, prompts, policy, count, options or {})
        return sample

    done = run_repeats(
        list(settings), measure, repeats=num_repeats, warmups=1, journal=journal,
        on_progress=on_progress,
    )  # fmt: skip
    return [
        ConcurrencyTiming(policy, count, [repeat[name] for repeat in done])
        for name, (policy, count) in settings.items()
    ]


def _answer_all(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    policy: str,
    rows: int,
    options: Mapping[str, object],
) -> Sample:
    engine.reset_cache()
    start = time.perf_counter()
    results = engine.generate(prompts, policy=policy, batch_size=rows, **options)
    seconds = time.perf_counter() - start
    new_tokens = sum(result.new_tokens for result in results)
    tokens = [list(result.tokens) for result in results]
    return {"seconds": seconds, "new_tokens": new_tokens, "tokens": tokens}


def _count_experts(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    policy: str,
    rows: int,
    options: Mapping[str, object],
) -> dict[str, Any]:
    """What decode forwards read: distinct experts of all rows, and their bytes."""
    counter, model = UnionCounter(), engine.model
    engine.set_recorder(counter)
    try:
        sample = _answer_all(engine, prompts, policy, rows, options)
    finally:
        engine.set_recorder(None)
    total = sum(map(int, counter.unions))
    layers = len(model.spec.moe_layers)
    size = expert_bytes(model.spec, model.transformer.dtype)
    return {
        "experts": total / len(counter.unions),
        "experts_total": model.spec.router.experts,
        "forwards": len(counter.unions) // layers,
        "expert_bytes_per_token": total * size / sample["new_tokens"],
    }
