"""From one forward of a block to the next: how much of a coreset stays, and what staying costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from coterie.engine.observation import LayerObservation
from coterie.errors import CoterieError
from coterie.lab.plotting import add_legend, format_percent, new_axes, policy_style
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.fidelity import SLOW_STEPS, replay_vanilla, trace_vanilla
from coterie.routing import parse_policy
from coterie.routing.votes import VOTES, vote_weights
from coterie.values import Policy, Scores, expert_mask

VANILLA = "vanilla"
POLICIES = (
    *(VANILLA, "des-vote:beta=0.3", "des-vote:beta=0.15", "des-seq:k=3"),
    *("des-vote:beta=0.15,voters=before-eos,protect=top1", "random:beta=0.15"),
)
CORESET_AGES = ("fresh", "last", "first")
COLUMNS = ("pairs", "jaccard", "size", "votes", *CORESET_AGES)


class CoresetOverlap(TypedDict):
    """One policy. ``jaccard``: of its sets in two forwards in a row (vanilla: of the experts in
    use); ``by_step`` from each forward of a block to the next; ``chance``: of random sets of that
    ``size``. ``votes``: cosine of the votes. ``fresh``, ``last``, ``first``: votes held by this
    forward's own coreset, by the one elected a forward before, by the block's first."""

    policy: str
    size: float
    jaccard: float
    chance: float
    votes: float
    fresh: float
    last: float
    first: float
    by_step: list[float]


class StepsRecord(TypedDict):
    experts: int
    prompts: int
    layers: list[int]
    forwards: int  # a block
    overlaps: list[CoresetOverlap]


@dataclass(frozen=True)
class StepsExperiment:
    """Vanilla decoding, eight forwards a block; every policy elects in each of them."""

    name: str = "steps"
    title: str = "Coresets from forward to forward (not in the paper)"
    question: str = (
        "A block is forwarded several times while it fills. Does it elect the same experts again, "
        "so that they could stay where they are, or be elected once?"
    )

    def measure(self, context: StudyContext) -> ExperimentData:
        context.on_progress(0.0, "decoding slowly")
        trace = trace_vanilla(context, slow=True)
        pairs = OverlapCounter(tuple(map(parse_policy, POLICIES)))
        replay_vanilla(
            context,
            trace,
            pairs.on_layer,
            lambda share: context.on_progress(0.1 + 0.9 * share, "electing"),
        )
        experts = context.engine.model.spec.router.experts
        record = StepsRecord(
            experts=experts,
            prompts=len(trace.prompts),
            layers=list(trace.layers),
            forwards=SLOW_STEPS,
            overlaps=[
                pairs.to_overlap(number, policy, experts) for number, policy in enumerate(POLICIES)
            ],
        )
        return cast("ExperimentData", record)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("StepsRecord", data)
        return [
            Drawing(
                "coreset-overlap",
                "Overlap (Jaccard) of the experts elected in one forward of a block and in the "
                f"next; vanilla: of those in use. {record['prompts']} prompts, "
                f"{record['forwards']} forwards a block.",
                lambda: draw_overlaps(record),
            )
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("StepsRecord", data)
        return [
            Table(
                heads=["policy", "experts", "overlap", "by lot", "votes", *CORESET_AGES],
                rows=[
                    [
                        entry["policy"],
                        f"{entry['size']:.1f}",
                        f"{entry['jaccard']:.2f}",
                        f"{entry['chance']:.2f}",
                        f"{entry['votes']:.3f}",
                        *(f"{entry[age]:.1%}" for age in CORESET_AGES),
                    ]
                    for entry in record["overlaps"]
                ],
                caption="Overlap (Jaccard) of a forward's coreset with the last one's, and what "
                "random sets of that size would share; cosine of the votes; votes held by a fresh "
                "coreset, by the last forward's, and by the one of the block's first forward.",
                numbers=[1, 2, 3, 4, 5, 6, 7],
            )
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("StepsRecord", data)
        vanilla, vote = record["overlaps"][:2]
        return [
            f"Under {vote['policy']}, the coresets of two forwards in a row overlap by "
            f"{vote['jaccard']:.0%} (Jaccard; {vote['chance']:.0%} by lot), under vanilla the "
            f"experts in use by {vanilla['jaccard']:.0%}.",
            f"A coreset elected one forward earlier holds {vote['last']:.1%} of the votes, the one "
            f"of the block's first forward {vote['first']:.1%}, a fresh one {vote['fresh']:.1%}: "
            "what electing less often would save in selection it would pay in votes.",
        ]


@dataclass(frozen=True)
class ElectedSets:
    """One forward's sets and votes of one row in one layer; ``first``: its block's first sets."""

    start: int
    step: int
    sets: Tensor  # [policies, E] bool
    votes: Tensor  # [E]
    first: Tensor


@dataclass  # not frozen: it adds up
class OverlapCounter:
    """What two forwards in a row have in common, by policy and by the step of the earlier one."""

    policies: tuple[Policy, ...]
    _last: dict[tuple[int, int], ElectedSets] = field(default_factory=dict)  # row, layer
    _sums: dict[int, Tensor] = field(default_factory=dict)  # step -> [policies, columns]

    def on_layer(self, observation: LayerObservation) -> None:
        sets = torch.stack(
            [coreset_mask(observation, policy) for policy in self.policies]
        ).cpu()  # [P, S, E]
        votes = summed_votes(observation.scores).cpu()
        for index, (row, start) in enumerate(
            zip(observation.rows, observation.starts, strict=True)
        ):
            previous = self._last.get((row, observation.layer))
            current = ElectedSets(start, 0, sets[:, index], votes[index], sets[:, index])
            if previous is not None and previous.start == start:
                current = ElectedSets(
                    start, previous.step + 1, current.sets, current.votes, previous.first
                )
                zeros = torch.zeros(len(self.policies), len(COLUMNS), dtype=torch.float64)
                self._sums.setdefault(previous.step, zeros).add_(overlap_row(previous, current))
            self._last[row, observation.layer] = current

    def to_overlap(self, number: int, policy: str, experts: int) -> CoresetOverlap:
        if not self._sums:
            raise CoterieError("no block took a second forward")
        sums = torch.stack([self._sums[step][number] for step in sorted(self._sums)])
        means = dict(zip(COLUMNS, (sums.sum(0) / sums[:, 0].sum()).tolist(), strict=True))
        size = means["size"]
        shared = size * size / experts
        return CoresetOverlap(
            policy=policy,
            size=size,
            jaccard=means["jaccard"],
            chance=shared / (2 * size - shared),
            votes=means["votes"],
            fresh=means["fresh"],
            last=means["last"],
            first=means["first"],
            by_step=(sums[:, 1] / sums[:, 0]).tolist(),
        )


def coreset_mask(observation: LayerObservation, policy: Policy) -> Tensor:
    """[S, E] bool: the coreset; of the unmodified model, the experts in use."""
    scores = observation.scores
    mask = policy.eligible(scores, scores.router.k)
    if mask.numel() > 1:
        return mask.expand(len(observation.rows), 1, -1)[:, 0]
    vanilla_ids = observation.routing.vanilla_ids.view(len(observation.rows), -1)
    return expert_mask(vanilla_ids, scores.router.experts)


def summed_votes(scores: Scores) -> Tensor:
    """[S, E] float64: everybody's probability for their own experts."""
    return VOTES["topk-prob"](scores, vote_weights(scores, "all"), 0).double()


def overlap_row(previous: ElectedSets, current: ElectedSets) -> Tensor:
    """[policies, columns] float64 of two forwards in a row."""
    intersection, union = (
        (previous.sets & current.sets).sum(-1),
        (previous.sets | current.sets).sum(-1),
    )
    cosine = F.cosine_similarity(previous.votes, current.votes, dim=0)
    votes_kept = [
        (sets * current.votes).sum(-1) / current.votes.sum()
        for sets in (current.sets, previous.sets, current.first)
    ]
    ones = torch.ones_like(intersection, dtype=torch.float64)
    return torch.stack(
        [ones, intersection / union, current.sets.sum(-1), cosine * ones, *votes_kept], dim=-1
    ).double()


def draw_overlaps(record: StepsRecord) -> Figure:
    figure, ax = new_axes("forward of the block", "overlap with the next", height=3.8)
    num_by_color: dict[str, int] = {}
    for overlap in record["overlaps"]:
        style = policy_style(overlap["policy"])
        number = num_by_color[style.colour] = num_by_color.get(style.colour, -1) + 1
        ax.plot(
            range(1, 1 + len(overlap["by_step"])),
            overlap["by_step"],
            color=style.colour,
            marker=style.marker,
            linestyle="--" if number else "-",
            label=overlap["policy"].replace(",voters=before-eos,protect=top1", ", words, top-1"),
        )
    ax.set_ylim(0, 1.03)
    format_percent(ax)
    add_legend(ax)
    return figure
