"""Findings on accuracy against experts (Fig. 1c), the coreset's size (Fig. 7a), and Table 1."""

from __future__ import annotations

from dataclasses import replace

from coterie.lab.study.charts import pareto_front
from coterie.lab.study.comparison import PolicyComparison, compare_pairs, variant_rows
from coterie.lab.study.experiment import ExperimentText, Finding, Table, judge
from coterie.lab.study.results import VariantResult, VariantResults

DES_VOTE, DES_SEQ, TOP_K = "DES-Vote", "DES-Seq", "top-k"  # groups of comparisons.toml
GUARDED = "DES-Vote, guarded"  # answer tokens vote, and each voter's best expert is protected
MAIN_VOTES = ("des-vote:beta=0.5", "des-vote:beta=0.3", "des-vote:beta=0.15")
# The paper's headline: 99 % of the accuracy with 55 % fewer experts.
MIN_RELATIVE_ACCURACY, MIN_EXPERT_REDUCTION = 0.99, 0.55
NO_ACCURACY = "Vanilla has no correct answer, so there is no accuracy to keep."


def accuracy_findings(text: ExperimentText, results: VariantResults) -> list[Finding | str]:
    plain = {result.policy: result for result in results.groups[DES_VOTE]}
    guarded = [(plain[r.policy.partition(",")[0]], r) for r in results.groups[GUARDED]]
    gain = max(compare_pairs(guarded), key=lambda comparison: comparison.change.difference)
    front = pareto_front(results.all, lambda result: (result.experts, result.accuracy))
    points = ", ".join(f"{r.name} ({r.experts:.0f}, {r.accuracy:.1%})" for r in front)
    return [
        headline_finding(text, results),
        text.sentence("guarded", gain=gain),
        text.sentence("front", points=points),
    ]


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


def size_findings(text: ExperimentText, results: VariantResults) -> list[Finding | str]:
    """How small the coreset can be."""
    votes, vanilla = results.groups[DES_VOTE], results.vanilla
    if not vanilla.accuracy:
        return [NO_ACCURACY]
    comparisons = compare_pairs([(vanilla, vote) for vote in votes])
    findings: list[Finding | str] = []
    for comparison in (c for c in comparisons if c.second.policy == "des-vote:beta=0.15"):
        relative = comparison.second.accuracy / vanilla.accuracy
        holds = relative >= MIN_RELATIVE_ACCURACY
        findings.append(text.finding("small", holds, comparison=comparison, relative=relative))
    similar = [comparison.second for comparison in comparisons if comparison.sign == 0]
    if not similar:
        return [*findings, text.sentence("none-similar")]
    smallest = min(similar, key=lambda vote: vote.experts)
    return [*findings, text.sentence("smallest", smallest=smallest, vanilla=vanilla)]


def table_findings(text: ExperimentText, results: VariantResults) -> list[Finding | str]:
    vanilla, *others = results.all
    kept, fewer = MIN_RELATIVE_ACCURACY, MIN_EXPERT_REDUCTION
    names = [
        result.name
        for result in others
        if result.accuracy >= kept * vanilla.accuracy
        and result.experts <= (1 - fewer) * vanilla.experts
    ]
    votes = [result for result in others if result.policy in MAIN_VOTES]
    return [
        text.sentence("vanilla", vanilla=vanilla, n=vanilla.accuracy_share().n),
        *(task_sentence(text, result, vanilla) for result in votes),
        text.sentence("accurate", kept=kept, fewer=fewer, names=", ".join(names) or "none"),
    ]


def task_sentence(text: ExperimentText, result: VariantResult, vanilla: VariantResult) -> str:
    """The tasks on which a policy loses most and least."""
    changes = [
        (result.accuracy_share(task).value - vanilla.accuracy_share(task).value, task)
        for task in vanilla.right
    ]
    worst, best = (choose(changes, key=lambda change: change[0]) for choose in (min, max))
    relative = result.relative_accuracy(vanilla)
    return text.sentence("tasks", result=result, relative=relative, worst=worst, best=best)


def accuracy_tables(text: ExperimentText, results: VariantResults) -> list[Table]:
    """The tables of Table 1: accuracy by task, paired differences, experts and bytes."""

    def cell(result: VariantResult, task: str | None = None) -> str:
        share = result.accuracy_share(task)
        low, high = share.interval
        return f"{100 * share.value:.1f} ({100 * low:.0f} to {100 * high:.0f})"

    rows, tasks = variant_rows(results), results.vanilla.right
    columns = {task: lambda result, task=task: cell(result, task) for task in tasks}
    n = len(next(iter(tasks.values())))
    return [
        text.table("accuracy", results.all, {"all": cell, **columns}, n=n),
        text.table("paired", rows[1:]),
        text.table("traffic", rows),
    ]


ACCURACY = replace(PolicyComparison.load("accuracy"), findings_after=accuracy_findings)
CORESET_SIZE = replace(PolicyComparison.load("coreset-size"), findings_after=size_findings)
TABLE_ONE = replace(
    PolicyComparison.load("table-1"),
    draw=None,
    make_tables=accuracy_tables,
    findings_after=table_findings,
)
BEYOND = replace(
    PolicyComparison.load("beyond"), findings_after=lambda text, _: [text.sentence("samples")]
)
