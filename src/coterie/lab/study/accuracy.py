"""Findings on accuracy against experts (Fig. 1c), the coreset's size (Fig. 7a), and Table 1."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from coterie.lab.plotting import pareto_front
from coterie.lab.study.comparison import PolicyComparison, compare_pairs, variant_rows
from coterie.lab.study.experiment import ExperimentText, Finding, Part, judge
from coterie.lab.study.results import VariantResult, VariantResults

DES_VOTE, DES_SEQ, TOP_K = "DES-Vote", "DES-Seq", "top-k"  # groups of comparisons.toml
GUARDED = "DES-Vote, guarded"  # answer tokens vote, and each voter's best expert is protected
MAIN_VOTES = ("des-vote:beta=0.5", "des-vote:beta=0.3", "des-vote:beta=0.15")
# The paper's headline: 99 % of the accuracy with 55 % fewer experts.
MIN_RELATIVE_ACCURACY, MIN_EXPERT_REDUCTION = 0.99, 0.55
NO_ACCURACY = "Vanilla has no correct answer, so there is no accuracy to keep."


def accuracy_findings(text: ExperimentText, results: VariantResults) -> Iterator[Part]:
    plain = {result.policy: result for result in results.groups[DES_VOTE]}
    guarded = [(plain[r.policy.partition(",")[0]], r) for r in results.groups[GUARDED]]
    gain = max(compare_pairs(guarded), key=lambda comparison: comparison.change.difference)
    front = pareto_front(results.all, lambda result: (result.experts, result.accuracy))
    points = ", ".join(f"{r.name} ({r.experts:.0f}, {r.accuracy:.1%})" for r in front)
    yield headline_finding(text, results)
    yield text.sentence("guarded", gain=gain)
    yield text.sentence("front", points=points)


def headline_finding(text: ExperimentText, results: VariantResults) -> Finding:
    """The smallest DES policy that keeps 99 % of the accuracy, against 55 % fewer experts."""
    vanilla, best, kept = results.vanilla, smallest_accurate(results), MIN_RELATIVE_ACCURACY
    if not vanilla.accuracy:
        return judge(NO_ACCURACY, text.claim("headline"), None)
    if best is None:
        return text.finding("none-accurate", False, claim="headline", kept=kept)
    saved = 1 - best.experts / vanilla.experts
    values = {"kept": kept, "best": best, "saved": saved, "vanilla": vanilla}
    return text.finding("headline", saved > MIN_EXPERT_REDUCTION, **values)


def smallest_accurate(results: VariantResults) -> VariantResult | None:
    """The DES policy with the fewest experts that keeps 99 % of vanilla's accuracy."""
    least = MIN_RELATIVE_ACCURACY * results.vanilla.accuracy
    variants = [*results.groups[DES_VOTE], *results.groups[DES_SEQ]]
    accurate = [result for result in variants if result.accuracy >= least]
    return min(accurate, key=lambda result: result.experts, default=None)


def size_findings(text: ExperimentText, results: VariantResults) -> Iterator[Part]:
    """How small the coreset can be."""
    votes, vanilla = results.groups[DES_VOTE], results.vanilla
    if not vanilla.accuracy:
        yield NO_ACCURACY
        return
    comparisons = compare_pairs([(vanilla, vote) for vote in votes])
    for comparison in (c for c in comparisons if c.second.policy == "des-vote:beta=0.15"):
        relative = comparison.second.accuracy / vanilla.accuracy
        holds = relative >= MIN_RELATIVE_ACCURACY
        yield text.finding("small", holds, comparison=comparison, relative=relative)
    similar = [comparison.second for comparison in comparisons if comparison.sign == 0]
    smallest = min(similar, key=lambda vote: vote.experts, default=None)
    key = "smallest" if smallest else "none-similar"
    yield text.sentence(key, smallest=smallest, vanilla=vanilla)


def table_parts(text: ExperimentText, results: VariantResults) -> Iterator[Part]:
    """Accuracy by task, paired differences, experts and bytes."""
    rows, tasks = variant_rows(results), results.vanilla.right
    columns = {task: partial(_accuracy_cell, task) for task in tasks}
    n = len(next(iter(tasks.values())))
    more = {"all": partial(_accuracy_cell, None), **columns}
    yield text.table("accuracy", results.all, more, n=n)
    yield text.table("paired", rows[1:])
    yield text.table("traffic", rows)
    vanilla, *others = results.all
    yield text.sentence("vanilla", vanilla=vanilla, n=vanilla.accuracy_share().n)
    for result in (result for result in others if result.policy in MAIN_VOTES):
        yield task_sentence(text, result, vanilla)
    kept, fewer = MIN_RELATIVE_ACCURACY, MIN_EXPERT_REDUCTION
    names = [
        result.name
        for result in others
        if result.accuracy >= kept * vanilla.accuracy
        and result.experts <= (1 - fewer) * vanilla.experts
    ]
    yield text.sentence("accurate", kept=kept, fewer=fewer, names=", ".join(names) or "none")


def _accuracy_cell(task: str | None, result: VariantResult) -> str:
    share = result.accuracy_share(task)
    low, high = share.interval
    return f"{100 * share.value:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def task_sentence(text: ExperimentText, result: VariantResult, vanilla: VariantResult) -> str:
    """The tasks on which a policy loses most and least."""
    changes = [
        (result.accuracy_share(task).value - vanilla.accuracy_share(task).value, task)
        for task in vanilla.right
    ]
    worst, best = (choose(changes, key=lambda change: change[0]) for choose in (min, max))
    relative = result.relative_accuracy(vanilla)
    return text.sentence("tasks", result=result, relative=relative, worst=worst, best=best)


ACCURACY = PolicyComparison.load("accuracy", own_parts=accuracy_findings)
CORESET_SIZE = PolicyComparison.load("coreset-size", own_parts=size_findings)
TABLE_ONE = PolicyComparison.load("table-1", own_parts=table_parts, has_usual_parts=False)
