"""From one forward of a block to the next: how much of a coreset stays, and what staying costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from coterie.engine.watch import Watched
from coterie.figures.style import axes, legend, look, percent
from coterie.naming import CoterieError
from coterie.routing import parse_policy
from coterie.routing.votes import VOTES, voices
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.fidelity import SLOW, look_again, traced
from coterie.study.lab import Lab
from coterie.values import Policy, Scores, membership

VANILLA = "vanilla"
POLICIES = (
    *(VANILLA, "des-vote:beta=0.3", "des-vote:beta=0.15", "des-seq:k=3"),
    *("des-vote:beta=0.15,voters=before-eos,protect=top1", "random:beta=0.15"),
)
AGES = ("fresh", "last", "first")
COLUMNS = ("pairs", "jaccard", "size", "votes", *AGES)


class Overlap(TypedDict):
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


class Found(TypedDict):
    experts: int
    prompts: int
    layers: list[int]
    forwards: int  # a block
    overlaps: list[Overlap]


@dataclass(frozen=True)
class Steps:
    """Vanilla decoding, eight forwards a block; every policy elects in each of them."""

    name: str = "steps"
    title: str = "Coresets from forward to forward (not in the paper)"
    question: str = (
        "A block is forwarded several times while it fills. Does it elect the same experts again, "
        "so that they could stay where they are, or be elected once?"
    )

    def measure(self, lab: Lab) -> Facts:
        lab.tell(0.0, "decoding slowly")
        trace = traced(lab, slow=True)
        pairs = Pairs(tuple(map(parse_policy, POLICIES)))
        look_again(lab, trace, pairs.see, lambda share: lab.tell(0.1 + 0.9 * share, "electing"))
        experts = lab.engine.model.spec.router.experts
        found = Found(
            experts=experts,
            prompts=len(trace.prompts),
            layers=list(trace.layers),
            forwards=SLOW,
            overlaps=[
                pairs.overlap(number, policy, experts) for number, policy in enumerate(POLICIES)
            ],
        )
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        return [
            Drawing(
                "coreset-overlap",
                "Overlap (Jaccard) of the experts elected in one forward of a block and in the "
                f"next; vanilla: of those in use. {found['prompts']} prompts, "
                f"{found['forwards']} forwards a block.",
                lambda: draw(found),
            )
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        return [
            Table(
                heads=["policy", "experts", "overlap", "by lot", "votes", *AGES],
                rows=[
                    [
                        one["policy"],
                        f"{one['size']:.1f}",
                        f"{one['jaccard']:.2f}",
                        f"{one['chance']:.2f}",
                        f"{one['votes']:.3f}",
                        *(f"{one[age]:.1%}" for age in AGES),
                    ]
                    for one in found["overlaps"]
                ],
                caption="Overlap (Jaccard) of a forward's coreset with the last one's, and what "
                "random sets of that size would share; cosine of the votes; votes held by a fresh "
                "coreset, by the last forward's, and by the one of the block's first forward.",
                numbers=[1, 2, 3, 4, 5, 6, 7],
            )
        ]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        vanilla, vote = found["overlaps"][:2]
        return [
            f"Under {vote['policy']}, the coresets of two forwards in a row overlap by "
            f"{vote['jaccard']:.0%} (Jaccard; {vote['chance']:.0%} by lot), under vanilla the "
            f"experts in use by {vanilla['jaccard']:.0%}.",
            f"A coreset elected one forward earlier holds {vote['last']:.1%} of the votes, the one "
            f"of the block's first forward {vote['first']:.1%}, a fresh one {vote['fresh']:.1%}: "
            "what electing less often would save in selection it would pay in votes.",
        ]


@dataclass(frozen=True)
class Elected:
    """One forward's sets and votes of one row in one layer; ``first``: its block's first sets."""

    start: int
    step: int
    sets: Tensor  # [policies, E] bool
    votes: Tensor  # [E]
    first: Tensor


@dataclass  # not frozen: it adds up
class Pairs:
    """What two forwards in a row have in common, by policy and by the step of the earlier one."""

    policies: tuple[Policy, ...]
    _last: dict[tuple[int, int], Elected] = field(default_factory=dict)  # row, layer
    _sums: dict[int, Tensor] = field(default_factory=dict)  # step -> [policies, columns]

    def see(self, watched: Watched) -> None:
        sets = torch.stack(
            [elected(watched, policy) for policy in self.policies]
        ).cpu()  # [P, S, E]
        votes = summed_votes(watched.scores).cpu()
        for place, (row, start) in enumerate(zip(watched.rows, watched.starts, strict=True)):
            before = self._last.get((row, watched.layer))
            now = Elected(start, 0, sets[:, place], votes[place], sets[:, place])
            if before is not None and before.start == start:
                now = Elected(start, before.step + 1, now.sets, now.votes, before.first)
                there = torch.zeros(len(self.policies), len(COLUMNS), dtype=torch.float64)
                self._sums.setdefault(before.step, there).add_(compared(before, now))
            self._last[row, watched.layer] = now

    def overlap(self, number: int, policy: str, experts: int) -> Overlap:
        if not self._sums:
            raise CoterieError("no block took a second forward")
        sums = torch.stack([self._sums[step][number] for step in sorted(self._sums)])
        whole = dict(zip(COLUMNS, (sums.sum(0) / sums[:, 0].sum()).tolist(), strict=True))
        size = whole["size"]
        shared = size * size / experts
        return Overlap(
            policy=policy,
            size=size,
            jaccard=whole["jaccard"],
            chance=shared / (2 * size - shared),
            votes=whole["votes"],
            fresh=whole["fresh"],
            last=whole["last"],
            first=whole["first"],
            by_step=(sums[:, 1] / sums[:, 0]).tolist(),
        )


def elected(watched: Watched, policy: Policy) -> Tensor:
    """[S, E] bool: the coreset; of the unmodified model, the experts in use."""
    scores = watched.scores
    mask = policy.eligible(scores, scores.router.k)
    if mask.numel() > 1:
        return mask.expand(len(watched.rows), 1, -1)[:, 0]
    own = watched.routing.own.view(len(watched.rows), -1)
    return membership(own, scores.router.experts)


def summed_votes(scores: Scores) -> Tensor:
    """[S, E] float64: everybody's probability for their own experts."""
    return VOTES["masked"](scores, voices(scores, "all"), 0).double()


def compared(before: Elected, now: Elected) -> Tensor:
    """[policies, columns] float64 of two forwards in a row."""
    both, either = (before.sets & now.sets).sum(-1), (before.sets | now.sets).sum(-1)
    cosine = F.cosine_similarity(before.votes, now.votes, dim=0)
    held = [
        (sets * now.votes).sum(-1) / now.votes.sum() for sets in (now.sets, before.sets, now.first)
    ]
    one = torch.ones_like(both, dtype=torch.float64)
    return torch.stack([one, both / either, now.sets.sum(-1), cosine * one, *held], dim=-1).double()


def draw(found: Found) -> Figure:
    figure, one = axes("forward of the block", "overlap with the next", height=3.8)
    seen: dict[str, int] = {}
    for overlap in found["overlaps"]:
        dress = look(overlap["policy"])
        number = seen[dress.colour] = seen.get(dress.colour, -1) + 1
        one.plot(
            range(1, 1 + len(overlap["by_step"])),
            overlap["by_step"],
            color=dress.colour,
            marker=dress.marker,
            linestyle="--" if number else "-",
            label=overlap["policy"].replace(",voters=before-eos,protect=top1", ", words, top-1"),
        )
    one.set_ylim(0, 1.03)
    percent(one)
    legend(one)
    return figure
