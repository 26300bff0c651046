"""Experiments that compare groups of policies by accuracy, experts and forwards."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from coterie.lab.evals.stats import PairedDifference, holm_adjust
from coterie.lab.plotting import (
    FIGURE_HEIGHT,
    Series,
    SeriesStyle,
    guide_series,
    indexed_style,
    line_chart,
    pareto_front,
    policy_style,
)
from coterie.lab.study.experiment import (
    Entry,
    Experiment,
    ExperimentText,
    Finding,
    Part,
    StudyContext,
    Table,
    decimal_bytes,
    format_p,
    judge,
)
from coterie.lab.study.results import Pair, VariantResult, VariantResults
from coterie.lab.study.variants import Templates, beta_text, run_comparison

TEXT = ExperimentText.load("comparison")
DEFINITIONS = tomllib.loads(Path(__file__).with_name("comparisons.toml").read_text("utf-8"))
CONDITION = {"size": "at the same size", "beta": "at the same beta", "experts": "at equal experts"}
SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class GroupComparison:
    """Whether the group ``second`` is better than the groups ``first``, as in comparisons.toml."""

    second: str
    first: Sequence[str]
    at: str = "size"
    claim: str = ""
    name: str = ""  # of ``first``
    label: str = ""  # of a comparison without a claim

    def pairs(self, results: VariantResults) -> list[Pair]:
        """(a first result, a second one)."""
        firsts = [result for label in self.first for result in results.groups.get(label, ())]
        seconds = results.groups.get(self.second, ())
        if self.at == "size":
            return list(zip(firsts, seconds, strict=True))
        if self.at == "beta":
            all_pairs = ((a, b) for a in firsts for b in seconds)
            return [(a, b) for a, b in all_pairs if beta_text(a.policy) == beta_text(b.policy)]
        families = ({r.family for r in firsts}, {r.family for r in seconds})
        either_way = (pair for a, b in results.pairs for pair in ((a, b), (b, a)))
        return [
            (a, b) for a, b in either_way if a.family in families[0] and b.family in families[1]
        ]

    def finding(self, text: ExperimentText, results: VariantResults) -> Finding | str:
        pairs, name = self.pairs(results), self.name or " or ".join(self.first)
        names = {"second": self.second, "first": name, "condition": CONDITION[self.at]}
        if self.claim:
            return claim_finding(text.claim(self.claim), pairs, **names)
        unit = "sizes" if self.at == "size" else "comparisons"
        return count_sentence(pairs, unit, self.label, **names)


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
    shown = labels or list(results.groups)
    groups = {label: group for label, group in results.groups.items() if label in shown and group}
    series = [
        group_series(label, group, style=None if by_family else indexed_style(index))
        for index, (label, group) in enumerate(groups.items())
    ]
    series.append(vanilla_series(results.vanilla))
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


@dataclass(frozen=True)
class PolicyComparison(Experiment):
    """Groups of policies on the same problems, as defined in comparisons.toml.

    ``own_parts`` come after the findings of the comparisons. Without ``has_usual_parts``, they
    take the place of the figures and tables of all policies too.
    """

    text: ExperimentText
    groups: Mapping[str, Templates]
    rivals: Mapping[str, Templates] = field(default_factory=dict)
    comparisons: Sequence[GroupComparison] = ()
    charts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    style: Mapping[str, bool] = field(default_factory=dict)  # options of ``draw_comparison``
    notes: Sequence[str] = ()  # keys of sentences
    own_parts: Callable[[ExperimentText, VariantResults], Iterable[Part]] = lambda *_: ()
    has_usual_parts: bool = True

    @staticmethod
    def load(name: str, **own: Any) -> PolicyComparison:
        values = {**DEFINITIONS[name], **own}
        comparisons = [GroupComparison(**entry) for entry in values.pop("comparisons", ())]
        return PolicyComparison(ExperimentText.load(name), comparisons=comparisons, **values)

    def measure(self, context: StudyContext) -> Entry:
        return run_comparison(context, self.groups, self.rivals).to_record()

    def report(self, record: Entry) -> Iterator[Part]:
        results = VariantResults.from_record(record, list(self.groups))
        if self.has_usual_parts:
            yield from self._usual_parts(results)
        yield from (comparison.finding(self.text, results) for comparison in self.comparisons)
        yield from self.own_parts(self.text, results)
        yield from map(self.text.sentence, self.notes)

    def _usual_parts(self, results: VariantResults) -> Iterator[Part]:
        """Figures and tables of every policy and, with a caption for them, every matched pair."""
        for name, labels in (self.charts or {self.name: ()}).items():
            draw = partial(draw_comparison, results, labels, **self.style)
            yield self.text.drawing("figure", draw, name)
        yield variant_table(results)
        oriented = [pair for each in self.comparisons for pair in each.pairs(results)]
        pairs = [(a, b) if (a, b) in oriented else (b, a) for a, b in results.pairs]
        if pairs and "pairs" in self.text.captions:
            yield comparison_table(pairs, self.text.caption("pairs"))


def group_series(
    label: str,
    group: Sequence[VariantResult],
    y: str = "accuracy",
    style: SeriesStyle | None = None,
) -> Series:
    """An attribute of the results against their experts; accuracies have intervals."""
    ordered = sorted(group, key=lambda result: result.experts)
    xs, ys = [result.experts for result in ordered], [getattr(r, y) for r in ordered]
    intervals = [result.interval for result in ordered] if y == "accuracy" else None
    return Series(label, xs, ys, style or policy_style(group[-1].policy), intervals=intervals)


def vanilla_series(vanilla: VariantResult, y: str = "accuracy") -> Series:
    point = [vanilla.experts], [getattr(vanilla, y)]
    return Series("vanilla", *point, policy_style("vanilla"), line="", size=11)


def unique_experts_label(results: VariantResults) -> str:
    return f"unique experts of {results.experts}, per layer and forward"


def variant_table(results: VariantResults, caption: str | None = None) -> Table:
    """One policy per row: accuracy, the paired change against vanilla, experts and forwards."""
    n = results.vanilla.accuracy_share().n
    caption = caption or TEXT.caption("table", n=n)
    return TEXT.table("variants", variant_rows(results), caption=caption)


def variant_rows(results: VariantResults) -> list[dict[str, object]]:
    """One row per policy, vanilla first: the result ``r``, and values against vanilla."""
    vanilla = results.vanilla
    changes = [result.compare_to(vanilla) for result in results.all]
    return [
        {
            "r": result,
            "change": change,
            "difference": "" if result is vanilla else f"{change.difference:+.1%}",
            "p": "" if result is vanilla else format_p(change.p_value, bare=True),
            "relative": result.relative_accuracy(vanilla),
            "bytes": decimal_bytes(result.expert_bytes),
            "share": result.experts_per_block / vanilla.experts_per_block,
        }
        for result, change in zip(results.all, changes, strict=True)
    ]


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
