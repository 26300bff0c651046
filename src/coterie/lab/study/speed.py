"""End-to-end cost of a policy: forwards per block, and tokens per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from coterie.lab.plotting import (
    IntervalSeries,
    guide_series,
    indexed_style,
    interval_chart,
    line_chart,
)
from coterie.lab.study.accuracy import DES_VOTE
from coterie.lab.study.comparison import (
    PolicyComparison,
    group_series,
    unique_experts_label,
    vanilla_series,
    variant_rows,
)
from coterie.lab.study.experiment import Entry, Experiment, ExperimentText, Part, StudyContext
from coterie.lab.study.results import VariantResults
from coterie.lab.study.variants import GUARD_OPTIONS, short_name

ROUNDS = 5
PAPER_LATENCY_CUT = 0.38  # the paper: latency falls by up to this share


def forward_parts(text: ExperimentText, results: VariantResults) -> Iterator[Part]:
    yield text.drawing("figure", partial(draw_forwards, results))
    yield text.table("forwards", variant_rows(results))
    vanilla, group = results.vanilla, results.groups[DES_VOTE]
    votes = [result for result in group if result.experts < vanilla.experts]
    sentences = []
    for result in (votes[1], votes[-2]):
        ratio = result.experts_per_block / vanilla.experts_per_block
        change = f"{1 - ratio:.0%} fewer" if ratio < 1 else f"{ratio - 1:.0%} more"
        values = {"result": result, "fewer": 1 - result.experts / vanilla.experts}
        sentences.append(text.sentence("policy", vanilla=vanilla, change=change, **values))
    slowest = max(group, key=lambda result: result.forwards_per_block)
    holds = slowest.experts_per_block < vanilla.experts_per_block
    yield text.finding("forwards", holds, policies=" ".join(sentences))


def draw_forwards(results: VariantResults) -> Figure:
    """Forwards against experts; on the guide a policy reads as many experts as vanilla does."""
    vanilla = results.vanilla
    most = max(result.forwards_per_block for result in results.all[1:])
    xs = [vanilla.experts_per_block / (1 + (most - 1) * step / 50) for step in range(51)]
    ys = [vanilla.experts_per_block / x for x in xs]
    groups = [(label, group) for label, group in results.groups.items() if group]
    series = [
        guide_series(xs, ys, "reads as much as vanilla"),
        *(group_series(label, group, "forwards_per_block") for label, group in groups),
        vanilla_series(vanilla, "forwards_per_block"),
    ]
    label = unique_experts_label(results)
    return line_chart(series, label, "forwards per block", xlim=(0, None), ylim=(0, None))


class SpeedExperiment(Experiment, name="speed"):
    """One row at a time, as in interactive use; the policies take turns."""

    def measure(self, context: StudyContext) -> Entry:
        k = context.engine.model.spec.router.k
        policies = [
            "vanilla", f"topk:k={max(1, k // 2)}", f"des-seq:k={min(3, k)}", "des-vote:beta=0.5",
            "des-vote:beta=0.3", "des-vote:beta=0.15", f"des-vote:beta=0.3,{GUARD_OPTIONS}",
        ]  # fmt: skip
        prompts = context.questions()
        timed: dict[str, dict[str, Any]] = {p: {"policy": p, "rounds": []} for p in policies}
        context.engine.generate(prompts[0])  # the first forwards of a process are slow
        for turn in range(ROUNDS):
            for index, (policy, entry) in enumerate(timed.items()):
                share = (turn + index / len(policies)) / ROUNDS
                context.on_progress(share, f"{policy}, round {turn + 1}")
                start = time.perf_counter()
                results = [context.engine.generate(prompt, policy=policy) for prompt in prompts]
                seconds = time.perf_counter() - start
                tokens = sum(result.new_tokens for result in results)
                entry["rounds"].append(tokens / seconds)  # tokens per second
                entry |= {
                    "tokens": tokens,
                    "forwards": sum(result.forwards for result in results),
                    "experts": statistics.fmean(result.experts.mean for result in results),
                }
        return {"timed": list(timed.values()), "prompts": len(prompts)}

    def report(self, record: Entry) -> Iterator[Part]:
        timed, best, cut = timed_policies(record), fastest_des(record), PAPER_LATENCY_CUT
        rows = {
            short_name(entry["policy"]): (entry["slowest"], entry["speed"], entry["fastest"])
            for entry in timed
        }
        series = [IntervalSeries("", indexed_style(0), rows)]
        draw = partial(interval_chart, list(rows), series, "tokens per second")
        yield self.text.drawing("figure", draw)
        yield self.text.table("speed", timed, prompts=record["prompts"], rounds=ROUNDS)
        holds = best["slowest"] > timed[0]["fastest"] and 1 - 1 / best["ratio"] >= cut
        yield self.text.finding("fastest", holds, best=best, vanilla=timed[0], cut=cut)


def timed_policies(record: Entry) -> list[Entry]:
    """The entries with their median ``speed``, extremes, and ``ratio`` to vanilla's speed."""
    speeds = [statistics.median(entry["rounds"]) for entry in record["timed"]]
    return [
        {
            **entry,
            "speed": speed,
            "slowest": min(entry["rounds"]),
            "fastest": max(entry["rounds"]),
            "ratio": speed / speeds[0],
        }
        for entry, speed in zip(record["timed"], speeds, strict=True)
    ]


def fastest_des(record: Entry) -> Entry:
    """The entry of the fastest DES policy."""
    des = [entry for entry in timed_policies(record) if entry["policy"].startswith("des-")]
    return max(des, key=lambda entry: entry["speed"])


# Its runs are shared with the accuracy experiments.
FORWARDS = PolicyComparison.load("forwards", own_parts=forward_parts, has_usual_parts=False)
