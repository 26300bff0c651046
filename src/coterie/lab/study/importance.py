"""Expert importance by ablation beside router weights, and whom each policy elects (Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.lab.plotting import (
    add_legend,
    foreground,
    format_percent,
    grid_colour,
    new_axes,
    policy_style,
)
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.fidelity import sample_layers
from coterie.lab.study.first_forwards import (
    Prompt,
    content_mask,
    kl_divergence,
    prompts_at_block_start,
    relative_squared_error,
    run_first_forward,
)
from coterie.lab.study.rank_stats import mean_interval, spearman
from coterie.routing import parse_policy
from coterie.routing.votes import VOTES, Vote, vote_weights
from coterie.values import Scores, expert_mask

NUM_BLOCKS = 12  # blocks that are taken apart, one a prompt
BATCH_SIZE = 32  # experts that are removed side by side
ImportanceMeasure = Literal["output", "words", "hidden"]
MEASURE_NAMES: Mapping[ImportanceMeasure, str] = {
    "output": "output",
    "words": "output, words",
    "hidden": "hidden state",
}
VOTE_KINDS: tuple[Vote, ...] = ("weight", "topk-prob", "count", "full", "max")
SHARES = ("0.03125", "0.0625", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5", "0.75")
POLICY_CURVES = {
    "DES-Vote": [f"des-vote:beta={share}" for share in SHARES],
    "DES-Seq": [f"des-seq:k={m}" for m in range(1, 8)],
    "words vote, top-1": [f"des-vote:beta={s},voters=before-eos,protect=top1" for s in SHARES],
    "proportional": [f"proportional-vote:beta={share}" for share in SHARES],
    "random": [f"random:beta={share}" for share in SHARES],
}
DRAWN_POLICIES = (
    *("des-vote:beta=0.15", "des-vote:beta=0.3", "des-seq:k=1", "des-seq:k=3"),
    *("des-vote:beta=0.15,voters=before-eos,protect=top1", "random:beta=0.15"),
)


class BlockImportance(TypedDict):
    """One block in one layer, expert by expert: its total router weight, how far the output moves
    without it (mean over positions, nats), and who elects it."""

    layer: int
    weight: list[float]
    importance: list[float]
    elected: dict[str, list[int]]


class VoteCorrelation(TypedDict):
    """Of a vote with importance, mean over blocks and layers; ``used``: among experts in use."""

    vote: str
    every: float
    every_interval: list[float]
    used: float
    used_interval: list[float]
    layers: list[float]  # ``used``, layer by layer


class ImportanceCoverage(TypedDict):
    """The share of all importance that a policy's coresets hold; ``best``: that any could."""

    policy: str
    experts: float
    share: float
    interval: list[float]
    best: float


class ImportanceRecord(TypedDict):
    """``used``: experts that a block uses in a layer; ``flips``: positions at which the removal of
    one expert in use changes what would be written, as a share."""

    experts: int
    k: int
    blocks: int
    layers: list[int]
    used: float
    flips: float
    shown: list[BlockImportance]
    correlations: dict[ImportanceMeasure, list[VoteCorrelation]]
    curves: dict[str, list[ImportanceCoverage]]


@dataclass(frozen=True)
class AblateExpert:
    """Everybody but one expert, in one layer: row s goes without ``experts[s]`` (-1: nobody)."""

    layer: int
    experts: tuple[int, ...]

    def eligible(self, scores: Scores, k: int) -> Tensor:
        if scores.layer != self.layer:
            return scores.logits.new_ones((1, 1, 1), dtype=torch.bool)
        removed = torch.tensor(self.experts, device=scores.logits.device)[:, None]  # [S, 1]
        return ~expert_mask(removed, scores.router.experts)[:, None]


@dataclass(frozen=True)
class LayerAblation:
    """One layer of one block, taken apart. ``importance`` is by measure, [E] float64."""

    layer: int
    scores: Scores
    used: Tensor  # [E] bool
    importances: Mapping[ImportanceMeasure, Tensor]
    flips: float

    @property
    def importance(self) -> Tensor:
        return self.importances["output"]

    def votes(self, definition: Vote) -> NDArray[np.float64]:
        """[E], of everybody."""
        votes = VOTES[definition](self.scores, vote_weights(self.scores, "all"), 0)
        return votes[0].double().cpu().numpy()


@dataclass(frozen=True)
class ImportanceExperiment:
    """The first forward of blocks that are all answer: every expert in use is taken away in turn,
    its tokens get their next best, and the model's output is held against vanilla's."""

    name: str = "importance"
    title: str = "Expert importance and router weight (Fig. 4 left, middle)"
    question: str = (
        "If one expert is taken away from a block, how much does the output change, and could the "
        "router's weights have told?"
    )

    def measure(self, context: StudyContext) -> ExperimentData:
        spec, layers = context.engine.model.spec, sample_layers(context)
        prompts = prompts_at_block_start(context.engine, context.questions())[:NUM_BLOCKS]
        blocks: list[list[LayerAblation]] = []
        for number, prompt in enumerate(prompts):
            blocks.append([])
            for index, layer in enumerate(layers):
                done = (number + index / len(layers)) / len(prompts)
                context.on_progress(done, f"block {number + 1} of {len(prompts)}, layer {layer}")
                blocks[-1].append(ablate_layer(context.engine, prompt, layer))
        all_layers = [layer_ablation for block in blocks for layer_ablation in block]
        flips = [layer_ablation.flips for layer_ablation in all_layers]
        record = ImportanceRecord(
            experts=spec.router.experts,
            k=spec.router.k,
            blocks=len(prompts),
            layers=list(layers),
            used=float(np.mean([int(layer_ablation.used.sum()) for layer_ablation in all_layers])),
            flips=float(np.mean(flips)),
            shown=[
                block_importance(layer_ablation)
                for layer_ablation in max(blocks, key=_total_importance)
            ],
            correlations={
                measure: [vote_correlation(blocks, vote, measure) for vote in VOTE_KINDS]
                for measure in MEASURE_NAMES
            },
            curves={
                name: [importance_coverage(blocks, policy) for policy in family]
                for name, family in POLICY_CURVES.items()
            },
        )
        return cast("ExperimentData", record)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("ImportanceRecord", data)
        ends = dict.fromkeys((0, len(record["shown"]) - 1))
        return [
            *(
                Drawing(
                    f"importance-layer-{record['shown'][index]['layer']}",
                    f"Of {record['blocks']} blocks the one that depends most on single experts, "
                    f"in layer {record['shown'][index]['layer']}: the experts in use by "
                    "their total router weight (above), how far the output moves when each is "
                    "removed (middle, logarithmic, mean over positions), and who elects it (below; "
                    "*: only words vote, top-1 kept).",
                    lambda place=index: draw_block(record["shown"][place]),
                )
                for index in ends
            ),
            Drawing(
                "importance-covered",
                "Share of the summed importance of all experts that a coreset holds, mean over "
                f"{record['blocks']} blocks and their layers. Dashed: the best that a set of that "
                "size can hold.",
                lambda: draw_coverage(record),
            ),
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("ImportanceRecord", data)
        by_measure = list(record["correlations"].values())
        heads = [
            f"{name}: {scope}" for name in MEASURE_NAMES.values() for scope in ("all", "in use")
        ]
        return [
            Table(
                heads=["vote", *heads],
                rows=[
                    [
                        group[0]["vote"],
                        *(cell for entry in group for cell in _format_correlation(entry)),
                    ]
                    for group in zip(*by_measure, strict=True)
                ],
                caption="Rank correlation (Spearman) of an expert's votes in a block with its "
                "importance among all experts and among those in use, mean over "
                f"{record['blocks']} blocks and {len(record['layers'])} layers, with 95 % intervals "
                "over blocks. Importance is measured at the output (divergence, over all "
                "positions or over words), or by how far the last hidden states move.",
                numbers=list(range(1, 1 + len(heads))),
            ),
            Table(
                heads=["policy", "experts elected", "importance held", "best of that size"],
                rows=[
                    [
                        entry["policy"],
                        f"{entry['experts']:.1f}",
                        _format_coverage(entry),
                        f"{entry['best']:.1%}",
                    ]
                    for family in record["curves"].values()
                    for entry in family
                ],
                numbers=[1, 2, 3],
            ),
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("ImportanceRecord", data)
        return [
            _correlation_finding(record),
            _vote_kinds_sentence(record),
            _coverage_finding(record),
            _proportional_sentence(record),
            _redundancy_sentence(record),
        ]


def ablate_layer(engine: Engine, prompt: Prompt, layer: int) -> LayerAblation:
    """Remove every expert in use from one layer of the prompt's first block; the others' removal
    changes nothing."""
    vanilla = run_first_forward(engine, prompt, "vanilla")
    scores, routing = next((s, r) for index, s, r in vanilla.trace.routings if index == layer)
    used = routing.used.nonzero()[:, 0].tolist()
    words = content_mask(engine, vanilla.ids)[0].double().cpu()
    size = len(routing.used)
    measured: dict[ImportanceMeasure, Tensor] = {
        measure: torch.zeros(size, dtype=torch.float64) for measure in MEASURE_NAMES
    }
    flip_share = 0.0
    for first in range(0, len(used), BATCH_SIZE):
        removed = tuple(used[first : first + BATCH_SIZE])
        # One row more goes without nobody: what it differs by is arithmetic, not importance.
        ablated = run_first_forward(
            engine, prompt, AblateExpert(layer, (*removed, -1)), rows=len(removed) + 1
        )
        divergences = kl_divergence(ablated.logits[-1:], ablated.logits)[:-1].cpu()
        measured["output"][list(removed)] = divergences.mean(-1)
        measured["words"][list(removed)] = (divergences * words).sum(-1) / words.sum()
        measured["hidden"][list(removed)] = relative_squared_error(
            ablated.hidden[-1:], ablated.hidden
        )[:-1].cpu()
        flip_share += float((ablated.ids[:-1] != vanilla.ids).double().mean(-1).sum())
    return LayerAblation(layer, scores, routing.used, measured, flip_share / len(used))


def _total_importance(block: Sequence[LayerAblation]) -> float:
    """How much depends on the block's single experts, over all layers."""
    return sum(float(layer_ablation.importance.sum()) for layer_ablation in block)


def block_importance(ablation: LayerAblation) -> BlockImportance:
    return BlockImportance(
        layer=ablation.layer,
        weight=[float(v) for v in ablation.votes("weight") / 2.0**40],
        importance=ablation.importance.tolist(),
        elected={policy: elected_experts(ablation, policy).tolist() for policy in DRAWN_POLICIES},
    )


def elected_experts(ablation: LayerAblation, policy: str) -> NDArray[np.int64]:
    """The experts of the policy's coreset, in their order."""
    mask = parse_policy(policy).eligible(ablation.scores, ablation.scores.router.k)[0, 0]
    return mask.nonzero()[:, 0].cpu().numpy()


def vote_correlation(
    blocks: Sequence[Sequence[LayerAblation]], vote: Vote, measure: ImportanceMeasure
) -> VoteCorrelation:
    """Of ``taken`` [blocks][layers]."""
    all_scores, used_scores = [], []
    for block in blocks:
        pairs = [
            (ablation.votes(vote), ablation.importances[measure].numpy()) for ablation in block
        ]
        all_scores.append([spearman(votes, importance) for votes, importance in pairs])
        masks = [ablation.used.cpu().numpy() for ablation in block]
        used_scores.append([spearman(v[m], i[m]) for (v, i), m in zip(pairs, masks, strict=True)])
    return VoteCorrelation(
        vote=vote,
        every=float(np.mean(all_scores)),
        every_interval=mean_interval(np.mean(all_scores, axis=1)),
        used=float(np.mean(used_scores)),
        used_interval=mean_interval(np.mean(used_scores, axis=1)),
        layers=np.mean(used_scores, axis=0).tolist(),
    )


def importance_coverage(
    blocks: Sequence[Sequence[LayerAblation]], policy: str
) -> ImportanceCoverage:
    """Of ``taken`` [blocks][layers]; a layer in which nothing matters is held whole."""
    shares, best, sizes = [], [], []
    for number, block in enumerate(blocks):
        # A lot is drawn by forward: these are all first ones, and would all draw the same.
        seeded_policy = f"{policy},seed={number}" if policy.startswith("random") else policy
        layer_shares = []
        for ablation in block:
            importance, selected = (
                ablation.importance.numpy(),
                elected_experts(ablation, seeded_policy),
            )
            total = importance.sum() or 1.0
            layer_shares.append(importance[selected].sum() / total)
            best.append(np.sort(importance)[::-1][: len(selected)].sum() / total)
            sizes.append(len(selected))
        shares.append(float(np.mean(layer_shares)))
    return ImportanceCoverage(
        policy=policy,
        experts=float(np.mean(sizes)),
        share=float(np.mean(shares)),
        interval=mean_interval(shares),
        best=float(np.mean(best)),
    )


def draw_block(block: BlockImportance) -> Figure:
    """Three bands over the same experts, the heaviest first."""
    weight, importance = np.array(block["weight"]), np.array(block["importance"])
    ordered = [expert for expert in np.argsort(-weight, kind="stable") if weight[expert] > 0]
    figure, _ = new_axes(height=4.6)
    figure.clear()
    upper, middle, lower = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [1.2, 1.2, 1]}
    )
    positions = np.arange(len(ordered))
    upper.bar(positions, weight[ordered], color=foreground(), width=0.8)
    upper.set_ylabel("router\nweight")
    middle.bar(positions, importance[ordered], color=foreground(), width=0.8)
    middle.set_ylabel("importance\n(nats)")
    highest = importance.max() or 1.0
    middle.set(yscale="log", ylim=(highest * 1e-6, highest * 2))
    names = list(block["elected"])
    for row, policy in enumerate(names):
        coreset = set(block["elected"][policy])
        style = policy_style(policy)
        for position in positions:
            is_elected = ordered[position] in coreset
            lower.bar(
                position, 0.7, 0.8, row - 0.35, color=style.colour if is_elected else grid_colour()
            )
    lower.set(yticks=range(len(names)), xlim=(-1, len(ordered)), ylim=(len(names) - 0.4, -0.6))
    lower.set_yticklabels([_short_name(policy) for policy in names], fontsize=8)
    lower.set_xlabel(f"experts in use in layer {block['layer']}, by router weight")
    lower.grid(visible=False)
    upper.grid(visible=False, axis="x")
    middle.grid(visible=False, axis="x")
    return figure


def draw_coverage(record: ImportanceRecord) -> Figure:
    figure, ax = new_axes(f"experts elected of {record['experts']}", "importance held")
    best = [(point["experts"], point["best"]) for point in record["curves"]["DES-Vote"]]
    ax.plot(*zip(*best, strict=True), color=foreground(), linestyle="--", linewidth=1, label="best")
    for name, family in record["curves"].items():
        style = policy_style(family[0]["policy"])
        shares = [point["share"] for point in family]
        ends = [point["interval"] for point in family]
        ax.errorbar(
            [point["experts"] for point in family],
            shares,
            yerr=[
                [max(0.0, share - low) for share, (low, _) in zip(shares, ends, strict=True)],
                [max(0.0, high - share) for share, (_, high) in zip(shares, ends, strict=True)],
            ],
            color=style.colour,
            marker=style.marker,
            elinewidth=0.8,
            label=name,
        )
    ax.set(xlim=(0, None), ylim=(0, 1.03))
    format_percent(ax)
    add_legend(ax, columns=3)
    return figure


def _short_name(policy: str) -> str:
    family, _, options = policy.partition(":")
    size = options.split(",")[0]
    return f"{family} {size}" + (" *" if "voters" in options else "")


def _format_coverage(coverage: ImportanceCoverage) -> str:
    low, high = coverage["interval"]
    return f"{coverage['share']:.1%} ({low:.1%} to {high:.1%})"


def _format_correlation(correlation: VoteCorrelation) -> tuple[str, str]:
    """Of all experts, of those in use."""
    (a, b), (c, d) = correlation["every_interval"], correlation["used_interval"]
    return (
        f"{correlation['every']:.2f} ({a:.2f} to {b:.2f})",
        f"{correlation['used']:.2f} ({c:.2f} to {d:.2f})",
    )


def _correlation_finding(record: ImportanceRecord) -> Finding:
    weight, hidden = (record["correlations"][measure][0] for measure in ("output", "hidden"))
    low, high = weight["used_interval"]
    return Finding(
        f"Total router weight and importance correlate by {weight['used']:.2f} ({low:.2f} to "
        f"{high:.2f}) in rank among the experts in use, by {weight['every']:.2f} among all "
        f"{record['experts']}. Where importance is how far the last hidden states move, among those "
        f"in use: {hidden['used']:.2f}.",
        claim="Router weight predicts how much an expert matters to a block.",
        verdict="holds" if low > 0.5 else "does not hold" if high < 0.5 else "cannot be told here",
    )


def _vote_kinds_sentence(record: ImportanceRecord) -> str:
    best = max(record["correlations"]["output"], key=lambda one: one["used"])
    text = ", ".join(
        f"`{entry['vote']}` {entry['used']:.2f}" for entry in record["correlations"]["output"]
    )
    return f"Among experts in use, the votes rank importance so: {text}; best is `{best['vote']}`."


def _coverage_finding(record: ImportanceRecord) -> Finding:
    seq = record["curves"]["DES-Seq"]
    vote = record["curves"]["DES-Vote"]
    sizes, shares = ([point[name] for point in vote] for name in ("experts", "share"))
    wins = [float(np.interp(p["experts"], sizes, shares)) > p["share"] for p in seq]
    example = next((p for p in vote if p["policy"] == "des-vote:beta=0.3"), vote[0])
    return Finding(
        f"{example['policy']} holds {example['share']:.0%} of all importance in {example['experts']:.0f} "
        f"experts, where {example['best']:.0%} is possible. At DES-Seq's sizes Vote holds more at "
        f"{sum(wins)} of {len(wins)}.",
        claim="A voted coreset keeps the experts that matter, more of them than Seq of its size.",
        verdict="holds" if all(wins) else "cannot be told here" if any(wins) else "does not hold",
    )


def _proportional_sentence(record: ImportanceRecord) -> str:
    vote, proportional = record["curves"]["DES-Vote"], record["curves"]["proportional"]
    pairs = list(zip(vote, proportional, strict=True))
    wins = sum(b["share"] > a["share"] for a, b in pairs)
    vote_point, own_point = pairs[3]
    return (
        "`proportional-vote` holds more of the importance than DES-Vote of the same size at "
        f"{wins} of {len(pairs)} sizes; at {own_point['experts']:.0f} experts {own_point['share']:.0%} "
        f"against {vote_point['share']:.0%}."
    )


def _redundancy_sentence(record: ImportanceRecord) -> str:
    return (
        f"A block uses {record['used']:.0f} experts in a layer; taking one of them away changes "
        f"what would be written at {record['flips']:.2%} of its positions."
    )
