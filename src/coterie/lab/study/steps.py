"""Coresets in consecutive forwards of a block: how much they overlap, and the cost of reuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.engine.observation import LayerObservation
from coterie.errors import TaskError
from coterie.lab.study.charts import dash_repeats, line_chart, policy_series
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    make_table,
)
from coterie.lab.study.fidelity import SLOW_STEPS, replay_vanilla, trace_vanilla
from coterie.lab.study.variants import GUARD_OPTIONS
from coterie.routing import parse_policy
from coterie.routing.votes import VOTES, vote_weights
from coterie.values import Policy, Scores, expert_mask

POLICIES = (
    *("vanilla", "des-vote:beta=0.3", "des-vote:beta=0.15", "des-seq:k=3"),
    *(f"des-vote:beta=0.15,{GUARD_OPTIONS}", "random:beta=0.15"),
)
COLUMNS = ("pairs", "jaccard", "size", "votes", "fresh", "last", "first")


class CoresetOverlap(TypedDict):
    """Overlaps under one policy.

    ``jaccard`` compares the coresets of two consecutive forwards (under vanilla: the experts in
    use), ``by_step`` does so for each forward of a block, and ``chance`` is the value for random
    sets of that ``size``. ``votes`` is the cosine of the votes. ``fresh``, ``last`` and ``first``
    are the votes held by the forward's own coreset, the previous one, and the block's first.
    """

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
    forwards: int  # per block
    overlaps: list[CoresetOverlap]


class StepsExperiment(Experiment):
    """Vanilla decodes with eight forwards per block; every policy elects in each of them."""

    text = ExperimentText.load("steps")

    def measure(self, context: StudyContext) -> StepsRecord:
        context.on_progress(0.0, "slow decoding")
        trace = trace_vanilla(context, slow=True)
        counter = OverlapCounter(tuple(map(parse_policy, POLICIES)))
        replay_vanilla(
            context,
            trace,
            counter.on_layer,
            lambda share: context.on_progress(0.1 + 0.9 * share, "elections"),
        )
        experts = context.engine.model.spec.router.experts
        overlaps = [counter.to_overlap(i, policy, experts) for i, policy in enumerate(POLICIES)]
        return StepsRecord(
            experts=experts,
            prompts=len(trace.prompts),
            layers=list(trace.layers),
            forwards=SLOW_STEPS,
            overlaps=overlaps,
        )

    def drawings(self, record: StepsRecord) -> Sequence[Drawing]:
        overlaps = record["overlaps"]
        lines = dash_repeats([overlap["policy"] for overlap in overlaps])
        series = [
            policy_series(
                overlap["policy"],
                range(1, 1 + len(overlap["by_step"])),
                overlap["by_step"],
                label=overlap["policy"].replace(f",{GUARD_OPTIONS}", ", guarded"),
                line=line,
            )
            for overlap, line in zip(overlaps, lines, strict=True)
        ]
        caption = (
            "Overlap (Jaccard) of the experts elected in one forward of a block and in the next; "
            f"under vanilla: of those in use. {record['prompts']} prompts, {record['forwards']} "
            "forwards per block."
        )
        x, y = "forward of the block", "overlap with the next"
        return [
            Drawing(
                "coreset-overlap",
                caption,
                lambda: line_chart(series, x, y, ylim=(0, 1.03), percent="y", height=3.8),
            )
        ]

    def tables(self, record: StepsRecord) -> Sequence[Table]:
        return [
            make_table(
                "Overlap (Jaccard) of a forward's coreset with the previous one, and the overlap "
                "of random sets of that size; cosine of the votes; votes held by a fresh coreset, "
                "by the previous forward's, and by that of the block's first forward.",
                record["overlaps"],
                {
                    "policy": "{policy}",
                    "experts": "{size:.1f}",
                    "overlap": "{jaccard:.2f}",
                    "random sets": "{chance:.2f}",
                    "votes": "{votes:.3f}",
                    "fresh": "{fresh:.1%}",
                    "previous": "{last:.1%}",
                    "first": "{first:.1%}",
                },
            )
        ]

    def findings(self, record: StepsRecord) -> Sequence[Finding | str]:
        vanilla, vote = record["overlaps"][:2]
        return [
            f"Under {vote['policy']}, the coresets of two consecutive forwards overlap by "
            f"{vote['jaccard']:.0%} (Jaccard; random sets: {vote['chance']:.0%}). Under vanilla "
            f"the experts in use overlap by {vanilla['jaccard']:.0%}.",
            f"The coreset of the previous forward holds {vote['last']:.1%} of the votes, that of "
            f"the block's first forward {vote['first']:.1%}, and a fresh one {vote['fresh']:.1%}. "
            "Fewer elections save selection time and cost votes.",
        ]


@dataclass(frozen=True)
class ElectedSets:
    """Coresets and votes of one row in one layer and forward; ``first``: those of the block."""

    start: int
    step: int
    sets: Tensor  # [policies, E] bool
    votes: Tensor  # [E]
    first: Tensor


@dataclass  # mutable: it accumulates
class OverlapCounter:
    """Overlaps of consecutive forwards, by policy and by the step of the earlier one."""

    policies: tuple[Policy, ...]
    _last: dict[tuple[int, int], ElectedSets] = field(default_factory=dict)  # row, layer
    _sums: dict[int, Tensor] = field(default_factory=dict)  # step -> [policies, columns]

    def on_layer(self, observation: LayerObservation) -> None:
        masks = [coreset_mask(observation, policy) for policy in self.policies]
        all_sets = torch.stack(masks).cpu()  # [policies, S, E]
        all_votes = summed_votes(observation.scores).cpu()
        rows = zip(observation.rows, observation.starts, strict=True)
        for index, (row, start) in enumerate(rows):
            sets, votes = all_sets[:, index], all_votes[index]
            previous = self._last.get((row, observation.layer))
            current = ElectedSets(start, 0, sets, votes, sets)
            if previous is not None and previous.start == start:
                current = ElectedSets(start, previous.step + 1, sets, votes, previous.first)
                zeros = torch.zeros(len(self.policies), len(COLUMNS), dtype=torch.float64)
                self._sums.setdefault(previous.step, zeros).add_(overlap_row(previous, current))
            self._last[row, observation.layer] = current

    def to_overlap(self, index: int, policy: str, experts: int) -> CoresetOverlap:
        if not self._sums:
            raise TaskError("no block took a second forward")
        sums = torch.stack([self._sums[step][index] for step in sorted(self._sums)])
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
    """[S, E] bool: the coreset; under vanilla, the experts in use."""
    scores = observation.scores
    mask = policy.eligible(scores, scores.router.k)
    if mask.numel() > 1:
        return mask.expand(len(observation.rows), 1, -1)[:, 0]
    vanilla_ids = observation.routing.vanilla_ids.view(len(observation.rows), -1)
    return expert_mask(vanilla_ids, scores.router.experts)


def summed_votes(scores: Scores) -> Tensor:
    """[S, E] float64: the probabilities of each token's own experts, summed over tokens."""
    return VOTES["topk-prob"](scores, vote_weights(scores, "all"), 0).double()


def overlap_row(previous: ElectedSets, current: ElectedSets) -> Tensor:
    """[policies, columns] float64 of two consecutive forwards."""
    intersection = (previous.sets & current.sets).sum(-1)
    union = (previous.sets | current.sets).sum(-1)
    cosine = F.cosine_similarity(previous.votes, current.votes, dim=0)
    votes_held = [
        (sets * current.votes).sum(-1) / current.votes.sum()
        for sets in (current.sets, previous.sets, current.first)
    ]
    ones = torch.ones_like(intersection, dtype=torch.float64)
    columns = [ones, intersection / union, current.sets.sum(-1), cosine * ones, *votes_held]
    return torch.stack(columns, dim=-1).double()
