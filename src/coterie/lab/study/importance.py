"""Expert importance by ablation, compared with router weights and elections (Fig. 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.lab.evals.stats import mean_interval, spearman
from coterie.lab.plotting import (
    FIGURE_WIDTH,
    foreground,
    grid_colour,
    guide_series,
    line_chart,
    policy_series,
    policy_style,
)
from coterie.lab.study.experiment import Entry, Experiment, Finding, Part, StudyContext
from coterie.lab.study.fidelity import (
    Prompt,
    content_mask,
    kl_divergence,
    prompts_at_block_start,
    relative_squared_error,
    run_first_forward,
    sample_layers,
)
from coterie.lab.study.variants import GUARD_OPTIONS
from coterie.routing import parse_policy
from coterie.routing.votes import VOTES, Vote, vote_weights
from coterie.values import Scores, expert_mask

NUM_BLOCKS = 12  # blocks ablated, one per prompt
BATCH_SIZE = 32  # experts removed in one batch
MEASURES = ("output", "words", "hidden")
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
FloatArray = NDArray[np.float64]


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
    """The ablations of one layer of one block; ``flips`` is the share of tokens that change.

    ``importances`` are by measure. "output" is the divergence of the output without the expert, in
    nats per position, "words" the same over answer tokens, "hidden" the relative squared change of
    the last hidden states.
    """

    layer: int
    scores: Scores
    used: NDArray[np.bool_]  # [E]
    importances: Mapping[str, FloatArray]  # [E]
    flips: float

    def votes(self, definition: Vote) -> FloatArray:
        """[E]: the votes of all positions."""
        votes = VOTES[definition](self.scores, vote_weights(self.scores, "all"), 0)
        return votes[0].double().cpu().numpy()

    def coreset(self, policy: str) -> NDArray[np.int64]:
        """The experts that the policy elects, ascending."""
        mask = parse_policy(policy).eligible(self.scores, self.scores.router.k)[0, 0]
        return mask.nonzero()[:, 0].cpu().numpy()

    def to_record(self) -> Entry:
        return {
            "layer": self.layer,
            "weight": (self.votes("weight") / 2.0**40).tolist(),
            "importance": self.importances["output"].tolist(),
            "elected": {policy: self.coreset(policy).tolist() for policy in DRAWN_POLICIES},
        }


class ImportanceExperiment(Experiment, name="importance"):
    """First forwards of blocks that are all answer: each expert in use is removed in turn.

    The tokens of a removed expert use their next best one, and the model's output is compared with
    vanilla's. In the record, ``used`` counts the experts in use per layer, and ``shown`` is the
    block with the most importance, an entry per layer.
    """

    def measure(self, context: StudyContext) -> Entry:
        router, layers = context.engine.model.spec.router, sample_layers(context)
        prompts = prompts_at_block_start(context.engine, context.questions())[:NUM_BLOCKS]
        blocks: list[list[LayerAblation]] = []
        for number, prompt in enumerate(prompts):
            blocks.append([])
            for index, layer in enumerate(layers):
                done = (number + index / len(layers)) / len(prompts)
                context.on_progress(done, f"block {number + 1} of {len(prompts)}, layer {layer}")
                blocks[-1].append(ablate_layer(context.engine, prompt, layer))
        ablations = [ablation for block in blocks for ablation in block]
        shown = max(blocks, key=lambda block: sum(a.importances["output"].sum() for a in block))
        return {
            "experts": router.experts,
            "k": router.k,
            "blocks": len(prompts),
            "layers": list(layers),
            "used": float(np.mean([ablation.used.sum() for ablation in ablations])),
            "flips": float(np.mean([ablation.flips for ablation in ablations])),
            "shown": [ablation.to_record() for ablation in shown],
            "correlations": {
                measure: [vote_correlation(blocks, vote, measure) for vote in VOTE_KINDS]
                for measure in MEASURES
            },
            "curves": {
                name: [importance_coverage(blocks, policy) for policy in family]
                for name, family in POLICY_CURVES.items()
            },
        }

    def report(self, record: Entry) -> Iterator[Part]:
        shown, text = record["shown"], self.text
        for block in shown if len(shown) == 1 else (shown[0], shown[-1]):
            draw, figure = partial(_draw_block, block), f"importance-layer-{block['layer']}"
            yield text.drawing("block", draw, figure, record=record, block=block)
        draw = partial(_draw_coverage, record)
        yield text.drawing("coverage", draw, "importance-covered", record=record)
        by_measure = record["correlations"]
        rows = [
            dict(zip(by_measure, entries, strict=True))
            for entries in zip(*by_measure.values(), strict=True)
        ]
        yield text.table("correlations", rows, record=record, layers=len(record["layers"]))
        coverages = [entry for family in record["curves"].values() for entry in family]
        yield text.table("coverage", coverages)
        yield from self._findings(record)

    def _findings(self, record: Entry) -> Iterator[Finding | str]:

        correlations, curves, text = record["correlations"], record["curves"], self.text
        weight, hidden = (correlations[measure][0] for measure in ("output", "hidden"))
        low, high = weight["used_interval"]
        predicts = True if low > 0.5 else False if high < 0.5 else None
        by_vote = [f"`{entry['vote']}` {entry['used']:.2f}" for entry in correlations["output"]]
        best = max(correlations["output"], key=lambda entry: entry["used"])

        vote, seq = curves["DES-Vote"], curves["DES-Seq"]
        sizes, shares = ([entry[key] for entry in vote] for key in ("experts", "share"))
        wins = [np.interp(entry["experts"], sizes, shares) > entry["share"] for entry in seq]
        covers = True if all(wins) else None if any(wins) else False
        example = next((e for e in vote if e["policy"] == "des-vote:beta=0.3"), vote[0])
        pairs = [*zip(vote, curves["proportional"], strict=True)]
        ahead = sum(own["share"] > other["share"] for other, own in pairs)
        yield text.finding("weight", predicts, weight=weight, hidden=hidden, record=record)
        yield text.sentence("votes", votes=", ".join(by_vote), best=best)
        yield text.finding("coverage", covers, example=example, wins=sum(wins), sizes=len(wins))
        yield text.sentence("proportional", wins=ahead, sizes=len(pairs), pair=pairs[3])
        yield text.sentence("used", record=record)


def ablate_layer(engine: Engine, prompt: Prompt, layer: int) -> LayerAblation:
    """Remove each expert in use from one layer of the prompt's first block.

    Removing an expert that is not in use changes nothing.
    """
    vanilla = run_first_forward(engine, prompt, "vanilla")
    scores, routing = next((s, r) for index, s, r in vanilla.trace.routings if index == layer)
    used = routing.used.nonzero()[:, 0].tolist()
    content = content_mask(engine, vanilla.ids)[0].double().cpu()
    importances = {measure: np.zeros(len(routing.used)) for measure in MEASURES}
    flips = 0.0
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
        flips += float((ablated.ids[:-1] != vanilla.ids).double().mean(-1).sum())
    return LayerAblation(layer, scores, routing.used.cpu().numpy(), importances, flips / len(used))


def vote_correlation(blocks: Sequence[Sequence[LayerAblation]], vote: Vote, measure: str) -> Entry:
    """Rank correlation of a vote with importance over ``blocks`` [blocks][layers].

    ``every`` is over all experts, ``used`` over those in use, ``layers`` is ``used`` by layer.
    """
    every, used = [], []
    for block in blocks:
        pairs = [(a.votes(vote), a.importances[measure], a.used) for a in block]
        every.append([spearman(votes, importance) for votes, importance, _ in pairs])
        used.append([spearman(votes[mask], importance[mask]) for votes, importance, mask in pairs])
    return {
        "vote": vote,
        "every": float(np.mean(every)),
        "every_interval": mean_interval(np.mean(every, axis=1)),
        "used": float(np.mean(used)),
        "used_interval": mean_interval(np.mean(used, axis=1)),
        "layers": np.mean(used, axis=0).tolist(),
    }


def importance_coverage(blocks: Sequence[Sequence[LayerAblation]], policy: str) -> Entry:
    """The share of all importance in a policy's coresets over ``blocks`` [blocks][layers].

    ``best`` is the maximum for coresets of their size. A layer without importance counts as 0.
    """
    shares, best, sizes = [], [], []
    for number, block in enumerate(blocks):
        # Random coresets depend on the forward, and these are all first forwards: vary the seed.
        seeded_policy = f"{policy},seed={number}" if policy.startswith("random") else policy
        for ablation in block:
            importance, coreset = ablation.importances["output"], ablation.coreset(seeded_policy)
            total = importance.sum() or 1.0
            shares.append(importance[coreset].sum() / total)
            best.append(np.sort(importance)[::-1][: len(coreset)].sum() / total)
            sizes.append(len(coreset))
    by_block = np.reshape(shares, (len(blocks), -1)).mean(axis=1)
    return {
        "policy": policy,
        "experts": float(np.mean(sizes)),
        "share": float(np.mean(by_block)),
        "interval": mean_interval(by_block),
        "best": float(np.mean(best)),
    }


def _draw_block(block: Entry) -> Figure:
    """Three panels over the same experts, in descending order of weight."""
    weight, importance = np.array(block["weight"]), np.array(block["importance"])
    ordered = [expert for expert in np.argsort(-weight, kind="stable") if weight[expert] > 0]
    figure = Figure(figsize=(FIGURE_WIDTH, 4.6), layout="constrained")
    heights = {"height_ratios": [1.2, 1.2, 1]}
    upper, middle, lower = figure.subplots(3, 1, sharex=True, gridspec_kw=heights)
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


def _draw_coverage(record: Entry) -> Figure:
    best = record["curves"]["DES-Vote"]
    sizes, maxima = ([entry[key] for entry in best] for key in ("experts", "best"))
    series = [guide_series(sizes, maxima, "maximum")]
    for label, family in zip(POLICY_CURVES, record["curves"].values(), strict=True):
        x, y, intervals = ([e[key] for e in family] for key in ("experts", "share", "interval"))
        policy = family[0]["policy"]
        series.append(policy_series(policy, x, y, label=label, intervals=intervals))
    x, y = f"experts elected of {record['experts']}", "importance held"
    return line_chart(series, x, y, xlim=(0, None), ylim=(0, 1.03), percent="y", columns=3)


def _short_name(policy: str) -> str:
    family, _, options = policy.partition(":")
    size = options.split(",")[0]
    return f"{family} {size}" + (" *" if "voters" in options else "")
