"""A chapter that is a comparison of arms: which ones, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from coterie.study.arms import NOTHING, Groups, Matched, compare
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.curves import Looks, arm_table, draw
from coterie.study.lab import Lab
from coterie.study.tally import Arms


@dataclass(frozen=True)
class Comparison:
    """Accuracy against experts for groups of arms; ``groups`` and ``matched`` depend on the
    experts of a token, K."""

    name: str
    title: str
    question: str
    caption: str
    groups: Callable[[int], Groups]
    found: Callable[[Arms], Sequence[Finding | str]]
    matched: Callable[[int], Matched] = lambda _: NOTHING
    looks: Looks = "family"
    front: bool = False
    views: Mapping[str, Sequence[str]] = field(default_factory=dict)  # figure -> its groups
    tabulate: Callable[[Arms], Sequence[Table]] = lambda _: ()

    def measure(self, lab: Lab) -> Facts:
        k = lab.engine.model.spec.router.k
        return compare(lab, self.groups(k), matched=self.matched(k))

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        arms = Arms.of(facts)

        def drawing(name: str, labels: Sequence[str]) -> Drawing:
            """``labels``: the groups of one figure; none: all."""
            return Drawing(
                name,
                self.caption,
                lambda: draw(arms, labels=labels, front=self.front, looks=self.looks),
            )

        views = self.views or {self.name: ()}
        return [drawing(name, labels) for name, labels in views.items()]

    def tables(self, facts: Facts) -> Sequence[Table]:
        arms = Arms.of(facts)
        n = len(arms.vanilla.bits())
        caption = f"Each policy on the same {n} questions; forwards are per block."
        return [arm_table(arms.groups, arms.vanilla, caption), *self.tabulate(arms)]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        return self.found(Arms.of(facts))
