"""Table 1 of the paper: every policy on every task, with intervals, p values and experts used."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.lab.evals.run import Variant
from coterie.lab.study.accuracy import MIN_EXPERT_REDUCTION, MIN_RELATIVE_ACCURACY
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    decimal_bytes,
    format_p,
    make_table,
)
from coterie.lab.study.results import VariantResult, VariantResults, VariantsRecord
from coterie.lab.study.variants import GUARD_OPTIONS, run_comparison


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


class TableOneExperiment(Experiment):
    """The runs are shared with the other experiments; this one tabulates them."""

    text = ExperimentText.load("table-1")

    def measure(self, context: StudyContext) -> VariantsRecord:
        return run_comparison(context, {"all": table_variants(context.engine.model.spec.router.k)})

    def drawings(self, record: VariantsRecord) -> Sequence[Drawing]:
        del record
        return []

    def tables(self, record: VariantsRecord) -> Sequence[Table]:
        results = VariantResults.from_record(record).all
        return [_accuracy_table(results), _paired_table(results), _traffic_table(results)]

    def findings(self, record: VariantsRecord) -> Sequence[Finding | str]:
        results = VariantResults.from_record(record)
        vanilla, group = results.vanilla, results.groups["all"]
        n, (low, high) = vanilla.accuracy_share().n, vanilla.interval
        accurate = [
            result.name
            for result in group
            if result.accuracy >= MIN_RELATIVE_ACCURACY * vanilla.accuracy
            and result.experts <= (1 - MIN_EXPERT_REDUCTION) * vanilla.experts
        ]
        return [
            f"Vanilla's accuracy is {vanilla.accuracy:.1%} on {n} problems ({low:.1%} to "
            f"{high:.1%}). The paper reports relative accuracy alone; the table has both.",
            *(_best_and_worst_task(result, vanilla) for result in group[4:7]),
            f"Policies with at least {MIN_RELATIVE_ACCURACY:.0%} of vanilla's accuracy and "
            f"{MIN_EXPERT_REDUCTION:.0%} fewer experts: {', '.join(accurate) or 'none'}.",
        ]


def _accuracy_table(results: Sequence[VariantResult]) -> Table:
    def cell(result: VariantResult, task: str | None = None) -> str:
        share = result.accuracy_share(task)
        low, high = share.interval
        return f"{100 * share.value:.1f} ({100 * low:.0f} to {100 * high:.0f})"

    n = len(next(iter(results[0].right.values())))
    return make_table(
        f"Accuracy in percent with 95 % Wilson intervals; {n} problems of each task.",
        results,
        {
            "policy": "{0.name}",
            "all": cell,
            **{task: lambda result, task=task: cell(result, task) for task in results[0].right},
        },
    )


def _paired_table(results: Sequence[VariantResult]) -> Table:
    vanilla = results[0]
    return make_table(
        "Paired comparison on the same problems: bootstrap interval, McNemar's exact p.",
        [(result, result.compare_to(vanilla)) for result in results[1:]],
        {
            "policy": "{0[0].name}",
            "against vanilla": "{0[1].difference:+.1%}",
            "95 %": "{0[1].interval[0]:+.1%} to {0[1].interval[1]:+.1%}",
            "gained, lost": "{0[1].gained}, {0[1].lost}",
            "p": lambda row: format_p(row[1].p_value, bare=True),
            "relative accuracy": lambda row: row[0].relative_accuracy(vanilla),
        },
    )


def _traffic_table(results: Sequence[VariantResult]) -> Table:
    return make_table(
        "Unique experts and their bytes per layer and forward, denoising forwards per block, and "
        "experts per block, the product. Speed has a section of its own.",
        results,
        {
            "policy": "{0.name}",
            "experts": "{0.experts:.1f}",
            "bytes": lambda result: decimal_bytes(result.expert_bytes),
            "votes kept": "{0.vote_mass_kept:.3f}",
            "forwards": "{0.forwards_per_block:.2f}",
            "experts per block": "{0.experts_per_block:.0f}",
        },
    )


def _best_and_worst_task(result: VariantResult, vanilla: VariantResult) -> str:
    """The tasks on which a policy loses most and least."""
    changes = {
        task: result.accuracy_share(task).value - vanilla.accuracy_share(task).value
        for task in vanilla.right
    }
    worst, best = min(changes, key=lambda t: changes[t]), max(changes, key=lambda t: changes[t])
    return (
        f"{result.name} keeps {result.relative_accuracy(vanilla)} of vanilla's accuracy. It loses "
        f"most on {worst} ({changes[worst]:+.1%}) and least on {best} ({changes[best]:+.1%})."
    )
