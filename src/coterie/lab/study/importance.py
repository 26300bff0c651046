"""Expert importance by ablation, compared with router weights and elections (Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.lab.plotting import (
    FIGURE_WIDTH,
    add_legend,
    foreground,
    format_percent,
    grid_colour,
    new_axes,
    policy_style,
)
from coterie.lab.study.charts import draw_guide, draw_series, policy_series
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    format_interval,
    judge,
    make_table,
)
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
from coterie.lab.study.variants import GUARD_OPTIONS
from coterie.routing import parse_policy
from coterie.routing.votes import VOTES, Vote, vote_weights
from coterie.values import Scores, expert_mask

NUM_BLOCKS = 12  # blocks ablated, one per prompt
BATCH_SIZE = 32  # experts removed in one batch
ImportanceMeasure = Literal["output", "words", "hidden"]
MEASURE_NAMES: Mapping[ImportanceMeasure, str] = {
    "output": "output",
    "words": "output, answer tokens",
    "hidden": "hidden state",
}
VOTE_KINDS: tuple[Vote, ...] = ("weight", "topk-prob", "count", "full", "max")
SHARES = ("0.03125", "0.0625", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5", "0.75")
POLICY_CURVES = {
    "DES-Vote": [f"des-vote:beta={share}" for share in SHARES],
    "DES-Seq": [f"des-seq:k={m}" for m in range(1, 8)],
    "DES-Vote, guarded": [f"des-vote:beta={share},{GUARD_OPTIONS}" for share in SHARES],
    "proportional": [f"proportional-vote:beta={share}" for share in SHARES],
    "random": [f"random:beta={share}" for share in SHARES],
}
DRAWN_POLICIES = (
    *("des-vote:beta=0.15", "des-vote:beta=0.3", "des-seq:k=1", "des-seq:k=3"),
    *(f"des-vote:beta=0.15,{GUARD_OPTIONS}", "random:beta=0.15"),
)


class BlockImportance(TypedDict):
    """One block in one layer, by expert: router weight, importance, and the electing policies.

    ``importance`` is the divergence of the output without the expert, in nats per position.
    """

    layer: int
    weight: list[float]
    importance: list[float]
    elected: dict[str, list[int]]


class VoteCorrelation(TypedDict):
    """Rank correlation of a vote with importance, mean over blocks and layers.

    ``every`` is over all experts, ``used`` over those in use, ``layers`` is ``used`` by layer.
    """

    vote: str
    every: float
    every_interval: list[float]
    used: float
    used_interval: list[float]
    layers: list[float]


class ImportanceCoverage(TypedDict):
    """The share of all importance in a policy's coresets; ``best`` is the maximum at that size."""

    policy: str
    experts: float
    share: float
    interval: list[float]
    best: float


class ImportanceRecord(TypedDict):
    """``used``: experts in use per layer of a block.

    ``flips``: the share of tokens that change when one expert in use is removed.
    """

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
    """All experts but one, in one layer: row s cannot use ``experts[s]`` (-1 removes none)."""

    layer: int
    experts: tuple[int, ...]

    def eligible(self, scores: Scores, k: int) -> Tensor:
        if scores.layer != self.layer:
            return scores.logits.new_ones((1, 1, 1), dtype=torch.bool)
        removed = torch.tensor(self.experts, device=scores.logits.device)[:, None]  # [S, 1]
        return ~expert_mask(removed, scores.router.experts)[:, None]


@dataclass(frozen=True)
class LayerAblation:
    """The ablations of one layer of one block. ``importances`` are [E] float64, by measure."""

    layer: int
    scores: Scores
    used: Tensor  # [E] bool
    importances: Mapping[ImportanceMeasure, Tensor]
    flips: float

    @property
    def importance(self) -> Tensor:
        return self.importances["output"]

    def votes(self, definition: Vote) -> NDArray[np.float64]:
        """[E]: the votes of all positions."""
        votes = VOTES[definition](self.scores, vote_weights(self.scores, "all"), 0)
        return votes[0].double().cpu().numpy()


class ImportanceExperiment(Experiment):
    """First forwards of blocks that are all answer: each expert in use is removed in turn.

    The tokens of a removed expert use their next best one, and the model's output is compared with
    vanilla's.
    """

    text = ExperimentText.load("importance")

    def measure(self, context: StudyContext) -> ImportanceRecord:
        spec, layers = context.engine.model.spec, sample_layers(context)
        prompts = prompts_at_block_start(context.engine, context.questions())[:NUM_BLOCKS]
        blocks: list[list[LayerAblation]] = []
        for number, prompt in enumerate(prompts):
            blocks.append([])
            for index, layer in enumerate(layers):
                done = (number + index / len(layers)) / len(prompts)
                context.on_progress(done, f"block {number + 1} of {len(prompts)}, layer {layer}")
                blocks[-1].append(ablate_layer(context.engine, prompt, layer))
        ablations = [ablation for block in blocks for ablation in block]
        return ImportanceRecord(
            experts=spec.router.experts,
            k=spec.router.k,
            blocks=len(prompts),
            layers=list(layers),
            used=float(np.mean([int(ablation.used.sum()) for ablation in ablations])),
            flips=float(np.mean([ablation.flips for ablation in ablations])),
            shown=[block_importance(ablation) for ablation in max(blocks, key=_total_importance)],
            correlations={
                measure: [vote_correlation(blocks, vote, measure) for vote in VOTE_KINDS]
                for measure in MEASURE_NAMES
            },
            curves={
                name: [importance_coverage(blocks, policy) for policy in family]
                for name, family in POLICY_CURVES.items()
            },
        )

    def drawings(self, record: ImportanceRecord) -> Sequence[Drawing]:
        ends = dict.fromkeys((0, len(record["shown"]) - 1))
        return [
            *(_block_drawing(record, record["shown"][index]) for index in ends),
            Drawing(
                "importance-covered",
                "Share of the summed importance of all experts that a coreset holds, mean over "
                f"{record['blocks']} blocks and their layers. Dashed: the maximum for a set of "
                "that size.",
                lambda: draw_coverage(record),
            ),
        ]

    def tables(self, record: ImportanceRecord) -> Sequence[Table]:
        correlations = record["correlations"]

        columns = {}
        for measure, name in MEASURE_NAMES.items():
            for entry in correlations[measure]:
                every = format_interval(entry["every"], entry["every_interval"], ".2f")
                used = format_interval(entry["used"], entry["used_interval"], ".2f")
                columns.setdefault(f"{name}: all", {})[entry["vote"]] = every
                columns.setdefault(f"{name}: in use", {})[entry["vote"]] = used
        return [
            make_table(
                "Rank correlation (Spearman) of an expert's votes in a block with its importance, "
                "among all experts and among those in use: mean over "
                f"{record['blocks']} blocks and {len(record['layers'])} layers, with 95 % "
                "intervals over blocks. Importance is the divergence of the output (over all "
                "positions or over answer tokens), or the change of the last hidden states.",
                [entry["vote"] for entry in correlations["output"]],
                {"vote": "{0}", **{head: cells.__getitem__ for head, cells in columns.items()}},
            ),
            make_table(
                "",
                [entry for family in record["curves"].values() for entry in family],
                {
                    "policy": "{policy}",
                    "experts elected": "{experts:.1f}",
                    "importance held": lambda e: format_interval(e["share"], e["interval"], ".1%"),
                    "maximum at that size": "{best:.1%}",
                },
            ),
        ]

    def findings(self, record: ImportanceRecord) -> Sequence[Finding | str]:
        return [
            _correlation_finding(record),
            _vote_kinds_sentence(record),
            _coverage_finding(record),
            _proportional_sentence(record),
            f"A block uses {record['used']:.0f} experts per layer. Removing one of them changes "
            f"the most likely token at {record['flips']:.2%} of its positions.",
        ]


def ablate_layer(engine: Engine, prompt: Prompt, layer: int) -> LayerAblation:
    """Remove each expert in use from one layer of the prompt's first block.

    Removing an expert that is not in use changes nothing.
    """
    vanilla = run_first_forward(engine, prompt, "vanilla")
    scores, routing = next((s, r) for index, s, r in vanilla.trace.routings if index == layer)
    used = routing.used.nonzero()[:, 0].tolist()
    content = content_mask(engine, vanilla.ids)[0].double().cpu()
    size = len(routing.used)
    importances: dict[ImportanceMeasure, Tensor] = {
        measure: torch.zeros(size, dtype=torch.float64) for measure in MEASURE_NAMES
    }
    flip_share = 0.0
    for first in range(0, len(used), BATCH_SIZE):
        removed = used[first : first + BATCH_SIZE]
        # One more row removes no expert: its difference to vanilla is rounding, not importance.
        policy, rows = AblateExpert(layer, (*removed, -1)), len(removed) + 1
        ablated = run_first_forward(engine, prompt, policy, rows=rows)
        divergences = kl_divergence(ablated.logits[-1:], ablated.logits)[:-1].cpu()
        errors = relative_squared_error(ablated.hidden[-1:], ablated.hidden)[:-1].cpu()
        importances["output"][removed] = divergences.mean(-1)
        importances["words"][removed] = (divergences * content).sum(-1) / content.sum()
        importances["hidden"][removed] = errors
        flip_share += float((ablated.ids[:-1] != vanilla.ids).double().mean(-1).sum())
    return LayerAblation(layer, scores, routing.used, importances, flip_share / len(used))


def _total_importance(block: Sequence[LayerAblation]) -> float:
    return sum(float(ablation.importance.sum()) for ablation in block)


def block_importance(ablation: LayerAblation) -> BlockImportance:
    return BlockImportance(
        layer=ablation.layer,
        weight=[float(v) for v in ablation.votes("weight") / 2.0**40],
        importance=ablation.importance.tolist(),
        elected={policy: elected_experts(ablation, policy).tolist() for policy in DRAWN_POLICIES},
    )


def elected_experts(ablation: LayerAblation, policy: str) -> NDArray[np.int64]:
    """The experts of the policy's coreset, ascending."""
    mask = parse_policy(policy).eligible(ablation.scores, ablation.scores.router.k)[0, 0]
    return mask.nonzero()[:, 0].cpu().numpy()


def vote_correlation(
    blocks: Sequence[Sequence[LayerAblation]], vote: Vote, measure: ImportanceMeasure
) -> VoteCorrelation:
    """The correlation over ``blocks`` [blocks][layers]."""
    every, used = [], []
    for block in blocks:
        pairs = [(a.votes(vote), a.importances[measure].numpy()) for a in block]
        masks = [ablation.used.cpu().numpy() for ablation in block]
        every.append([spearman(votes, importance) for votes, importance in pairs])
        used.append([spearman(v[m], i[m]) for (v, i), m in zip(pairs, masks, strict=True)])
    return VoteCorrelation(
        vote=vote,
        every=float(np.mean(every)),
        every_interval=mean_interval(np.mean(every, axis=1)),
        used=float(np.mean(used)),
        used_interval=mean_interval(np.mean(used, axis=1)),
        layers=np.mean(used, axis=0).tolist(),
    )


def importance_coverage(
    blocks: Sequence[Sequence[LayerAblation]], policy: str
) -> ImportanceCoverage:
    """The coverage over ``blocks`` [blocks][layers]; a layer without importance counts as 0."""
    shares, best, sizes = [], [], []
    for number, block in enumerate(blocks):
        # Random coresets depend on the forward, and these are all first forwards: vary the seed.
        seeded_policy = f"{policy},seed={number}" if policy.startswith("random") else policy
        layer_shares = []
        for ablation in block:
            importance = ablation.importance.numpy()
            selected = elected_experts(ablation, seeded_policy)
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


def _block_drawing(record: ImportanceRecord, block: BlockImportance) -> Drawing:
    return Drawing(
        f"importance-layer-{block['layer']}",
        f"The one of {record['blocks']} blocks that depends most on single experts, in layer "
        f"{block['layer']}: the experts in use by total router weight (top), the change of the "
        "output when each is removed (middle, logarithmic, mean over positions), and the policies "
        "that elect it (bottom; *: guarded).",
        lambda: draw_block(block),
    )


def draw_block(block: BlockImportance) -> Figure:
    """Three panels over the same experts, in descending order of weight."""
    weight, importance = np.array(block["weight"]), np.array(block["importance"])
    ordered = [expert for expert in np.argsort(-weight, kind="stable") if weight[expert] > 0]
    figure = Figure(figsize=(FIGURE_WIDTH, 4.6), layout="constrained")
    upper, middle, lower = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [1.2, 1.2, 1]}
    )
    positions = np.arange(len(ordered))
    for ax, values, label in (
        (upper, weight, "router\nweight"),
        (middle, importance, "importance\n(nats)"),
    ):
        ax.bar(positions, values[ordered], color=foreground(), width=0.8)
        ax.set_ylabel(label)
        ax.grid(visible=False, axis="x")
    highest = importance.max() or 1.0
    middle.set(yscale="log", ylim=(highest * 1e-6, highest * 2))
    for row, (policy, elected) in enumerate(block["elected"].items()):
        colour = policy_style(policy).colour
        colours = [colour if expert in elected else grid_colour() for expert in ordered]
        lower.bar(positions, 0.7, 0.8, row - 0.35, color=colours)
    names = [_short_name(policy) for policy in block["elected"]]
    lower.set(yticks=range(len(names)), xlim=(-1, len(ordered)), ylim=(len(names) - 0.4, -0.6))
    lower.set_yticklabels(names, fontsize=8)
    lower.set_xlabel(f"experts in use in layer {block['layer']}, by router weight")
    lower.grid(visible=False)
    return figure


def draw_coverage(record: ImportanceRecord) -> Figure:
    figure, ax = new_axes(f"experts elected of {record['experts']}", "importance held")
    best = record["curves"]["DES-Vote"]
    draw_guide(ax, [p["experts"] for p in best], [p["best"] for p in best], "maximum")
    for label, family in zip(POLICY_CURVES, record["curves"].values(), strict=True):
        x, y = [point["experts"] for point in family], [point["share"] for point in family]
        intervals = [point["interval"] for point in family]
        draw_series(ax, policy_series(family[0]["policy"], x, y, label=label, intervals=intervals))
    ax.set(xlim=(0, None), ylim=(0, 1.03))
    format_percent(ax)
    add_legend(ax, columns=3)
    return figure


def _short_name(policy: str) -> str:
    family, _, options = policy.partition(":")
    size = options.split(",")[0]
    return f"{family} {size}" + (" *" if "voters" in options else "")


def _correlation_finding(record: ImportanceRecord) -> Finding:
    weight, hidden = (record["correlations"][measure][0] for measure in ("output", "hidden"))
    low, high = weight["used_interval"]
    return judge(
        f"The rank correlation of total router weight and importance is {weight['used']:.2f} "
        f"({low:.2f} to {high:.2f}) among the experts in use and {weight['every']:.2f} among all "
        f"{record['experts']}. With importance as the change of the last hidden states, it is "
        f"{hidden['used']:.2f} among those in use.",
        "Router weight predicts the importance of an expert for a block.",
        True if low > 0.5 else False if high < 0.5 else None,
    )


def _vote_kinds_sentence(record: ImportanceRecord) -> str:
    entries = record["correlations"]["output"]
    best = max(entries, key=lambda entry: entry["used"])
    text = ", ".join(f"`{entry['vote']}` {entry['used']:.2f}" for entry in entries)
    return (
        f"Rank correlation with importance among experts in use, by vote: {text}. The highest is "
        f"that of `{best['vote']}`."
    )


def _coverage_finding(record: ImportanceRecord) -> Finding:
    vote, seq = (record["curves"][name] for name in ("DES-Vote", "DES-Seq"))
    sizes, shares = [p["experts"] for p in vote], [p["share"] for p in vote]
    wins = [float(np.interp(p["experts"], sizes, shares)) > p["share"] for p in seq]
    example = next((p for p in vote if p["policy"] == "des-vote:beta=0.3"), vote[0])
    return judge(
        f"{example['policy']} holds {example['share']:.0%} of all importance in "
        f"{example['experts']:.0f} experts; the maximum is {example['best']:.0%}. At the sizes of "
        f"DES-Seq, DES-Vote holds more at {sum(wins)} of {len(wins)}.",
        "An elected coreset keeps the important experts, more of them than DES-Seq at equal size.",
        True if all(wins) else None if any(wins) else False,
    )


def _proportional_sentence(record: ImportanceRecord) -> str:
    pairs = [*zip(*(record["curves"][name] for name in ("DES-Vote", "proportional")), strict=True)]
    wins = sum(own["share"] > vote["share"] for vote, own in pairs)
    vote, own = pairs[3]
    return (
        "`proportional-vote` holds more of the importance than DES-Vote of the same size at "
        f"{wins} of {len(pairs)} sizes; at {own['experts']:.0f} experts {own['share']:.0%} against "
        f"{vote['share']:.0%}."
    )
