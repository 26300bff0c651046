"""K = 8 against K = 4 at the same coreset (Fig. 8): is it the set that counts, or how many each
token takes of it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from torch import Tensor

from coterie.lab.evals.generation import EvalRequest, GenerationOutcome, generate_outcomes
from coterie.lab.study.context import BATCH_SIZE, StudyContext
from coterie.lab.study.curves import draw_comparison, variant_table
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.paired import claim_finding, compare_pairs
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.variants import MAIN_BETAS, beta_variants, run_comparison
from coterie.routing import DesVote
from coterie.routing.router import select_topk
from coterie.values import Policy, Scores, expert_mask

FULL_K_LABEL = "all of a token's experts"


@dataclass(frozen=True)
class LimitTopK:
    """Another policy's coreset, of which every token takes its best ``k`` only."""

    policy: Policy
    k: int

    def eligible(self, scores: Scores, k: int) -> Tensor:
        ids = select_topk(scores, self.policy.eligible(scores, k))[..., : self.k]
        return expert_mask(ids, scores.router.experts)


@dataclass(frozen=True)
class ExpertsPerTokenExperiment:
    """The same votes, the same coreset, half the experts for each token."""

    name: str = "experts-per-token"
    title: str = "K = 8 against K = 4 at the same coreset (Fig. 8)"
    question: str = (
        "Experts in the coreset cost no further traffic, so a token may use as many as the model "
        "was trained with. Would half of them do?"
    )

    def measure(self, context: StudyContext) -> ExperimentData:
        half = max(1, context.engine.model.spec.router.k // 2)
        full_k_variants = beta_variants("des-vote")
        variant_results = []
        for index, (variant, beta) in enumerate(zip(full_k_variants, MAIN_BETAS, strict=True)):
            name = f"{variant.name} K={half}"
            context.on_progress(index / (len(MAIN_BETAS) + 1), name)
            variant_results.append(
                evaluate_policy(context, LimitTopK(DesVote(beta), half), name, variant.policy)
            )
        data = dict(run_comparison(context, {FULL_K_LABEL: full_k_variants}, extra=variant_results))
        return {**data, "half": half, "narrow": [result.name for result in variant_results]}

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        results = _results_with_half_k(data)
        caption = (
            "Right answers of DES-Vote where a token uses as many experts of the coreset as the "
            "model was trained with, and half as many."
        )
        return [Drawing(self.name, caption, lambda: draw_comparison(results, looks="place"))]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        results = _results_with_half_k(data)
        caption = (
            "The coreset is the same on the same block; experts are those touched, which are fewer "
            "where tokens take fewer. Forwards are per block."
        )
        return [variant_table(results.groups, results.vanilla, caption)]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        results = _results_with_half_k(data)
        half_k, full_k = (results.groups[label] for label in (_half_k_label(data), FULL_K_LABEL))
        comparisons = compare_pairs(zip(half_k, full_k, strict=True))
        half, k = f"K = {data['half']}", f"K = {results.k}"
        return [
            claim_finding(
                f"At the same coreset, {k} is more accurate than {half}: experts already loaded "
                "should be used.",
                comparisons, second=k, first=half, condition="at the same coreset",
            )
        ]  # fmt: skip


def evaluate_policy(
    context: StudyContext, policy: Policy, name: str, policy_spec: str
) -> VariantResult:
    """A tally under a policy that has no spelling; its answers are not kept."""
    per_task = -(-context.num_problems // len(context.tasks))
    questions = [
        EvalRequest(task, item, context.engine.generation.replace(**task.generation()))
        for task in context.tasks
        for item in task.items()[:per_task]
    ]
    finished = [
        o
        for batch in generate_outcomes(context.engine, questions, policy, batch_size=BATCH_SIZE)
        for o in batch
    ]
    by_question = {(o.request.task.name, o.request.item.id): o for o in finished}
    in_order = [by_question[question.task.name, question.item.id] for question in questions]
    results = [outcome.result for outcome in in_order if outcome.result is not None]
    weights = [result.experts.forwards for result in results]
    seconds = sum(outcome.seconds for outcome in finished)
    return VariantResult(
        name=name,
        policy=policy_spec,
        generation={},
        right=_grade_digits(in_order),
        experts=fmean((result.experts.mean for result in results), weights),
        expert_bytes=fmean((result.expert_bytes for result in results), weights),
        vote_mass_kept=fmean((result.vote_mass_kept for result in results), weights),
        forwards_per_block=sum(r.forwards for r in results) / sum(r.blocks for r in results),
        new_tokens=fmean(result.new_tokens for result in results),
        tokens_per_second=sum(result.new_tokens for result in results) / seconds,
        failed=len(in_order) - len(results),
    )


def _grade_digits(ordered: Sequence[GenerationOutcome]) -> dict[str, str]:
    """Task -> "0110", as a tally has it."""
    digits: dict[str, list[str]] = {}
    for outcome in ordered:
        task, item, result = outcome.request.task, outcome.request.item, outcome.result
        right = result is not None and task.grade(result.text, item).correct
        digits.setdefault(task.name, []).append(str(int(right)))
    return {task: "".join(digits_of_task) for task, digits_of_task in digits.items()}


def _half_k_label(data: ExperimentData) -> str:
    return f"{data['half']} of them"


def _results_with_half_k(data: ExperimentData) -> VariantResults:
    """The arms with the narrow ones as a group of their own."""
    variants, names = VariantResults.from_data(data), data["narrow"]
    assert isinstance(names, list)
    groups = {**variants.groups, _half_k_label(data): [variants.by_name[name] for name in names]}
    return replace(variants, groups=groups)
