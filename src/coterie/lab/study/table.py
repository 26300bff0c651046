"""Table 1: every policy on every task, with what the paper's table leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.lab.evals.run import Variant
from coterie.lab.study.accuracy import MIN_EXPERT_REDUCTION, MIN_RELATIVE_ACCURACY
from coterie.lab.study.context import StudyContext
from coterie.lab.study.curves import format_relative
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.paired import format_p
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.variants import GUARD_OPTIONS, run_comparison

UNITS = ("B", "KB", "MB", "GB")


def table_variants(k: int) -> list[Variant]:
    """One or two sizes of each rule."""
    return [
        Variant(f"topk:k={max(1, k // 2)}"),
        Variant("naee:beta=0.4"),
        Variant("mc-moe:beta=0.4,protect=0.02"),
        Variant(f"des-seq:k={min(3, k)}"),
        Variant("des-vote:beta=0.5"),
        Variant("des-vote:beta=0.3"),
        Variant("des-vote:beta=0.15"),
        Variant("uniform-vote:beta=0.3"),
        Variant("xshare:beta=0.3"),
        Variant("mass-vote:tau=0.7"),
        Variant("random:beta=0.3"),
        Variant(f"des-vote:beta=0.3,{GUARD_OPTIONS}"),
        Variant(f"des-vote:beta=0.15,{GUARD_OPTIONS}"),
    ]


@dataclass(frozen=True)
class TableOneExperiment:
    """The runs are those of the other chapters; this one sets them side by side."""

    name: str = "table-1"
    title: str = "Every policy on every task (Table 1)"
    question: str = "What does each rule keep of every kind of question, and what is read for it?"

    def measure(self, context: StudyContext) -> ExperimentData:
        return run_comparison(context, {"all": table_variants(context.engine.model.spec.router.k)})

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        del data
        return []

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        results = VariantResults.from_data(data)
        variant_results = [results.vanilla, *results.groups["all"]]
        return [
            _accuracy_table(variant_results),
            _paired_table(variant_results),
            _traffic_table(variant_results),
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        results = VariantResults.from_data(data)
        vanilla = results.vanilla
        n, (low, high) = vanilla.accuracy_share().n, vanilla.accuracy_share().interval
        hardest = [_best_and_worst_task(result, vanilla) for result in results.groups["all"][4:7]]
        accurate = [
            result.name
            for result in results.groups["all"]
            if result.accuracy >= MIN_RELATIVE_ACCURACY * vanilla.accuracy
            and result.experts <= (1 - MIN_EXPERT_REDUCTION) * vanilla.experts
        ]
        return [
            f"Vanilla answers {vanilla.accuracy:.1%} of {n} right ({low:.1%} to {high:.1%}). "
            "Relative accuracy, which the paper reports alone, stands beside the counts here.",
            *hardest,
            f"With at least {MIN_RELATIVE_ACCURACY:.0%} of vanilla's accuracy and {MIN_EXPERT_REDUCTION:.0%} fewer experts: "
            f"{', '.join(accurate) or 'nobody in this table'}.",
        ]


def _accuracy_table(variant_results: Sequence[VariantResult]) -> Table:
    tasks = list(variant_results[0].right)
    rows = [
        [result.name, _format_accuracy(result), *(_format_accuracy(result, task) for task in tasks)]
        for result in variant_results
    ]
    n = len(variant_results[0].correct_flags(tasks[0]))
    return Table(
        ["policy", "all", *tasks],
        rows,
        f"Right answers with their 95 % Wilson intervals, in percent; {n} questions of each task.",
        numbers=range(1, len(tasks) + 2),
    )


def _format_accuracy(result: VariantResult, task: str | None = None) -> str:
    share = result.accuracy_share(task)
    low, high = share.interval
    return f"{100 * share.value:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _paired_table(variant_results: Sequence[VariantResult]) -> Table:
    vanilla, rows = variant_results[0], []
    for result in variant_results[1:]:
        change = result.compare_to(vanilla)
        low, high = change.interval
        rows.append(
            [
                result.name,
                f"{change.difference:+.1%}",
                f"{low:+.1%} to {high:+.1%}",
                f"{change.gained}, {change.lost}",
                format_p(change.p_value, bare=True),
                format_relative(result, vanilla),
            ]
        )
    return Table(
        ["policy", "against vanilla", "95 %", "gained, lost", "p", "relative accuracy"],
        rows,
        "The same questions, pair by pair: bootstrap interval, McNemar's exact p.",
        numbers=range(1, 6),
    )


def _traffic_table(variant_results: Sequence[VariantResult]) -> Table:
    rows = [
        [
            result.name,
            f"{result.experts:.1f}",
            format_bytes(result.expert_bytes),
            f"{result.vote_mass_kept:.3f}",
            f"{result.forwards_per_block:.2f}",
            f"{result.experts * result.forwards_per_block:.0f}",
        ]
        for result in variant_results
    ]
    heads = ["policy", "experts", "bytes", "votes kept", "forwards", "experts a block"]
    return Table(
        heads,
        rows,
        "Unique experts and their bytes for each layer and forward; denoising forwards for each "
        "block, and the product of the two. Speed has a chapter of its own, where policies take "
        "turns.",
        numbers=range(1, len(heads)),
    )


def _best_and_worst_task(result: VariantResult, vanilla: VariantResult) -> str:
    """On which tasks a policy loses most and least."""
    change_by_task = {
        t: result.accuracy_share(t).value - vanilla.accuracy_share(t).value for t in vanilla.right
    }
    worst, best = (
        min(change_by_task, key=lambda t: change_by_task[t]),
        max(change_by_task, key=lambda t: change_by_task[t]),
    )
    return (
        f"{result.name} keeps {format_relative(result, vanilla)} of vanilla's accuracy: its "
        f"answers suffer most on {worst} ({change_by_task[worst]:+.1%}), least on {best} "
        f"({change_by_task[best]:+.1%})."
    )


def format_bytes(size: float) -> str:
    """Bytes with a decimal unit: 393216 -> "393 KB"."""
    unit = 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.{0 if size >= 100 else 1}f} {UNITS[unit]}"
