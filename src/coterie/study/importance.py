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
from coterie.figures.style import axes, faint, ink, legend, look, percent
from coterie.routing import parse_policy
from coterie.routing.votes import VOTES, Vote, voices
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.fidelity import some_layers
from coterie.study.lab import Lab
from coterie.study.opened import (
    Prompt,
    divergence,
    moved,
    open_block,
    opened_prompts,
    words_of,
)
from coterie.study.ranks import mean_interval, spearman
from coterie.values import Scores, membership

BLOCKS = 12  # blocks that are taken apart, one a prompt
ROWS = 32  # experts that are removed side by side
Measure = Literal["output", "words", "hidden"]
MEASURES: Mapping[Measure, str] = {
    "output": "output",
    "words": "output, words",
    "hidden": "hidden state",
}
DEFINITIONS: tuple[Vote, ...] = ("weight", "masked", "count", "full", "max")
SHARES = ("0.03125", "0.0625", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5", "0.75")
CURVES = {
    "DES-Vote": [f"des-vote:beta={share}" for share in SHARES],
    "DES-Seq": [f"des-seq:k={m}" for m in range(1, 8)],
    "words vote, top-1": [f"des-vote:beta={s},voters=before-eos,protect=top1" for s in SHARES],
    "proportional": [f"proportional-vote:beta={share}" for share in SHARES],
    "random": [f"random:beta={share}" for share in SHARES],
}
SHOWN = (
    *("des-vote:beta=0.15", "des-vote:beta=0.3", "des-seq:k=1", "des-seq:k=3"),
    *("des-vote:beta=0.15,voters=before-eos,protect=top1", "random:beta=0.15"),
)


class Block(TypedDict):
    """One block in one layer, expert by expert: its total router weight, how far the output moves
    without it (mean over positions, nats), and who elects it."""

    layer: int
    weight: list[float]
    importance: list[float]
    elected: dict[str, list[int]]


class Correlation(TypedDict):
    """Of a vote with importance, mean over blocks and layers; ``used``: among experts in use."""

    vote: str
    every: float
    every_interval: list[float]
    used: float
    used_interval: list[float]
    layers: list[float]  # ``used``, layer by layer


class Covered(TypedDict):
    """The share of all importance that a policy's coresets hold; ``best``: that any could."""

    policy: str
    experts: float
    share: float
    interval: list[float]
    best: float


class Found(TypedDict):
    """``used``: experts that a block uses in a layer; ``flips``: positions at which the removal of
    one expert in use changes what would be written, as a share."""

    experts: int
    k: int
    blocks: int
    layers: list[int]
    used: float
    flips: float
    shown: list[Block]
    correlations: dict[Measure, list[Correlation]]
    curves: dict[str, list[Covered]]


@dataclass(frozen=True)
class Without:
    """Everybody but one expert, in one layer: row s goes without ``experts[s]`` (-1: nobody)."""

    layer: int
    experts: tuple[int, ...]

    def eligible(self, scores: Scores, k: int) -> Tensor:
        if scores.layer != self.layer:
            return scores.logits.new_ones((1, 1, 1), dtype=torch.bool)
        gone = torch.tensor(self.experts, device=scores.logits.device)[:, None]  # [S, 1]
        return ~membership(gone, scores.router.experts)[:, None]


@dataclass(frozen=True)
class Taken:
    """One layer of one block, taken apart. ``importance`` is by measure, [E] float64."""

    layer: int
    scores: Scores
    used: Tensor  # [E] bool
    importances: Mapping[Measure, Tensor]
    flips: float

    @property
    def importance(self) -> Tensor:
        return self.importances["output"]

    def votes(self, definition: Vote) -> NDArray[np.float64]:
        """[E], of everybody."""
        votes = VOTES[definition](self.scores, voices(self.scores, "all"), 0)
        return votes[0].double().cpu().numpy()


@dataclass(frozen=True)
class Importance:
    """The first forward of blocks that are all answer: every expert in use is taken away in turn,
    its tokens get their next best, and the model's output is held against vanilla's."""

    name: str = "importance"
    title: str = "Expert importance and router weight (Fig. 4 left, middle)"
    question: str = (
        "If one expert is taken away from a block, how much does the output change, and could the "
        "router's weights have told?"
    )

    def measure(self, lab: Lab) -> Facts:
        spec, layers = lab.engine.model.spec, some_layers(lab)
        prompts = opened_prompts(lab.engine, lab.questions())[:BLOCKS]
        taken: list[list[Taken]] = []
        for number, prompt in enumerate(prompts):
            taken.append([])
            for place, layer in enumerate(layers):
                done = (number + place / len(layers)) / len(prompts)
                lab.tell(done, f"block {number + 1} of {len(prompts)}, layer {layer}")
                taken[-1].append(take_apart(lab.engine, prompt, layer))
        everything = [one for block in taken for one in block]
        flips = [one.flips for one in everything]
        found = Found(
            experts=spec.router.experts,
            k=spec.router.k,
            blocks=len(prompts),
            layers=list(layers),
            used=float(np.mean([int(one.used.sum()) for one in everything])),
            flips=float(np.mean(flips)),
            shown=[shown(one) for one in max(taken, key=_weight)],
            correlations={
                measure: [correlation(taken, vote, measure) for vote in DEFINITIONS]
                for measure in MEASURES
            },
            curves={
                name: [covered(taken, policy) for policy in family]
                for name, family in CURVES.items()
            },
        )
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        ends = dict.fromkeys((0, len(found["shown"]) - 1))
        return [
            *(
                Drawing(
                    f"importance-layer-{found['shown'][place]['layer']}",
                    f"Of {found['blocks']} blocks the one that depends most on single experts, "
                    f"in layer {found['shown'][place]['layer']}: the experts in use by "
                    "their total router weight (above), how far the output moves when each is "
                    "removed (middle, logarithmic, mean over positions), and who elects it (below; "
                    "*: only words vote, top-1 kept).",
                    lambda place=place: draw_block(found["shown"][place]),
                )
                for place in ends
            ),
            Drawing(
                "importance-covered",
                "Share of the summed importance of all experts that a coreset holds, mean over "
                f"{found['blocks']} blocks and their layers. Dashed: the best that a set of that "
                "size can hold.",
                lambda: draw_covered(found),
            ),
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        by_measure = list(found["correlations"].values())
        heads = [f"{name}: {which}" for name in MEASURES.values() for which in ("all", "in use")]
        return [
            Table(
                heads=["vote", *heads],
                rows=[
                    [same[0]["vote"], *(cell for one in same for cell in _with_interval(one))]
                    for same in zip(*by_measure, strict=True)
                ],
                caption="Rank correlation (Spearman) of an expert's votes in a block with its "
                "importance among all experts and among those in use, mean over "
                f"{found['blocks']} blocks and {len(found['layers'])} layers, with 95 % intervals "
                "over blocks. Importance is measured at the output (divergence, over all "
                "positions or over words), or by how far the last hidden states move.",
                numbers=list(range(1, 1 + len(heads))),
            ),
            Table(
                heads=["policy", "experts elected", "importance held", "best of that size"],
                rows=[
                    [one["policy"], f"{one['experts']:.1f}", _share(one), f"{one['best']:.1%}"]
                    for family in found["curves"].values()
                    for one in family
                ],
                numbers=[1, 2, 3],
            ),
        ]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        return [_predicts(found), _definitions(found), _covers(found), _ours(found), _small(found)]


def take_apart(engine: Engine, prompt: Prompt, layer: int) -> Taken:
    """Remove every expert in use from one layer of the prompt's first block; the others' removal
    changes nothing."""
    plain = open_block(engine, prompt, "vanilla")
    scores, routing = next((s, r) for at, s, r in plain.trace.routings if at == layer)
    used = routing.used.nonzero()[:, 0].tolist()
    words = words_of(engine, plain.ids)[0].double().cpu()
    size = len(routing.used)
    measured: dict[Measure, Tensor] = {
        measure: torch.zeros(size, dtype=torch.float64) for measure in MEASURES
    }
    flipped = 0.0
    for first in range(0, len(used), ROWS):
        gone = tuple(used[first : first + ROWS])
        # One row more goes without nobody: what it differs by is arithmetic, not importance.
        other = open_block(engine, prompt, Without(layer, (*gone, -1)), rows=len(gone) + 1)
        apart = divergence(other.logits[-1:], other.logits)[:-1].cpu()
        measured["output"][list(gone)] = apart.mean(-1)
        measured["words"][list(gone)] = (apart * words).sum(-1) / words.sum()
        measured["hidden"][list(gone)] = moved(other.hidden[-1:], other.hidden)[:-1].cpu()
        flipped += float((other.ids[:-1] != plain.ids).double().mean(-1).sum())
    return Taken(layer, scores, routing.used, measured, flipped / len(used))


def _weight(block: Sequence[Taken]) -> float:
    """How much depends on the block's single experts, over all layers."""
    return sum(float(one.importance.sum()) for one in block)


def shown(taken: Taken) -> Block:
    return Block(
        layer=taken.layer,
        weight=[float(v) for v in taken.votes("weight") / 2.0**40],
        importance=taken.importance.tolist(),
        elected={policy: elected(taken, policy).tolist() for policy in SHOWN},
    )


def elected(taken: Taken, policy: str) -> NDArray[np.int64]:
    """The experts of the policy's coreset, in their order."""
    mask = parse_policy(policy).eligible(taken.scores, taken.scores.router.k)[0, 0]
    return mask.nonzero()[:, 0].cpu().numpy()


def correlation(taken: Sequence[Sequence[Taken]], vote: Vote, measure: Measure) -> Correlation:
    """Of ``taken`` [blocks][layers]."""
    every, used = [], []
    for block in taken:
        pairs = [(one.votes(vote), one.importances[measure].numpy()) for one in block]
        every.append([spearman(votes, importance) for votes, importance in pairs])
        masks = [one.used.cpu().numpy() for one in block]
        used.append([spearman(v[m], i[m]) for (v, i), m in zip(pairs, masks, strict=True)])
    return Correlation(
        vote=vote,
        every=float(np.mean(every)),
        every_interval=mean_interval(np.mean(every, axis=1)),
        used=float(np.mean(used)),
        used_interval=mean_interval(np.mean(used, axis=1)),
        layers=np.mean(used, axis=0).tolist(),
    )


def covered(taken: Sequence[Sequence[Taken]], policy: str) -> Covered:
    """Of ``taken`` [blocks][layers]; a layer in which nothing matters is held whole."""
    shares, best, sizes = [], [], []
    for number, block in enumerate(taken):
        # A lot is drawn by forward: these are all first ones, and would all draw the same.
        chosen_by = f"{policy},seed={number}" if policy.startswith("random") else policy
        held = []
        for one in block:
            importance, chosen = one.importance.numpy(), elected(one, chosen_by)
            whole = importance.sum() or 1.0
            held.append(importance[chosen].sum() / whole)
            best.append(np.sort(importance)[::-1][: len(chosen)].sum() / whole)
            sizes.append(len(chosen))
        shares.append(float(np.mean(held)))
    return Covered(
        policy=policy,
        experts=float(np.mean(sizes)),
        share=float(np.mean(shares)),
        interval=mean_interval(shares),
        best=float(np.mean(best)),
    )


def draw_block(block: Block) -> Figure:
    """Three bands over the same experts, the heaviest first."""
    weight, importance = np.array(block["weight"]), np.array(block["importance"])
    order = [expert for expert in np.argsort(-weight, kind="stable") if weight[expert] > 0]
    figure, _ = axes(height=4.6)
    figure.clear()
    above, middle, below = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [1.2, 1.2, 1]}
    )
    places = np.arange(len(order))
    above.bar(places, weight[order], color=ink(), width=0.8)
    above.set_ylabel("router\nweight")
    middle.bar(places, importance[order], color=ink(), width=0.8)
    middle.set_ylabel("importance\n(nats)")
    most = importance.max() or 1.0
    middle.set(yscale="log", ylim=(most * 1e-6, most * 2))
    names = list(block["elected"])
    for row, policy in enumerate(names):
        there = set(block["elected"][policy])
        dress = look(policy)
        for place in places:
            chosen = order[place] in there
            below.bar(place, 0.7, 0.8, row - 0.35, color=dress.colour if chosen else faint())
    below.set(yticks=range(len(names)), xlim=(-1, len(order)), ylim=(len(names) - 0.4, -0.6))
    below.set_yticklabels([_short(policy) for policy in names], fontsize=8)
    below.set_xlabel(f"experts in use in layer {block['layer']}, by router weight")
    below.grid(visible=False)
    above.grid(visible=False, axis="x")
    middle.grid(visible=False, axis="x")
    return figure


def draw_covered(found: Found) -> Figure:
    figure, one = axes(f"experts elected of {found['experts']}", "importance held")
    best = [(point["experts"], point["best"]) for point in found["curves"]["DES-Vote"]]
    one.plot(*zip(*best, strict=True), color=ink(), linestyle="--", linewidth=1, label="best")
    for name, family in found["curves"].items():
        dress = look(family[0]["policy"])
        shares = [point["share"] for point in family]
        ends = [point["interval"] for point in family]
        one.errorbar(
            [point["experts"] for point in family],
            shares,
            yerr=[
                [max(0.0, share - low) for share, (low, _) in zip(shares, ends, strict=True)],
                [max(0.0, high - share) for share, (_, high) in zip(shares, ends, strict=True)],
            ],
            color=dress.colour,
            marker=dress.marker,
            elinewidth=0.8,
            label=name,
        )
    one.set(xlim=(0, None), ylim=(0, 1.03))
    percent(one)
    legend(one, columns=3)
    return figure


def _short(policy: str) -> str:
    family, _, options = policy.partition(":")
    size = options.split(",")[0]
    return f"{family} {size}" + (" *" if "voters" in options else "")


def _share(one: Covered) -> str:
    low, high = one["interval"]
    return f"{one['share']:.1%} ({low:.1%} to {high:.1%})"


def _with_interval(one: Correlation) -> tuple[str, str]:
    """Of all experts, of those in use."""
    (a, b), (c, d) = one["every_interval"], one["used_interval"]
    return (
        f"{one['every']:.2f} ({a:.2f} to {b:.2f})",
        f"{one['used']:.2f} ({c:.2f} to {d:.2f})",
    )


def _predicts(found: Found) -> Finding:
    weight, hidden = (found["correlations"][measure][0] for measure in ("output", "hidden"))
    low, high = weight["used_interval"]
    return Finding(
        f"Total router weight and importance correlate by {weight['used']:.2f} ({low:.2f} to "
        f"{high:.2f}) in rank among the experts in use, by {weight['every']:.2f} among all "
        f"{found['experts']}. Where importance is how far the last hidden states move, among those "
        f"in use: {hidden['used']:.2f}.",
        claim="Router weight predicts how much an expert matters to a block.",
        verdict="holds" if low > 0.5 else "does not hold" if high < 0.5 else "cannot be told here",
    )


def _definitions(found: Found) -> str:
    best = max(found["correlations"]["output"], key=lambda one: one["used"])
    said = ", ".join(
        f"`{one['vote']}` {one['used']:.2f}" for one in found["correlations"]["output"]
    )
    return f"Among experts in use, the votes rank importance so: {said}; best is `{best['vote']}`."


def _covers(found: Found) -> Finding:
    seq = found["curves"]["DES-Seq"]
    vote = found["curves"]["DES-Vote"]
    sizes, shares = ([point[name] for point in vote] for name in ("experts", "share"))
    wins = [float(np.interp(p["experts"], sizes, shares)) > p["share"] for p in seq]
    some = next((p for p in vote if p["policy"] == "des-vote:beta=0.3"), vote[0])
    return Finding(
        f"{some['policy']} holds {some['share']:.0%} of all importance in {some['experts']:.0f} "
        f"experts, where {some['best']:.0%} is possible. At DES-Seq's sizes Vote holds more at "
        f"{sum(wins)} of {len(wins)}.",
        claim="A voted coreset keeps the experts that matter, more of them than Seq of its size.",
        verdict="holds" if all(wins) else "cannot be told here" if any(wins) else "does not hold",
    )


def _ours(found: Found) -> str:
    vote, ours = found["curves"]["DES-Vote"], found["curves"]["proportional"]
    pairs = list(zip(vote, ours, strict=True))
    more = sum(b["share"] > a["share"] for a, b in pairs)
    plain, other = pairs[3]
    return (
        "`proportional-vote` holds more of the importance than DES-Vote of the same size at "
        f"{more} of {len(pairs)} sizes; at {other['experts']:.0f} experts {other['share']:.0%} "
        f"against {plain['share']:.0%}."
    )


def _small(found: Found) -> str:
    return (
        f"A block uses {found['used']:.0f} experts in a layer; taking one of them away changes "
        f"what would be written at {found['flips']:.2%} of its positions."
    )
