"""An experiment that compares groups of policies by accuracy and unique experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from matplotlib.figure import Figure

from coterie.lab.plotting import FIGURE_HEIGHT, indexed_style, policy_style
from coterie.lab.study.charts import Series, guide_series, line_chart, pareto_front
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    decimal_bytes,
    format_p,
)
from coterie.lab.study.results import JsonObject, VariantResult, VariantResults
from coterie.lab.study.variants import NO_RIVALS, RivalVariants, VariantGroups, run_comparison

TEXT = ExperimentText.load("comparison")
Chart = Callable[[VariantResults], Figure]
FindingsMaker = Callable[[ExperimentText, VariantResults], Sequence[Finding | str]]


@dataclass(frozen=True)
class PolicyComparison(Experiment):
    """Accuracy, experts and forwards of groups of policies.

    ``groups`` and ``rivals`` depend on K, the experts of a token. The charts, tables and findings
    are made from the results; the charts are named as their files.
    """

    text: ExperimentText
    groups: Callable[[int], VariantGroups]
    make_findings: FindingsMaker
    rivals: Callable[[int], RivalVariants] = lambda _: NO_RIVALS
    charts: Mapping[str, Chart] = field(default_factory=dict)
    make_tables: Callable[[ExperimentText, VariantResults], Sequence[Table]] = lambda _, results: [
        variant_table(results)
    ]

    def measure(self, context: StudyContext) -> JsonObject:
        k = context.engine.model.spec.router.k
        return run_comparison(context, self.groups(k), rivals=self.rivals(k)).to_record()

    def drawings(self, record: JsonObject) -> Sequence[Drawing]:
        results = self._results(record)
        return [
            Drawing(name, self.text.caption("figure"), partial(chart, results))
            for name, chart in self.charts.items()
        ]

    def tables(self, record: JsonObject) -> Sequence[Table]:
        return self.make_tables(self.text, self._results(record))

    def findings(self, record: JsonObject) -> Sequence[Finding | str]:
        return self.make_findings(self.text, self._results(record))

    def _results(self, record: Mapping) -> VariantResults:
        return VariantResults.from_record(record, list(self.groups(record["k"])))


def draw_comparison(
    results: VariantResults,
    labels: Sequence[str] = (),
    *,
    by_family: bool = True,
    pareto: bool = False,
) -> Figure:
    """One line per group with Wilson intervals; vanilla is a star and a dotted line.

    Lines are styled by the family of their policies, or by their position. ``pareto`` adds the
    Pareto front over all groups.
    """
    groups = {label: results.groups[label] for label in labels or results.groups}
    series = [
        group_series(label, group, None if by_family else index)
        for index, (label, group) in enumerate(groups.items())
    ]
    series.append(vanilla_series(results.vanilla, results.vanilla.accuracy))
    if pareto:
        front = pareto_front([(r.experts, r.accuracy) for r in results.all], lambda point: point)
        xs, ys = zip(*front, strict=True)
        series.append(guide_series(xs, ys, "Pareto front", line=(0, (1, 2)), width=0.9, steps=True))
    return line_chart(
        series,
        unique_experts_label(results),
        "accuracy",
        xlim=(0, None),
        ylim=(-0.02, 1.03),
        percent="y",
        level=results.vanilla.accuracy,
        columns=3 if by_family and len(groups) > 4 else 2,
        height=FIGURE_HEIGHT + 0.15 * len(groups),
    )


draw_by_position = partial(draw_comparison, by_family=False)


def group_series(label: str, group: Sequence[VariantResult], index: int | None = None) -> Series:
    """Accuracy against experts, in the style of the policies' family or of a position."""
    style = policy_style(group[-1].policy) if index is None else indexed_style(index)
    ordered = sorted(group, key=lambda result: result.experts)
    xs, ys = [r.experts for r in ordered], [r.accuracy for r in ordered]
    return Series(label, xs, ys, style, intervals=[r.interval for r in ordered])


def vanilla_series(vanilla: VariantResult, y: float) -> Series:
    return Series("vanilla", [vanilla.experts], [y], policy_style("vanilla"), line="", size=11)


def unique_experts_label(results: VariantResults) -> str:
    return f"unique experts of {results.experts}, per layer and forward"


def variant_table(results: VariantResults, caption: str | None = None) -> Table:
    """One policy per row: accuracy, the paired change against vanilla, experts and forwards."""
    n = results.vanilla.accuracy_share().n
    caption = caption or TEXT.caption("table", n=n)
    return TEXT.table("variants", variant_rows(results), caption=caption)


def variant_rows(results: VariantResults) -> list[dict[str, object]]:
    """One row per policy, vanilla first: the result ``r``, and values against vanilla."""
    vanilla, rows = results.vanilla, []
    for result in results.all:
        change = result.compare_to(vanilla)
        is_other = result is not vanilla
        rows.append(
            {
                "r": result,
                "change": change,
                "difference": f"{change.difference:+.1%}" if is_other else "",
                "p": format_p(change.p_value, bare=True) if is_other else "",
                "relative": result.relative_accuracy(vanilla),
                "bytes": decimal_bytes(result.expert_bytes),
                "share": result.experts_per_block / vanilla.experts_per_block,
            }
        )
    return rows
