"""K = 8 against K = 4 at the same coreset (Fig. 8): the effect of experts per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from torch import Tensor

from coterie.lab.evals.generation import EvalRequest, GenerationOutcome, generate_outcomes
from coterie.lab.study.comparison import draw_by_position, variant_table
from coterie.lab.study.context import BATCH_SIZE, StudyContext
from coterie.lab.study.experiment import Drawing, Experiment, ExperimentText, Finding, Table
from coterie.lab.study.paired import claim_finding
from coterie.lab.study.results import JsonObject, VariantResult, VariantResults
from coterie.lab.study.variants import MAIN_BETAS, beta_variants, run_comparison
from coterie.routing import DesVote
from coterie.routing.router import select_topk
from coterie.values import Policy, Scores, expert_mask

FULL_K_LABEL = "all of a token's experts"


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

    def measure(self, context: StudyContext) -> JsonObject:
        half = max(1, context.engine.model.spec.router.k // 2)
        full_k_variants = beta_variants("des-vote")
        half_k_results = []
        for index, (variant, beta) in enumerate(zip(full_k_variants, MAIN_BETAS, strict=True)):
            name = f"{variant.name} K={half}"
            context.on_progress(index / (len(MAIN_BETAS) + 1), name)
            half_k_results.append(
                evaluate_policy(context, LimitTopK(DesVote(beta), half), name, variant.policy)
            )
        results = run_comparison(context, {FULL_K_LABEL: full_k_variants}, extra=half_k_results)
        narrow = [result.name for result in half_k_results]
        return {**results.to_record(), "half": half, "narrow": narrow}

    def drawings(self, record: Mapping[str, Any]) -> Sequence[Drawing]:
        draw = partial(draw_by_position, _results_with_half_k(record))
        return [Drawing(self.name, self.text.caption("figure"), draw)]

    def tables(self, record: Mapping[str, Any]) -> Sequence[Table]:
        return [variant_table(_results_with_half_k(record), self.text.caption("table"))]

    def findings(self, record: Mapping[str, Any]) -> Sequence[Finding | str]:
        results = _results_with_half_k(record)
        full_k, half_k = results.groups.values()
        half, k = f"K = {record['half']}", f"K = {results.k}"
        pairs = list(zip(half_k, full_k, strict=True))
        claim, at = self.text.claim("full", k=k, half=half), "at the same coreset"
        return [claim_finding(claim, pairs, second=k, first=half, condition=at)]


def evaluate_policy(
    context: StudyContext, policy: Policy, name: str, policy_spec: str
) -> VariantResult:
    """The result of a policy object that has no spelling. Its answers are not stored."""
    per_task = -(-context.num_problems // len(context.tasks))
    requests = [
        EvalRequest(task, item, context.engine.generation.replace(**task.generation()))
        for task in context.tasks
        for item in task.items()[:per_task]
    ]
    batches = generate_outcomes(context.engine, requests, policy, batch_size=BATCH_SIZE)
    outcomes = [outcome for batch in batches for outcome in batch]
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    weights = [result.experts.forwards for result in results]
    correct = {(o.request.task.name, o.request.item.id): _is_correct(o) for o in outcomes}
    right = {
        task.name: "".join(str(int(correct[task.name, i.id])) for i in task.items()[:per_task])
        for task in context.tasks
    }
    return VariantResult(
        name=name,
        policy=policy_spec,
        generation={},
        right=right,
        experts=fmean((result.experts.mean for result in results), weights),
        expert_bytes=fmean((result.expert_bytes for result in results), weights),
        vote_mass_kept=fmean((result.vote_mass_kept for result in results), weights),
        forwards_per_block=sum(r.forwards for r in results) / sum(r.blocks for r in results),
        new_tokens=fmean(result.new_tokens for result in results),
        tokens_per_second=sum(r.new_tokens for r in results) / sum(o.seconds for o in outcomes),
        failed=len(outcomes) - len(results),
    )


def _is_correct(outcome: GenerationOutcome) -> bool:
    task, item, result = outcome.request.task, outcome.request.item, outcome.result
    return result is not None and task.grade(result.text, item).correct


def _results_with_half_k(record: Mapping[str, Any]) -> VariantResults:
    """Two groups: with all of a token's experts, and with half of them."""
    results = VariantResults.from_record(record, [FULL_K_LABEL])
    half_k = [results.by_name[name] for name in record["narrow"]]
    return replace(results, groups={**results.groups, f"{record['half']} of them": half_k})
