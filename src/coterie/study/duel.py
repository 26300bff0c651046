"""Two arms on the same items, and what many such comparisons say together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coterie.evals.stats import Paired, holm
from coterie.study.chapter import Finding, Table, Verdict
from coterie.study.tally import Tally

LEVEL = 0.05


@dataclass(frozen=True)
class Duel:
    """``second`` minus ``first``; ``p`` is raised for the comparisons made beside it (Holm)."""

    first: Tally
    second: Tally
    change: Paired
    p: float

    @property
    def sign(self) -> int:
        """+1 where the second is above beyond the interval and the test, -1 below, else 0."""
        low, high = self.change.interval
        if self.p >= LEVEL or low <= 0 <= high:
            return 0
        return 1 if self.change.difference > 0 else -1


def duels(pairs: Iterable[tuple[Tally, Tally]]) -> list[Duel]:
    """Every pair, tested together."""
    found = [(first, second, second.against(first)) for first, second in pairs]
    raised = holm([change.p for *_, change in found])
    return [Duel(a, b, change, p) for (a, b, change), p in zip(found, raised, strict=True)]


def verdict(fought: Sequence[Duel]) -> Verdict:
    """On "the second is above": it must be so somewhere, and nowhere the other way round."""
    signs = {duel.sign for duel in fought}
    if -1 in signs:
        return "does not hold"
    return "holds" if 1 in signs else "cannot be told here"


def claimed(
    claim: str, fought: Sequence[Duel], *, second: str, first: str, at: str = "at equal experts"
) -> Finding:
    """One sentence over all duels: how many were won, and the widest of each kind."""
    if not fought:
        text = f"{second} was not met with {first} {at} on this model."
        return Finding(text, claim, "cannot be told here")
    won, lost = ([d for d in fought if d.sign == sign] for sign in (1, -1))
    even = len(fought) - len(won) - len(lost)
    text = (
        f"Of {len(fought)} comparisons {at}, {second} is above {first} in {len(won)}, "
        f"below in {len(lost)}, and not to be told apart in {even}."
    )
    widest = [max(found, key=lambda d: abs(d.change.difference)) for found in (won, lost) if found]
    return Finding(" ".join([text, *map(sentence, widest)]), claim, verdict(fought))


def sentence(duel: Duel) -> str:
    """One duel in words."""
    low, high = duel.change.interval
    first, second = duel.first, duel.second
    return (
        f"{second.name} answers {second.accuracy:.1%} right with {second.experts:.1f} experts, "
        f"{first.name} {first.accuracy:.1%} with {first.experts:.1f}: "
        f"{duel.change.difference:+.1%} ({low:+.1%} to {high:+.1%}, {p_value(duel.p)})."
    )


def duel_table(fought: Sequence[Duel], caption: str) -> Table:
    """One duel a row."""
    heads = ("this", "right", "experts", "against", "right", "experts", "difference, 95 %", "p")
    rows = []
    for duel in fought:
        low, high = duel.change.interval
        sides = [
            text
            for tally in (duel.second, duel.first)
            for text in (tally.name, f"{tally.accuracy:.1%}", f"{tally.experts:.1f}")
        ]
        change = f"{duel.change.difference:+.1%}, {low:+.1%} to {high:+.1%}"
        rows.append([*sides, change, p_value(duel.p, bare=True)])
    n = len(fought[0].first.bits()) if fought else 0
    return Table(
        heads,
        rows,
        f"{caption} The same {n} items; p is McNemar's, exact, raised for the {len(fought)} "
        "comparisons of the table (Holm).",
        numbers=(1, 2, 4, 5, 6, 7),
    )


def p_value(p: float, *, bare: bool = False) -> str:
    """For people: nobody reads beyond a thousandth."""
    if p < 0.001:
        return "< 0.001" if bare else "p < 0.001"
    return f"{p:.3f}" if bare else f"p {p:.3f}"
