"""Table 1 of the paper: every policy on every task, with intervals, p values and experts used."""

from __future__ import annotations

from coterie.lab.evals.run import Variant
from coterie.lab.study.accuracy import MIN_EXPERT_REDUCTION, MIN_RELATIVE_ACCURACY
from coterie.lab.study.comparison import PolicyComparison, variant_rows
from coterie.lab.study.experiment import ExperimentText, Finding, Table
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.variants import GUARD_OPTIONS


def table_variants(k: int) -> list[Variant]:
    """One or two sizes of each policy."""
    return [
        Variant(policy)
        for policy in (
            *(f"topk:k={max(1, k // 2)}", "naee:beta=0.4", "mc-moe:beta=0.4,protect=0.02"),
            *(f"des-seq:k={min(3, k)}", "des-vote:beta=0.5", "des-vote:beta=0.3"),
            *("des-vote:beta=0.15", "uniform-vote:beta=0.3", "xshare:beta=0.3"),
            *("mass-vote:tau=0.7", "random:beta=0.3"),
            *(f"des-vote:beta={beta},{GUARD_OPTIONS}" for beta in (0.3, 0.15)),
        )
    ]


def table_findings(text: ExperimentText, results: VariantResults) -> list[Finding | str]:
    vanilla, (_, *others) = results.vanilla, results.all
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


def table_tables(text: ExperimentText, results: VariantResults) -> list[Table]:
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


MAIN_VOTES = ("des-vote:beta=0.5", "des-vote:beta=0.3", "des-vote:beta=0.15")
TABLE_ONE = PolicyComparison(  # its runs are shared with the other experiments
    text=ExperimentText.load("table-1"),
    groups=lambda k: {"all": table_variants(k)},
    make_findings=table_findings,
    make_tables=table_tables,
)
