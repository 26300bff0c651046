"""The expert explosion (Fig. 1a): how many experts a block uses as it grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

import torch
from matplotlib.figure import Figure
from torch import Tensor

from coterie.engine.observation import LayerObservation, observe_forwards
from coterie.errors import CoterieError, TaskError
from coterie.lab.plotting import add_legend, new_axes, policy_colour
from coterie.lab.study.charts import LineStyle, draw_guide, draw_series, line_chart, policy_series
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    judge,
    make_table,
)
from coterie.telemetry import routing_stats

BLOCK_SIZES = (8, 16, 24, 32, 48, 64)
VANILLA = "vanilla"
POLICIES = (VANILLA, "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
STEPS = 32  # forwards per block in slow decoding, which passes every number of masks
DASHES: Sequence[LineStyle] = ("-", (0, (1, 1.5)), (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)))


class BlockSizePoint(TypedDict):
    """Unique experts at one block size: mean and quartiles over forwards of the mean over layers.

    ``layers`` are the means of each layer over forwards.
    """

    block: int
    forwards: int
    mean: float
    low: float
    high: float
    layers: list[float]


class ExplosionCurve(TypedDict):
    """One policy; ``budget`` is the size of its coreset where that is fixed."""

    policy: str
    budget: int | None
    points: list[BlockSizePoint]


class MaskedCount(TypedDict):
    """Vanilla forwards of the usual block with about ``masked`` positions still masked."""

    masked: float
    forwards: int
    mean: float


class ExplosionRecord(TypedDict):
    """``skipped`` explains block sizes that were not measured."""

    experts: int
    k: int
    usual: int
    prompts: int
    layers: list[int]
    curves: list[ExplosionCurve]
    masked: list[MaskedCount]
    skipped: list[str]


@dataclass(frozen=True)
class ExplosionExperiment(Experiment):
    """Unique experts of every decoding forward on real prompts, by block size and policy."""

    text = ExperimentText.load("explosion")

    blocks: Sequence[int] = BLOCK_SIZES

    def measure(self, context: StudyContext) -> ExplosionRecord:
        prompts = context.questions()
        curves: dict[str, list[BlockSizePoint]] = {policy: [] for policy in POLICIES}
        skipped: dict[int, str] = {}
        runs = [(block, policy) for block in self.blocks for policy in POLICIES]
        for number, (block, policy) in enumerate(runs):
            context.on_progress(number / (len(runs) + 1), f"blocks of {block}, {policy}")
            if block in skipped:
                continue
            try:
                counts = _count_experts(context, prompts, policy, block=block)
            except CoterieError as error:
                skipped[block] = f"Blocks of {block} are not measured: {error}."
                continue
            curves[policy].append(summarize_block_size(block, counts.per_layer))
        context.on_progress(len(runs) / (len(runs) + 1), "slow decoding")
        spec, block = context.engine.model.spec, context.engine.generation.block
        half, unmask = prompts[: -(-len(prompts) // 2)], f"fixed:steps={STEPS}"
        slow = _count_experts(context, half, VANILLA, block=block, unmask=unmask)
        return ExplosionRecord(
            experts=spec.router.experts,
            k=spec.router.k,
            usual=block,
            prompts=len(prompts),
            layers=list(spec.moe_layers),
            curves=[
                ExplosionCurve(
                    policy=policy, budget=coreset_budget(policy, spec.router.experts), points=points
                )
                for policy, points in curves.items()
            ],
            masked=bin_by_masked(slow.masked, slow.mean, block),
            skipped=list(skipped.values()),
        )

    def drawings(self, record: ExplosionRecord) -> Sequence[Drawing]:
        bins, y = record["masked"], f"unique experts of {record['experts']}"
        masked_series = policy_series(
            VANILLA, [entry["masked"] for entry in bins], [entry["mean"] for entry in bins]
        )
        xlim, ylim = (record["usual"] + 1, 0), (0, record["experts"])
        return [
            Drawing(
                self.name,
                "Unique experts of a decoding forward against block size, mean over layers and "
                "forwards. The band covers the layers under vanilla. Dashed, at the top: uniform "
                "random routing.",
                lambda: _draw_blocks(record),
            ),
            Drawing(
                f"{self.name}-masked",
                f"Unique experts under vanilla for blocks of {record['usual']}, against the number "
                "of positions still masked, in slow decoding.",
                lambda: line_chart(
                    [masked_series], "positions still masked", y, xlim=xlim, ylim=ylim
                ),
            ),
        ]

    def tables(self, record: ExplosionRecord) -> Sequence[Table]:
        experts, k = record["experts"], record["k"]
        blocks = [point["block"] for point in record["curves"][0]["points"]]
        rows = [
            *([c["policy"], *(f"{p['mean']:.1f}" for p in c["points"])] for c in record["curves"]),
            ["random routing", *(f"{expected_uniform(experts, k, block):.1f}" for block in blocks)],
        ]
        caption = (
            f"Unique experts of {experts}, mean over layers and forwards; {record['prompts']} "
            f"prompts. Each token uses {k}."
        )
        heads = ["policy", *(f"block {block}" for block in blocks)]
        return [make_table(caption, rows, {h: f"{{0[{i}]}}" for i, h in enumerate(heads)})]

    def findings(self, record: ExplosionRecord) -> Sequence[Finding | str]:
        elected = [curve for curve in record["curves"] if curve["budget"] is not None]
        return [
            _growth_finding(record),
            _skew_finding(record),
            *map(_flatness_finding, elected),
            *record["skipped"],
        ]


@dataclass(frozen=True)
class UniqueExpertCounts:
    """Unique experts of every row and forward."""

    per_layer: Mapping[int, Tensor]  # layer -> [rows and forwards]
    masked: Tensor  # [rows and forwards], positions still masked

    @property
    def mean(self) -> Tensor:
        """The mean over layers, [rows and forwards]."""
        return torch.stack(list(self.per_layer.values())).mean(dim=0)


def expected_uniform(experts: int, k: int, tokens: float) -> float:
    """Expected unique experts under uniform random routing: M (1 - (1 - K/M)^N)."""
    return experts * (1 - (1 - k / experts) ** tokens)


def coreset_budget(policy: str, experts: int) -> int | None:
    """The coreset size of the DES-Vote policies in ``POLICIES``; None for the other policies."""
    family, _, beta = policy.partition(":beta=")
    return int(float(beta) * experts + 1e-9) if family == "des-vote" else None


def summarize_block_size(block: int, per_layer: Mapping[int, Tensor]) -> BlockSizePoint:
    """From layer -> unique experts of every forward, in the same order."""
    counts = torch.stack(list(per_layer.values())).double()  # [layers, forwards]
    low, high = torch.quantile(counts.mean(dim=0), torch.tensor([0.25, 0.75]).double()).tolist()
    return BlockSizePoint(
        block=block,
        forwards=counts.shape[1],
        mean=float(counts.mean()),
        low=low,
        high=high,
        layers=counts.mean(dim=1).tolist(),
    )


def bin_by_masked(masked: Tensor, mean: Tensor, block: int, bins: int = 8) -> list[MaskedCount]:
    """Means over forwards with similar numbers of masks; a bin is an eighth of a block."""
    bin_index = ((masked.double() - 1) * bins / block).floor().clamp(0, bins - 1)
    selections = [bin_index == index for index in range(bins)]
    return [
        MaskedCount(
            masked=float(masked[in_bin].double().mean()),
            forwards=int(in_bin.sum()),
            mean=float(mean[in_bin].double().mean()),
        )
        for in_bin in selections
        if bool(in_bin.any())
    ]


def _count_experts(
    context: StudyContext,
    prompts: Sequence[str],
    policy: str,
    *,
    block: int,
    unmask: str | None = None,
) -> UniqueExpertCounts:
    """Unique experts of every decoding forward of these prompts."""
    layers = context.engine.model.spec.moe_layers
    per_layer: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    masked: list[Tensor] = []

    def on_layer(observation: LayerObservation) -> None:
        stats = routing_stats(observation.scores, observation.routing)
        per_layer[observation.layer].append(stats[:, 0].cpu())
        progress = observation.scores.progress
        is_first = observation.layer == min(layers)
        if is_first and progress is not None and progress.masked is not None:
            masked.append(progress.masked.sum(dim=1).cpu())

    unmask = unmask or context.engine.generation.unmask
    observe_forwards(context.engine, prompts, on_layer, policy=policy, block=block, unmask=unmask)
    if not masked:
        raise TaskError("no decoding forward was made")
    counts = {layer: torch.cat(stats) for layer, stats in per_layer.items()}
    return UniqueExpertCounts(counts, torch.cat(masked))


def _draw_blocks(record: ExplosionRecord) -> Figure:
    figure, ax = new_axes("block size (positions)", f"unique experts of {record['experts']}")
    sizes = [point["block"] for point in record["curves"][0]["points"]]
    span = range(1, sizes[-1] + 1)
    uniform = [expected_uniform(record["experts"], record["k"], tokens) for tokens in span]
    draw_guide(ax, span, uniform, "random routing")
    for curve, dashes in zip(record["curves"], DASHES, strict=True):
        policy, points = curve["policy"], curve["points"]
        blocks = [point["block"] for point in points]
        if policy == VANILLA:
            lowest, highest = ([edge(p["layers"]) for p in points] for edge in (min, max))
            colour = policy_colour(policy)
            ax.fill_between(blocks, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        means = [point["mean"] for point in points]
        draw_series(ax, policy_series(policy, blocks, means, line=dashes))
    ax.set(xticks=sizes, xlim=(4, sizes[-1] + 2), ylim=(0, record["experts"]))
    add_legend(ax)
    return figure


def _growth_finding(record: ExplosionRecord) -> Finding:
    points = record["curves"][0]["points"]
    first, last = points[0], points[-1]
    return judge(
        f"Under vanilla a forward uses {first['mean']:.0f} experts of {record['experts']} with "
        f"blocks of {first['block']} and {last['mean']:.0f} with blocks of {last['block']}, "
        f"{last['mean'] / record['k']:.1f} times the experts of one token.",
        "The experts that a forward reads grow with the block, far beyond those of one token.",
        all(a["mean"] < b["mean"] for a, b in pairwise(points)) and len(points) > 1,
    )


def _skew_finding(record: ExplosionRecord) -> Finding:
    experts, k = record["experts"], record["k"]
    points = record["curves"][0]["points"]
    shares = [point["mean"] / expected_uniform(experts, k, point["block"]) for point in points]
    return judge(
        f"That is {min(shares):.0%} to {max(shares):.0%} of the experts under uniform random "
        "routing: the tokens of a block select many of the same experts.",
        "Tokens share experts: a forward uses fewer than under uniform random routing (84 against "
        "163 of 256).",
        max(shares) < 1,
    )


def _flatness_finding(curve: ExplosionCurve) -> Finding:
    points, coreset_size = curve["points"], curve["budget"] or 0
    return judge(
        f"Under {curve['policy']} a forward uses {points[0]['mean']:.1f} experts with blocks of "
        f"{points[0]['block']} and {points[-1]['mean']:.1f} with blocks of {points[-1]['block']}; "
        f"the coreset has {coreset_size}.",
        "With an elected coreset, the experts read do not depend on the number of tokens decoded "
        "together.",
        max(point["high"] for point in points) <= coreset_size,
    )
