"""The expert explosion (Fig. 1a): how many experts a block asks for as it grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor

from coterie.engine.observation import LayerObservation, observe_forwards
from coterie.errors import CoterieError
from coterie.lab.plotting import add_legend, foreground, new_axes, policy_colour, policy_style
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.telemetry import routing_stats

BLOCK_SIZES = (8, 16, 24, 32, 48, 64)
VANILLA = "vanilla"
POLICIES = (VANILLA, "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
STEPS = 32  # of the slow decoding that passes every count of masks
DASHES = ("-", (0, (1, 1.5)), (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)))


class BlockSizePoint(TypedDict):
    """Unique experts of the forwards at one block size: quartiles over forwards of the mean over
    layers, and each layer's mean over forwards."""

    block: int
    forwards: int
    mean: float
    low: float
    high: float
    layers: list[float]


class ExplosionCurve(TypedDict):
    """One policy; ``budget`` is the size of its coreset where it has a fixed one."""

    policy: str
    budget: int | None
    points: list[BlockSizePoint]


class MaskedCount(TypedDict):
    """Vanilla forwards of the usual block with about so many positions still masked."""

    masked: float
    forwards: int
    mean: float


class ExplosionRecord(TypedDict):
    """``skipped`` says in sentences what could not be run."""

    experts: int
    k: int
    usual: int
    prompts: int
    layers: list[int]
    curves: list[ExplosionCurve]
    masked: list[MaskedCount]
    skipped: list[str]


@dataclass(frozen=True)
class ExplosionExperiment:
    """Real prompts through the engine, block size by block size, every decoding forward counted."""

    name: str = "explosion"
    title: str = "The expert explosion (Fig. 1a)"
    question: str = (
        "A block of words is computed together, and each word asks for its own experts. "
        "How many different experts does the whole block ask for, as blocks grow?"
    )

    blocks: Sequence[int] = BLOCK_SIZES

    def measure(self, context: StudyContext) -> ExperimentData:
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
                skipped[block] = f"Blocks of {block} were left out: {error}."
                continue
            curves[policy].append(summarize_block_size(block, counts.per_layer))
        context.on_progress(len(runs) / (len(runs) + 1), "one word at a time")
        spec, default_block = context.engine.model.spec, context.engine.generation.block
        slow = _count_experts(
            context,
            prompts[: -(-len(prompts) // 2)],
            VANILLA,
            block=default_block,
            unmask=f"fixed:steps={STEPS}",
        )
        record = ExplosionRecord(
            experts=spec.router.experts,
            k=spec.router.k,
            usual=default_block,
            prompts=len(prompts),
            layers=list(spec.moe_layers),
            curves=[
                ExplosionCurve(
                    policy=policy, budget=coreset_budget(policy, spec.router.experts), points=points
                )
                for policy, points in curves.items()
            ],
            masked=bin_by_masked(slow.masked, slow.mean, default_block),
            skipped=list(skipped.values()),
        )
        return cast("ExperimentData", record)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("ExplosionRecord", data)
        return [
            Drawing(
                self.name,
                "Unique experts of a decoding forward against block size, mean over layers and "
                "forwards; the band spans the layers under vanilla. Broken above: what routing by "
                "lot would touch.",
                lambda: _draw_blocks(record),
            ),
            Drawing(
                f"{self.name}-masked",
                f"The same under vanilla for blocks of {record['usual']}, against the positions "
                "still masked, decoding one word at a time.",
                lambda: _draw_masked(record),
            ),
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("ExplosionRecord", data)
        blocks = [point["block"] for point in record["curves"][0]["points"]]
        rows = [
            [curve["policy"], *(f"{point['mean']:.1f}" for point in curve["points"])]
            for curve in record["curves"]
        ]
        random_row = [
            f"{expected_uniform(record['experts'], record['k'], block):.1f}" for block in blocks
        ]
        return [
            Table(
                heads=["policy", *(f"block {block}" for block in blocks)],
                rows=[*rows, ["by lot", *random_row]],
                caption=f"Unique experts of {record['experts']}, mean over layers and forwards; "
                f"{record['prompts']} prompts. Each token takes {record['k']}.",
                numbers=list(range(1, len(blocks) + 1)),
            )
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("ExplosionRecord", data)
        voted = [curve for curve in record["curves"] if curve["budget"] is not None]
        return [
            _growth_finding(record),
            _skew_finding(record),
            *map(_flatness_finding, voted),
            *record["skipped"],
        ]


@dataclass(frozen=True)
class UniqueExpertCounts:
    """Unique experts row by row, forward by forward."""

    per_layer: Mapping[int, Tensor]  # layer -> [rows and forwards]
    masked: Tensor  # [rows and forwards], positions still masked

    @property
    def mean(self) -> Tensor:
        """Over layers, [rows and forwards]."""
        return torch.stack(list(self.per_layer.values())).mean(dim=0)


def expected_uniform(experts: int, k: int, tokens: float) -> float:
    """Unique experts if every token drew its own by lot: M (1 - (1 - K/M)^N)."""
    return experts * (1 - (1 - k / experts) ** tokens)


def coreset_budget(policy: str, experts: int) -> int | None:
    """Of the DES-Vote policies in ``POLICIES``: the experts of a coreset."""
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
    """Means over forwards with nearly as many masks, an eighth of a block together."""
    bin_index = ((masked.double() - 1) * bins / block).floor().clamp(0, bins - 1)
    entries = []
    for number in range(bins):
        in_bin = bin_index == number
        if bool(in_bin.any()):
            entries.append(
                MaskedCount(
                    masked=float(masked[in_bin].double().mean()),
                    forwards=int(in_bin.sum()),
                    mean=float(mean[in_bin].double().mean()),
                )
            )
    return entries


def _count_experts(
    context: StudyContext,
    prompts: Sequence[str],
    policy: str,
    *,
    block: int,
    unmask: str | None = None,
) -> UniqueExpertCounts:
    """What every decoding forward of these prompts used."""
    unmask = unmask or context.engine.generation.unmask
    per_layer: dict[int, list[Tensor]] = {
        layer: [] for layer in context.engine.model.spec.moe_layers
    }
    masked: list[Tensor] = []

    def on_layer(observation: LayerObservation) -> None:
        per_layer[observation.layer].append(
            routing_stats(observation.scores, observation.routing)[:, 0].cpu()
        )
        progress = observation.scores.progress
        if (
            observation.layer == min(per_layer)
            and progress is not None
            and progress.masked is not None
        ):
            masked.append(progress.masked.sum(dim=1).cpu())

    observe_forwards(context.engine, prompts, on_layer, policy=policy, block=block, unmask=unmask)
    if not masked:
        raise CoterieError("no decoding forward was made")
    return UniqueExpertCounts(
        {layer: torch.cat(counts) for layer, counts in per_layer.items()}, torch.cat(masked)
    )


def _draw_blocks(record: ExplosionRecord) -> Figure:
    figure, ax = new_axes("block size (positions)", f"unique experts of {record['experts']}")
    sizes = [point["block"] for point in record["curves"][0]["points"]]
    span = range(1, sizes[-1] + 1)
    expected = [expected_uniform(record["experts"], record["k"], tokens) for tokens in span]
    ax.plot(span, expected, color=foreground(), linestyle="--", linewidth=1, label="by lot")
    for curve, dashes in zip(record["curves"], DASHES, strict=True):
        policy, points = curve["policy"], curve["points"]
        blocks = [point["block"] for point in points]
        if policy == VANILLA:
            lowest, highest = ([edge(p["layers"]) for p in points] for edge in (min, max))
            ax.fill_between(
                blocks, lowest, highest, color=policy_colour(policy), alpha=0.2, linewidth=0
            )
        ax.plot(
            blocks,
            [point["mean"] for point in points],
            color=policy_colour(policy),
            marker=policy_style(policy).marker,
            linestyle=dashes,
            label=policy,
        )
    ax.set(xticks=sizes, xlim=(4, sizes[-1] + 2), ylim=(0, record["experts"]))
    add_legend(ax)
    return figure


def _draw_masked(record: ExplosionRecord) -> Figure:
    figure, ax = new_axes("positions still masked", f"unique experts of {record['experts']}")
    bins = record["masked"]
    ax.plot(
        [entry["masked"] for entry in bins],
        [entry["mean"] for entry in bins],
        color=policy_colour(VANILLA),
        marker=policy_style(VANILLA).marker,
    )
    ax.set(ylim=(0, record["experts"]), xlim=(record["usual"] + 1, 0))
    return figure


def _growth_finding(record: ExplosionRecord) -> Finding:
    points = record["curves"][0]["points"]
    first, last = points[0], points[-1]
    grows = all(a["mean"] < b["mean"] for a, b in pairwise(points)) and len(points) > 1
    return Finding(
        f"Under vanilla a forward touches {first['mean']:.0f} experts of {record['experts']} with "
        f"blocks of {first['block']} and {last['mean']:.0f} with blocks of {last['block']}, "
        f"{last['mean'] / record['k']:.1f} times what one token uses.",
        claim="The experts that a forward reads grow with the block, far past those of one token.",
        verdict="holds" if grows else "does not hold",
    )


def _skew_finding(record: ExplosionRecord) -> Finding:
    points = record["curves"][0]["points"]
    shares = [
        p["mean"] / expected_uniform(record["experts"], record["k"], p["block"]) for p in points
    ]
    return Finding(
        f"That is {min(shares):.0%} to {max(shares):.0%} of what routing by lot would touch: "
        "words of one block want many of the same experts.",
        claim="Real routing shares experts: fewer are touched than by lot (84 of 163 for 256).",
        verdict="holds" if max(shares) < 1 else "does not hold",
    )


def _flatness_finding(curve: ExplosionCurve) -> Finding:
    points, coreset_size = curve["points"], curve["budget"] or 0
    largest = max(point["high"] for point in points)
    return Finding(
        f"Under {curve['policy']} it touches {points[0]['mean']:.1f} with blocks of "
        f"{points[0]['block']} and {points[-1]['mean']:.1f} with blocks of {points[-1]['block']}; "
        f"the coreset holds {coreset_size}.",
        claim="A voted coreset decouples what is read from how many tokens are decoded together.",
        verdict="holds" if largest <= coreset_size else "does not hold",
    )
