"""Paired comparisons of policies on the same items, and the conclusions from many of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coterie.lab.evals.stats import PairedDifference, holm_adjust
from coterie.lab.study.experiment import Finding, Table, format_p, judge, make_table
from coterie.lab.study.results import Pair, VariantResult

SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class PairedComparison:
    """``second`` minus ``first``. ``p`` is adjusted for the comparisons of the same list (Holm)."""

    first: VariantResult
    second: VariantResult
    change: PairedDifference
    p: float

    @property
    def sign(self) -> int:
        """+1 or -1 where both the interval and the test exclude zero, else 0."""
        low, high = self.change.interval
        if self.p >= SIGNIFICANCE_LEVEL or low <= 0 <= high:
            return 0
        return 1 if self.change.difference > 0 else -1

    @property
    def size(self) -> float:
        return abs(self.change.difference)


def compare_pairs(pairs: Iterable[Pair]) -> list[PairedComparison]:
    """The comparison of every pair, tested together."""
    changes = [(first, second, second.compare_to(first)) for first, second in pairs]
    adjusted = holm_adjust([change.p_value for *_, change in changes])
    return [
        PairedComparison(first, second, change, p)
        for (first, second, change), p in zip(changes, adjusted, strict=True)
    ]


def is_better(comparisons: Sequence[PairedComparison]) -> bool | None:
    """Whether ``second`` is better: at least once, and never worse; None if never different."""
    signs = {comparison.sign for comparison in comparisons}
    return False if -1 in signs else True if 1 in signs else None


def claim_finding(
    claim: str,
    comparisons: Sequence[PairedComparison],
    *,
    second: str,
    first: str,
    condition: str = "at equal experts",
) -> Finding:
    """The finding on "``second`` is better": counts of wins and losses, and the largest of each."""
    if not comparisons:
        text = f"No comparison of {second} with {first} {condition} was possible on this model."
        return judge(text, claim, None)
    wins, losses = ([c for c in comparisons if c.sign == sign] for sign in (1, -1))
    ties = len(comparisons) - len(wins) - len(losses)
    text = (
        f"In {len(comparisons)} comparisons {condition}, {second} is better than {first} in "
        f"{len(wins)}, worse in {len(losses)} and not significantly different in {ties}."
    )
    largest = [max(group, key=lambda c: c.size) for group in (wins, losses) if group]
    sentences = " ".join([text, *map(comparison_sentence, largest)])
    return judge(sentences, claim, is_better(comparisons))


def comparison_sentence(comparison: PairedComparison) -> str:
    low, high = comparison.change.interval
    first, second = comparison.first, comparison.second
    return (
        f"{second.name} has an accuracy of {second.accuracy:.1%} with {second.experts:.1f} "
        f"experts, {first.name} {first.accuracy:.1%} with {first.experts:.1f}: "
        f"{comparison.change.difference:+.1%} ({low:+.1%} to {high:+.1%}, "
        f"{format_p(comparison.p)})."
    )


def count_sentence(label: str, comparisons: Sequence[PairedComparison], unit: str) -> str:
    """Counts of wins and losses, and the largest difference."""
    signs = [comparison.sign for comparison in comparisons]
    largest = max(comparisons, key=lambda c: c.size)
    return (
        f"{label}: better in {signs.count(1)} of {len(signs)} {unit}, worse in "
        f"{signs.count(-1)}. {comparison_sentence(largest)}"
    )


def comparison_table(comparisons: Sequence[PairedComparison], caption: str) -> Table:
    """One comparison per row."""
    n = len(comparisons[0].first.correct_flags()) if comparisons else 0
    table = make_table(
        f"{caption} The same {n} items; p is from McNemar's exact test, adjusted for the "
        f"{len(comparisons)} comparisons of the table (Holm).",
        comparisons,
        {
            "policy": "{0.second.name}",
            "accuracy": "{0.second.accuracy:.1%}",
            "experts": "{0.second.experts:.1f}",
            "compared with": "{0.first.name}",
            "its accuracy": "{0.first.accuracy:.1%}",
            "its experts": "{0.first.experts:.1f}",
            "difference, 95 %": "{0.change.difference:+.1%}, {0.change.interval[0]:+.1%} to "
            "{0.change.interval[1]:+.1%}",
            "p": lambda c: format_p(c.p, bare=True),
        },
    )
    return Table(table.heads, table.rows, table.caption, (1, 2, 4, 5, 6, 7))
