"""K = 8 against K = 4 at the same coreset (Fig. 8): the effect of experts per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from torch import Tensor

from coterie.lab.evals.generation import EvalRequest, GenerationOutcome, generate_outcomes
from coterie.lab.study.comparison import draw_comparison, variant_table
from coterie.lab.study.context import BATCH_SIZE, StudyContext
from coterie.lab.study.experiment import Drawing, Experiment, ExperimentText, Finding, Table
from coterie.lab.study.paired import claim_finding, compare_pairs
from coterie.lab.study.results import VariantResult, VariantResults, VariantsRecord
from coterie.lab.study.variants import MAIN_BETAS, beta_variants, run_comparison
from coterie.routing import DesVote
from coterie.routing.router import select_topk
from coterie.values import Policy, Scores, expert_mask

FULL_K_LABEL = "all of a token's experts"


class HalfKRecord(VariantsRecord):
    """``narrow`` are the names of the results with ``half`` of the model's K."""

    half: int
    narrow: list[str]


@dataclass(frozen=True)
class LimitTopK:
    """The coreset of another policy, of which every token uses its best ``k`` experts only."""

    policy: Policy
    k: int

    def eligible(self, scores: Scores, k: int) -> Tensor:
        ids = select_topk(scores, self.policy.eligible(scores, k))[..., : self.k]
        return expert_mask(ids, scores.router.experts)


class ExpertsPerTokenExperiment(Experiment):
    """The same votes, the same coreset, half the experts for each token."""

    text = ExperimentText.load("experts-per-token")

    def measure(self, context: StudyContext) -> HalfKRecord:
        half = max(1, context.engine.model.spec.router.k // 2)
        full_k_variants = beta_variants("des-vote")
        half_k_results = []
        for index, (variant, beta) in enumerate(zip(full_k_variants, MAIN_BETAS, strict=True)):
            name = f"{variant.name} K={half}"
            context.on_progress(index / (len(MAIN_BETAS) + 1), name)
            half_k_results.append(
                evaluate_policy(context, LimitTopK(DesVote(beta), half), name, variant.policy)
            )
        record = run_comparison(context, {FULL_K_LABEL: full_k_variants}, extra=half_k_results)
        return HalfKRecord(**record, half=half, narrow=[result.name for result in half_k_results])

    def drawings(self, record: HalfKRecord) -> Sequence[Drawing]:
        results = _results_with_half_k(record)
        caption = self.text.caption("figure")
        return [Drawing(self.name, caption, lambda: draw_comparison(results, color_by="place"))]

    def tables(self, record: HalfKRecord) -> Sequence[Table]:
        return [variant_table(_results_with_half_k(record), self.text.caption("table"))]

    def findings(self, record: HalfKRecord) -> Sequence[Finding | str]:
        results = _results_with_half_k(record)
        half_k, full_k = (results.groups[label] for label in (_half_k_label(record), FULL_K_LABEL))
        half, k = f"K = {record['half']}", f"K = {results.k}"
        claim = self.text.claim("full", k=k, half=half)
        comparisons = compare_pairs(zip(half_k, full_k, strict=True))
        condition = "at the same coreset"
        return [claim_finding(claim, comparisons, second=k, first=half, condition=condition)]


def evaluate_policy(
    context: StudyContext, policy: Policy, name: str, policy_spec: str
) -> VariantResult:
    """The result of a policy object that has no spelling. Its answers are not stored."""
    per_task = -(-context.num_problems // len(context.tasks))
    questions = [
        EvalRequest(task, item, context.engine.generation.replace(**task.generation()))
        for task in context.tasks
        for item in task.items()[:per_task]
    ]
    batches = generate_outcomes(context.engine, questions, policy, batch_size=BATCH_SIZE)
    finished = [outcome for batch in batches for outcome in batch]
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


def _grade_digits(outcomes: Sequence[GenerationOutcome]) -> dict[str, str]:
    """Task -> "0110", one digit per item."""
    digits: dict[str, str] = {}
    for outcome in outcomes:
        task, item, result = outcome.request.task, outcome.request.item, outcome.result
        correct = result is not None and task.grade(result.text, item).correct
        digits[task.name] = digits.get(task.name, "") + str(int(correct))
    return digits


def _half_k_label(record: HalfKRecord) -> str:
    return f"{record['half']} of them"


def _results_with_half_k(record: HalfKRecord) -> VariantResults:
    results = VariantResults.from_record(record, [FULL_K_LABEL])
    half_k = [results.by_name[name] for name in record["narrow"]]
    return replace(results, groups={**results.groups, _half_k_label(record): half_k})
