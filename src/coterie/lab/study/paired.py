"""Paired comparisons of policies on the same items, and the conclusions from many of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coterie.lab.evals.stats import PairedDifference, holm_adjust
from coterie.lab.study.experiment import ExperimentText, Finding, Table, format_p, judge
from coterie.lab.study.results import Pair, VariantResult

SIGNIFICANCE_LEVEL = 0.05
TEXT = ExperimentText.load("paired")


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

    @property
    def sentence(self) -> str:
        """Both accuracies and the difference."""
        return TEXT.sentence("comparison", c=self, p=format_p(self.p))


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


def claim_finding(claim: str, pairs: Iterable[Pair], **names: str) -> Finding:
    """The finding on "``second`` is better": counts of wins and losses, and the largest of each.

    ``names`` are ``second``, ``first`` and the ``condition``: "at equal experts".
    """
    comparisons = compare_pairs(pairs)
    if not comparisons:
        return judge(TEXT.sentence("none", **names), claim, None)
    wins, losses = ([c for c in comparisons if c.sign == sign] for sign in (1, -1))
    n, ties = len(comparisons), len(comparisons) - len(wins) - len(losses)
    counts = TEXT.sentence("claim", n=n, wins=len(wins), losses=len(losses), ties=ties, **names)
    largest = [max(group, key=lambda c: c.size).sentence for group in (wins, losses) if group]
    return judge(" ".join([counts, *largest]), claim, is_better(comparisons))


def count_sentence(pairs: Iterable[Pair], unit: str, label: str = "", **names: str) -> str:
    """Counts of wins and losses, and the largest difference; ``names`` as in ``claim_finding``."""
    comparisons = compare_pairs(pairs)
    if not comparisons:
        return TEXT.sentence("none", **names)
    signs, second = [comparison.sign for comparison in comparisons], names["second"]
    return TEXT.sentence(
        "counts",
        label=label or f"{second[:1].upper()}{second[1:]} against {names['first']}",
        n=len(signs),
        wins=signs.count(1),
        losses=signs.count(-1),
        unit=unit,
        largest=max(comparisons, key=lambda c: c.size),
    )


def comparison_table(pairs: Sequence[Pair], caption: str) -> Table:
    """One comparison per row."""
    comparisons, items = compare_pairs(pairs), len(pairs[0][0].correct_flags())
    p_column = {"p": lambda c: format_p(c.p, bare=True)}
    return TEXT.table(
        "comparisons", comparisons, p_column, caption=caption, items=items, n=len(comparisons)
    )
