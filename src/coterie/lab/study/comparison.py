"""An experiment that compares groups of policies by accuracy and unique experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from matplotlib.figure import Figure

from coterie.lab.plotting import (
    FIGURE_HEIGHT,
    add_legend,
    foreground,
    format_percent,
    new_axes,
    policy_style,
)
from coterie.lab.study.charts import Series, draw_series, indexed_style, pareto_front
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    format_p,
    make_table,
)
from coterie.lab.study.results import VariantResult, VariantResults, VariantsRecord
from coterie.lab.study.variants import NO_RIVALS, RivalVariants, VariantGroups, run_comparison

ColorBy = Literal["family", "place"]  # a line's style: its policy family's, or by its position


@dataclass(frozen=True)
class PolicyComparison(Experiment):
    """Accuracy against experts for groups of policies.

    ``groups`` and ``rivals`` depend on K, the experts of a token.
    """

    text: ExperimentText
    groups: Callable[[int], VariantGroups]
    make_findings: Callable[[VariantResults], Sequence[Finding | str]]
    rivals: Callable[[int], RivalVariants] = lambda _: NO_RIVALS
    color_by: ColorBy = "family"
    show_pareto: bool = False
    figures: Mapping[str, Sequence[str]] = field(default_factory=dict)  # figure -> its groups
    make_tables: Callable[[VariantResults], Sequence[Table]] = lambda _: ()

    def measure(self, context: StudyContext) -> VariantsRecord:
        k = context.engine.model.spec.router.k
        return run_comparison(context, self.groups(k), matched=self.rivals(k))

    def drawings(self, record: VariantsRecord) -> Sequence[Drawing]:
        results = self._results(record)

        def make_drawing(name: str, labels: Sequence[str]) -> Drawing:
            def draw() -> Figure:
                return draw_comparison(results, labels, self.color_by, pareto=self.show_pareto)

            return Drawing(name, self.text.caption("figure"), draw)

        views = self.figures or {self.name: ()}
        return [make_drawing(name, labels) for name, labels in views.items()]

    def tables(self, record: VariantsRecord) -> Sequence[Table]:
        results = self._results(record)
        n = len(results.vanilla.correct_flags())
        caption = f"Every policy on the same {n} problems. Forwards are per block."
        return [variant_table(results, caption), *self.make_tables(results)]

    def findings(self, record: VariantsRecord) -> Sequence[Finding | str]:
        return self.make_findings(self._results(record))

    def _results(self, record: VariantsRecord) -> VariantResults:
        return VariantResults.from_record(record, list(self.groups(record["k"])))


def draw_comparison(
    results: VariantResults,
    labels: Sequence[str] = (),
    color_by: ColorBy = "family",
    *,
    pareto: bool = False,
) -> Figure:
    """One line per group with Wilson intervals; vanilla is a star and a dotted line.

    ``pareto`` adds the Pareto front over all groups.
    """
    shown = {label: results.groups[label] for label in labels or results.groups}
    x_label, height = unique_experts_label(results), FIGURE_HEIGHT + 0.15 * len(shown)
    figure, ax = new_axes(x_label, "accuracy", height=height)
    for index, (label, group) in enumerate(shown.items()):
        by_family = color_by == "family"
        style = policy_style(group[-1].policy) if by_family else indexed_style(index)
        ordered = sorted(group, key=lambda result: result.experts)
        xs, ys = [r.experts for r in ordered], [r.accuracy for r in ordered]
        draw_series(ax, Series(label, xs, ys, style, intervals=[r.interval for r in ordered]))
    vanilla = results.vanilla
    ax.axhline(vanilla.accuracy, color=foreground(), lw=0.7, ls=(0, (1, 3)))
    draw_series(ax, vanilla_series(vanilla, vanilla.accuracy))
    if pareto:
        front = pareto_front(results.all, lambda r: (r.experts, r.accuracy))
        xs, ys = [r.experts for r in front], [r.accuracy for r in front]
        style = {"color": foreground(), "lw": 0.9, "ls": (0, (1, 2))}
        ax.step(xs, ys, where="post", label="Pareto front", **style)
    ax.set(ylim=(-0.02, 1.03), xlim=(0, None))
    format_percent(ax)
    add_legend(ax, columns=3 if color_by == "family" and len(shown) > 4 else 2)
    return figure


def vanilla_series(vanilla: VariantResult, y: float) -> Series:
    return Series("vanilla", [vanilla.experts], [y], policy_style("vanilla"), line="", size=11)


def unique_experts_label(results: VariantResults) -> str:
    return f"unique experts of {results.experts}, per layer and forward"


def variant_table(results: VariantResults, caption: str) -> Table:
    """One policy per row: accuracy, the paired change against vanilla, experts and forwards."""
    vanilla = results.vanilla
    changes = {result.name: result.compare_to(vanilla) for result in results.all}

    def unless_vanilla(text: Callable[[VariantResult], str]) -> Callable[[VariantResult], str]:
        return lambda result: "" if result.name == vanilla.name else text(result)

    return make_table(
        caption,
        list({result.name: result for result in results.all}.values()),
        {
            "policy": "{0.name}",
            "accuracy, 95 %": "{0.accuracy:.1%}, {0.interval[0]:.1%} to {0.interval[1]:.1%}",
            "against vanilla": unless_vanilla(lambda r: f"{changes[r.name].difference:+.1%}"),
            "p": unless_vanilla(lambda r: format_p(changes[r.name].p_value, bare=True)),
            "relative": lambda result: result.relative_accuracy(vanilla),
            "experts": "{0.experts:.1f}",
            "forwards": "{0.forwards_per_block:.2f}",
        },
    )
