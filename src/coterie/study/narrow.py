"""K = 8 against K = 4 at the same coreset (Fig. 8): is it the set that counts, or how many each
token takes of it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from torch import Tensor

from coterie.evals.asking import Outcome, Question, outcomes
from coterie.routing import DesVote
from coterie.routing.select import choose
from coterie.study.arms import FEW, by_beta, compare
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.curves import arm_table, draw
from coterie.study.duel import claimed, duels
from coterie.study.lab import ROWS, Lab
from coterie.study.tally import Arms, Tally
from coterie.values import Policy, Scores, membership

WIDE = "all of a token's experts"


@dataclass(frozen=True)
class Narrow:
    """Another policy's coreset, of which every token takes its best ``k`` only."""

    policy: Policy
    k: int

    def eligible(self, scores: Scores, k: int) -> Tensor:
        ids = choose(scores, self.policy.eligible(scores, k))[..., : self.k]
        return membership(ids, scores.router.experts)


@dataclass(frozen=True)
class ExpertsPerToken:
    """The same votes, the same coreset, half the experts for each token."""

    name: str = "experts-per-token"
    title: str = "K = 8 against K = 4 at the same coreset (Fig. 8)"
    question: str = (
        "Experts in the coreset cost no further traffic, so a token may use as many as the model "
        "was trained with. Would half of them do?"
    )

    def measure(self, lab: Lab) -> Facts:
        half = max(1, lab.engine.model.spec.router.k // 2)
        wide = by_beta("des-vote")
        tallies = []
        for place, (arm, beta) in enumerate(zip(wide, FEW, strict=True)):
            name = f"{arm.name} K={half}"
            lab.tell(place / (len(FEW) + 1), name)
            tallies.append(answered(lab, Narrow(DesVote(beta), half), name, arm.policy))
        facts = dict(compare(lab, {WIDE: wide}, extra=tallies))
        return {**facts, "half": half, "narrow": [tally.name for tally in tallies]}

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        arms = _grouped(facts)
        caption = (
            "Right answers of DES-Vote where a token uses as many experts of the coreset as the "
            "model was trained with, and half as many."
        )
        return [Drawing(self.name, caption, lambda: draw(arms, looks="place"))]

    def tables(self, facts: Facts) -> Sequence[Table]:
        arms = _grouped(facts)
        caption = (
            "The coreset is the same on the same block; experts are those touched, which are fewer "
            "where tokens take fewer. Forwards are per block."
        )
        return [arm_table(arms.groups, arms.vanilla, caption)]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        arms = _grouped(facts)
        narrow, wide = (arms.groups[label] for label in (_half(facts), WIDE))
        fought = duels(zip(narrow, wide, strict=True))
        half, k = f"K = {facts['half']}", f"K = {arms.k}"
        return [
            claimed(
                f"At the same coreset, {k} is more accurate than {half}: experts already loaded "
                "should be used.",
                fought, second=k, first=half, at="at the same coreset",
            )
        ]  # fmt: skip


def answered(lab: Lab, policy: Policy, name: str, spelled: str) -> Tally:
    """A tally under a policy that has no spelling; its answers are not kept."""
    each = -(-lab.items // len(lab.tasks))
    asked = [
        Question(task, item, lab.engine.generation.but(**task.generation()))
        for task in lab.tasks
        for item in task.items()[:each]
    ]
    ended = [o for some in outcomes(lab.engine, asked, policy, rows=ROWS) for o in some]
    by_question = {(o.question.task.name, o.question.item.id): o for o in ended}
    ordered = [by_question[question.task.name, question.item.id] for question in asked]
    results = [outcome.result for outcome in ordered if outcome.result is not None]
    weights = [result.experts.forwards for result in results]
    seconds = sum(outcome.seconds for outcome in ended)
    return Tally(
        name=name,
        policy=spelled,
        generation={},
        right=_graded(ordered),
        experts=fmean((result.experts.mean for result in results), weights),
        expert_bytes=fmean((result.expert_bytes for result in results), weights),
        vote_mass_kept=fmean((result.vote_mass_kept for result in results), weights),
        forwards_per_block=sum(r.forwards for r in results) / sum(r.blocks for r in results),
        new_tokens=fmean(result.new_tokens for result in results),
        tokens_per_second=sum(result.new_tokens for result in results) / seconds,
        failed=len(ordered) - len(results),
    )


def _graded(ordered: Sequence[Outcome]) -> dict[str, str]:
    """Task -> "0110", as a tally has it."""
    digits: dict[str, list[str]] = {}
    for outcome in ordered:
        task, item, result = outcome.question.task, outcome.question.item, outcome.result
        right = result is not None and task.grade(result.text, item).correct
        digits.setdefault(task.name, []).append(str(int(right)))
    return {task: "".join(told) for task, told in digits.items()}


def _half(facts: Facts) -> str:
    return f"{facts['half']} of them"


def _grouped(facts: Facts) -> Arms:
    """The arms with the narrow ones as a group of their own."""
    arms, names = Arms.of(facts), facts["narrow"]
    assert isinstance(names, list)
    groups = {**arms.groups, _half(facts): [arms.tallies[name] for name in names]}
    return replace(arms, groups=groups)
