"""A chapter that is a comparison of arms: which ones, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from coterie.lab.study.context import StudyContext
from coterie.lab.study.curves import ColorBy, draw_comparison, variant_table
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.results import VariantResults
from coterie.lab.study.variants import NO_RIVALS, RivalVariants, VariantGroups, run_comparison


@dataclass(frozen=True)
class PolicyComparison:
    """Accuracy against experts for groups of arms; ``groups`` and ``matched`` depend on the
    experts of a token, K."""

    name: str
    title: str
    question: str
    caption: str
    groups: Callable[[int], VariantGroups]
    make_findings: Callable[[VariantResults], Sequence[Finding | str]]
    rivals: Callable[[int], RivalVariants] = lambda _: NO_RIVALS
    color_by: ColorBy = "family"
    show_pareto: bool = False
    figures: Mapping[str, Sequence[str]] = field(default_factory=dict)  # figure -> its groups
    make_tables: Callable[[VariantResults], Sequence[Table]] = lambda _: ()

    def measure(self, context: StudyContext) -> ExperimentData:
        k = context.engine.model.spec.router.k
        return run_comparison(context, self.groups(k), matched=self.rivals(k))

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        results = VariantResults.from_data(data)

        def make_drawing(name: str, labels: Sequence[str]) -> Drawing:
            """``labels``: the groups of one figure; none: all."""
            return Drawing(
                name,
                self.caption,
                lambda: draw_comparison(
                    results, labels=labels, front=self.show_pareto, looks=self.color_by
                ),
            )

        views = self.figures or {self.name: ()}
        return [make_drawing(name, labels) for name, labels in views.items()]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        results = VariantResults.from_data(data)
        n = len(results.vanilla.correct_flags())
        caption = f"Each policy on the same {n} questions; forwards are per block."
        return [variant_table(results.groups, results.vanilla, caption), *self.make_tables(results)]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        return self.make_findings(VariantResults.from_data(data))
