"""Two arms on the same items, and what many such comparisons say together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coterie.lab.evals.stats import PairedDifference, holm_adjust
from coterie.lab.study.experiment import Finding, Table, Verdict
from coterie.lab.study.results import VariantResult

SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class PairedComparison:
    """``second`` minus ``first``; ``p`` is raised for the comparisons made beside it (Holm)."""

    first: VariantResult
    second: VariantResult
    change: PairedDifference
    p: float

    @property
    def sign(self) -> int:
        """+1 where the second is above beyond the interval and the test, -1 below, else 0."""
        low, high = self.change.interval
        if self.p >= SIGNIFICANCE_LEVEL or low <= 0 <= high:
            return 0
        return 1 if self.change.difference > 0 else -1


def compare_pairs(pairs: Iterable[tuple[VariantResult, VariantResult]]) -> list[PairedComparison]:
    """Every pair, tested together."""
    changes = [(first, second, second.compare_to(first)) for first, second in pairs]
    adjusted = holm_adjust([change.p_value for *_, change in changes])
    return [
        PairedComparison(a, b, change, p)
        for (a, b, change), p in zip(changes, adjusted, strict=True)
    ]


def verdict_on(comparisons: Sequence[PairedComparison]) -> Verdict:
    """On "the second is above": it must be so somewhere, and nowhere the other way round."""
    signs = {comparison.sign for comparison in comparisons}
    if -1 in signs:
        return "does not hold"
    return "holds" if 1 in signs else "cannot be told here"


def claim_finding(
    claim: str,
    comparisons: Sequence[PairedComparison],
    *,
    second: str,
    first: str,
    condition: str = "at equal experts",
) -> Finding:
    """One sentence over all duels: how many were won, and the widest of each kind."""
    if not comparisons:
        text = f"{second} was not met with {first} {condition} on this model."
        return Finding(text, claim, "cannot be told here")
    wins, losses = ([d for d in comparisons if d.sign == sign] for sign in (1, -1))
    ties = len(comparisons) - len(wins) - len(losses)
    text = (
        f"Of {len(comparisons)} comparisons {condition}, {second} is above {first} in {len(wins)}, "
        f"below in {len(losses)}, and not to be told apart in {ties}."
    )
    largest = [
        max(group, key=lambda d: abs(d.change.difference)) for group in (wins, losses) if group
    ]
    return Finding(
        " ".join([text, *map(comparison_sentence, largest)]), claim, verdict_on(comparisons)
    )


def comparison_sentence(comparison: PairedComparison) -> str:
    """One duel in words."""
    low, high = comparison.change.interval
    first, second = comparison.first, comparison.second
    return (
        f"{second.name} answers {second.accuracy:.1%} right with {second.experts:.1f} experts, "
        f"{first.name} {first.accuracy:.1%} with {first.experts:.1f}: "
        f"{comparison.change.difference:+.1%} ({low:+.1%} to {high:+.1%}, {format_p(comparison.p)})."
    )


def comparison_table(comparisons: Sequence[PairedComparison], caption: str) -> Table:
    """One duel a row."""
    heads = ("this", "right", "experts", "against", "right", "experts", "difference, 95 %", "p")
    rows = []
    for comparison in comparisons:
        low, high = comparison.change.interval
        sides = [
            text
            for result in (comparison.second, comparison.first)
            for text in (result.name, f"{result.accuracy:.1%}", f"{result.experts:.1f}")
        ]
        change = f"{comparison.change.difference:+.1%}, {low:+.1%} to {high:+.1%}"
        rows.append([*sides, change, format_p(comparison.p, bare=True)])
    n = len(comparisons[0].first.correct_flags()) if comparisons else 0
    return Table(
        heads,
        rows,
        f"{caption} The same {n} items; p is McNemar's, exact, raised for the {len(comparisons)} "
        "comparisons of the table (Holm).",
        numbers=(1, 2, 4, 5, 6, 7),
    )


def format_p(p: float, *, bare: bool = False) -> str:
    """For people: nobody reads beyond a thousandth."""
    if p < 0.001:
        return "< 0.001" if bare else "p < 0.001"
    return f"{p:.3f}" if bare else f"p {p:.3f}"
