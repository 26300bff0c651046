"""K = 8 against K = 4 at the same coreset (Fig. 8): the effect of experts per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from coterie.lab.evals.generation import EvalRequest, generate_outcomes
from coterie.lab.evals.run import EvalResult, Variant, make_answer
from coterie.lab.study.comparison import claim_finding, draw_comparison, variant_table
from coterie.lab.study.experiment import BATCH_SIZE, Entry, Experiment, Part, StudyContext
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.variants import expand_policies, run_comparison
from coterie.routing import parse_policy
from coterie.routing.router import select_topk
from coterie.values import Policy, Scores, expert_mask

FULL_K_LABEL = "all of a token's experts"
POLICIES = "des-vote:beta={0.15,0.3,0.5}"


@dataclass(frozen=True)
class LimitTopK:
    """The coreset of another policy, of which every token uses its best ``k`` experts only."""

    policy: Policy
    k: int

    def eligible(self, scores: Scores, k: int) -> Tensor:
        ids = select_topk(scores, self.policy.eligible(scores, k))[..., : self.k]
        return expert_mask(ids, scores.router.experts)


class ExpertsPerTokenExperiment(Experiment, name="experts-per-token"):
    """The same votes, the same coreset, half the experts for each token."""

    def measure(self, context: StudyContext) -> Entry:
        k = context.engine.model.spec.router.k
        half = max(1, k // 2)
        half_k_results = []
        for index, variant in enumerate(expand_policies(POLICIES, k)):
            name = f"{variant.name} K={half}"
            context.on_progress(index / 4, name)
            policy = LimitTopK(parse_policy(variant.policy), half)
            half_k_results.append(evaluate_policy(context, policy, name, variant.policy))
        results = run_comparison(context, {FULL_K_LABEL: POLICIES}, extra=half_k_results)
        narrow = [result.name for result in half_k_results]
        return {**results.to_record(), "half": half, "narrow": narrow}

    def report(self, record: Entry) -> Iterator[Part]:
        results = _results_with_half_k(record)
        draw = partial(draw_comparison, results, by_family=False)
        yield self.text.drawing("figure", draw)
        yield variant_table(results, self.text.caption("table"))
        full_k, half_k = results.groups.values()
        half, k = f"K = {record['half']}", f"K = {results.k}"
        pairs = list(zip(half_k, full_k, strict=True))
        claim, at = self.text.claim("full", k=k, half=half), "at the same coreset"
        yield claim_finding(claim, pairs, second=k, first=half, condition=at)


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
    answers = {}
    for outcomes in generate_outcomes(context.engine, requests, policy, batch_size=BATCH_SIZE):
        for outcome in outcomes:
            request = outcome.request
            answers[request.task.name, request.item.id] = make_answer(name, outcome)
    in_order = tuple(answers[request.task.name, request.item.id] for request in requests)
    eval_result = EvalResult(Variant(policy_spec), in_order)
    return replace(VariantResult.from_eval_result(eval_result), name=name)


def _results_with_half_k(record: Entry) -> VariantResults:
    """Two groups: with all of a token's experts, and with half of them."""
    results = VariantResults.from_record(record, [FULL_K_LABEL])
    half_k = [results.by_name[name] for name in record["narrow"]]
    return replace(results, groups={**results.groups, f"{record['half']} of them": half_k})
