"""The expert explosion (Fig. 1a): how many experts a block uses as it grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from coterie.engine.observation import LayerObservation, observe_forwards
from coterie.errors import CoterieError, TaskError
from coterie.lab.plotting import dash_repeats, guide_series, line_chart, policy_series
from coterie.lab.study.experiment import Entry, Experiment, Part, StudyContext
from coterie.lab.study.variants import coreset_size
from coterie.telemetry import routing_stats

BLOCK_SIZES = (8, 16, 24, 32, 48, 64)
POLICIES = ("vanilla", "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
SLOW_UNMASK = "fixed:steps=32"  # it passes every number of masks


@dataclass(frozen=True)
class ExplosionExperiment(Experiment, name="explosion"):
    """Unique experts of every decoding forward on real prompts, by block size and policy.

    The ``budget`` of a curve is the size of the policy's coreset where that is fixed. ``masked``
    has vanilla forwards of the ``usual`` block by positions still masked.
    """

    blocks: Sequence[int] = BLOCK_SIZES

    def measure(self, context: StudyContext) -> Entry:
        prompts, spec = context.questions(), context.engine.model.spec
        curves: dict[str, list[Entry]] = {policy: [] for policy in POLICIES}
        skipped: dict[int, str] = {}
        runs = list(product(self.blocks, POLICIES))
        for number, (block, policy) in enumerate(runs):
            context.on_progress(number / (len(runs) + 1), f"blocks of {block}, {policy}")
            if block in skipped:
                continue
            try:
                counts, _ = count_experts(context, prompts, policy, block=block)
            except CoterieError as error:
                skipped[block] = self.text.sentence("skipped", block=block, error=error)
                continue
            curves[policy].append(summarize_block_size(block, counts))
        context.on_progress(len(runs) / (len(runs) + 1), "slow decoding")
        usual, half = context.engine.generation.block, prompts[: -(-len(prompts) // 2)]
        counts, masked = count_experts(context, half, block=usual, unmask=SLOW_UNMASK)
        votes = [policy for policy in POLICIES if policy.startswith("des-vote")]
        budgets = {policy: coreset_size(policy, spec.router.experts) for policy in votes}
        return {
            "experts": spec.router.experts,
            "k": spec.router.k,
            "usual": usual,
            "prompts": len(prompts),
            "layers": list(spec.moe_layers),
            "curves": [
                {"policy": p, "budget": budgets.get(p), "points": points}
                for p, points in curves.items()
            ],
            "masked": bin_by_masked(masked, counts.mean(dim=0), usual),
            "skipped": list(skipped.values()),
        }

    def report(self, record: Entry) -> Iterator[Part]:
        experts, k, curves, text = record["experts"], record["k"], record["curves"], self.text
        y, masked = f"unique experts of {experts}", record["masked"]
        yield text.drawing("blocks", partial(_draw_blocks, record, y))
        means = [[entry[key] for entry in masked] for key in ("masked", "mean")]
        series = policy_series("vanilla", *means)
        limits = {"xlim": (record["usual"] + 1, 0), "ylim": (0, experts)}
        draw = partial(line_chart, [series], "positions still masked", y, **limits)
        yield text.drawing("masked", draw, f"{self.name}-masked", record=record)
        points = curves[0]["points"]
        uniform = [expected_uniform(experts, k, point["block"]) for point in points]
        rows = [(each["policy"], *(p["mean"] for p in each["points"])) for each in curves]
        columns = {f"block {p['block']}": f"{{0[{i}]:.1f}}" for i, p in enumerate(points, start=1)}
        yield text.table("blocks", [*rows, ("random routing", *uniform)], columns, record=record)
        ends = {"first": points[0], "last": points[-1], "times": points[-1]["mean"] / k}
        grows = len(points) > 1 and all(a["mean"] < b["mean"] for a, b in pairwise(points))
        yield text.finding("growth", grows, record=record, **ends)
        shares = [point["mean"] / mean for point, mean in zip(points, uniform, strict=True)]
        yield text.finding("skew", max(shares) < 1, low=min(shares), high=max(shares))
        for curve in (curve for curve in curves if curve["budget"] is not None):
            own = curve["points"]
            holds = max(point["high"] for point in own) <= curve["budget"]
            yield text.finding("flat", holds, curve=curve, first=own[0], last=own[-1])
        yield from record["skipped"]


def expected_uniform(experts: int, k: int, tokens: float) -> float:
    """Expected unique experts under uniform random routing: M (1 - (1 - K/M)^N)."""
    return experts * (1 - (1 - k / experts) ** tokens)


def summarize_block_size(block: int, counts: Tensor) -> Entry:
    """From unique experts [L, F]: mean and quartiles over forwards of the mean over layers.

    ``layers`` are the means of each layer over forwards.
    """
    counts = counts.double()
    low, high = torch.quantile(counts.mean(dim=0), torch.tensor([0.25, 0.75]).double()).tolist()
    return {
        "block": block,
        "forwards": counts.shape[1],
        "mean": float(counts.mean()),
        "low": low,
        "high": high,
        "layers": counts.mean(dim=1).tolist(),
    }


def bin_by_masked(masked: Tensor, mean: Tensor, block: int) -> list[Entry]:
    """Means over forwards with similar numbers of masks; a bin is an eighth of a block."""
    bin_index = ((masked.double() - 1) * 8 / block).floor().clamp(0, 7)
    return [
        {
            "masked": float(masked[in_bin].double().mean()),
            "forwards": int(in_bin.sum()),
            "mean": float(mean[in_bin].double().mean()),
        }
        for in_bin in (bin_index == index for index in range(8))
        if bool(in_bin.any())
    ]


def count_experts(
    context: StudyContext, prompts: Sequence[str], policy: str = "vanilla", **options: Any
) -> tuple[Tensor, Tensor]:
    """Unique experts [L, F] of every row and decoding forward, and positions still masked [F]."""
    layers = context.engine.model.spec.moe_layers
    unique: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    masked: list[Tensor] = []

    def on_layer(observation: LayerObservation) -> None:
        stats = routing_stats(observation.scores, observation.routing)
        unique[observation.layer].append(stats[:, 0].cpu())
        progress = observation.scores.progress
        if observation.layer == layers[0] and progress is not None and progress.masked is not None:
            masked.append(progress.masked.sum(dim=1).cpu())

    observe_forwards(context.engine, prompts, on_layer, policy=policy, **options)
    if not masked:
        raise TaskError("no decoding forward was made")
    return torch.stack([torch.cat(counts) for counts in unique.values()]), torch.cat(masked)


def _draw_blocks(record: Entry, y: str) -> Figure:
    """One line per policy, and the range of the layers under vanilla."""
    experts, curves = record["experts"], record["curves"]
    span = range(1, curves[0]["points"][-1]["block"] + 1)
    uniform = [expected_uniform(experts, record["k"], tokens) for tokens in span]
    series = [guide_series(span, uniform, "random routing")]
    for curve, line in zip(curves, dash_repeats([c["policy"] for c in curves]), strict=True):
        points = curve["points"]
        blocks, means = [p["block"] for p in points], [p["mean"] for p in points]
        ranges = [(min(point["layers"]), max(point["layers"])) for point in points]
        intervals = ranges if curve is curves[0] else None
        series.append(policy_series(curve["policy"], blocks, means, line=line, intervals=intervals))
    return line_chart(series, "block size (positions)", y, xlim=(4, None), ylim=(0, experts))
