"""The expert-cache experiment: findings, tables and figures of its record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from math import inf
from typing import NamedTuple

from matplotlib.figure import Figure

from coterie.lab.plotting import dash_repeats, line_chart, policy_series
from coterie.lab.study.comparison import SIGNIFICANCE_LEVEL, PairedComparison, compare_pairs
from coterie.lab.study.experiment import (
    Drawing,
    Entry,
    Experiment,
    Finding,
    Part,
    StudyContext,
    Table,
    decimal_bytes,
    format_p,
)
from coterie.lab.study.expert_cache import MEMORY_SHARES, measure_expert_cache
from coterie.lab.study.results import VariantResult

MAX_ACCURACY_LOSS = 0.01  # "keeps accuracy" allows this loss at the interval's end
MIN_BYTES_SAVED = 0.5  # the bytes that a policy with a resident bonus should save
MAX_FORWARD_RATIO = 1.1  # "keeps forwards" allows this ratio at the interval's end
MIN_ERROR_RATE = 2e-4  # lower error rates are drawn here
COMMIT_TEXTS = {"": "no_commits", "policy": "policy_commits", "vanilla": "vanilla_commits"}
RUN_COLUMNS = ("policy", "n", "accuracy, 95 %", "change", "p", "forwards")


class Interval(NamedTuple):
    """A value with the ends of its 95 % interval, and the p value of its test."""

    value: float
    low: float
    high: float
    p: float | None = None

    def __format__(self, spec: str) -> str:
        """For ".1%": "58.6% (58.2% to 59.0%)"."""
        p = "" if self.p is None else f", {format_p(self.p)}"
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}}{p})"


@dataclass(frozen=True)
class CachePoint:
    """One policy with one cache in one precision; ``run`` and ``cache`` are of the record."""

    run: Entry
    cache: Entry
    result: VariantResult
    expert_bytes: int

    @property
    def policy(self) -> str:
        return self.run["policy"]

    @property
    def share(self) -> str:
        """Of the experts in memory."""
        return self.cache["share"].replace("%", " %")

    @property
    def memory(self) -> str:
        """Bytes of a layer's cache, as text."""
        return decimal_bytes(self.cache["slots"] * self.expert_bytes)

    @property
    def bytes(self) -> float:
        """Moved per answer."""
        return self.cache["moved"] * self.expert_bytes / self.run["items"]

    @property
    def moved(self) -> str:
        return decimal_bytes(self.bytes)

    @property
    def hit_rate(self) -> float:
        return 1 - self.cache["moved"] / self.cache["used"] if self.cache["used"] else 1.0


@dataclass(frozen=True)
class PointComparison:
    """A point compared with a baseline on the same items; ``test`` is of their accuracy."""

    point: CachePoint
    baseline: CachePoint
    test: PairedComparison
    ratio: str  # the record's key of the ratios to the baseline's bytes and forwards

    @cached_property
    def change(self) -> Interval:
        """Of accuracy: Tango's interval, and p adjusted for the list of comparisons."""
        change = self.test.change
        return Interval(change.difference, *change.interval, self.test.p)

    @property
    def single_p(self) -> str:
        """The p value without an adjustment."""
        return format_p(self.test.change.p_value, bare=True)

    @property
    def bytes(self) -> Interval:
        """Relative to the baseline's; 1 where each expert moves once."""
        return Interval(*(self.point.cache[self.ratio] or (1.0, 1.0, 1.0)))

    @property
    def saved(self) -> Interval:
        return Interval(1 - self.bytes.value, 1 - self.bytes.high, 1 - self.bytes.low)

    @property
    def forwards(self) -> Interval:
        """Denoising forwards relative to the baseline's."""
        return Interval(*self.point.run[self.ratio])

    @property
    def keeps_accuracy(self) -> bool:
        """Whether the whole interval allows no loss above ``MAX_ACCURACY_LOSS``."""
        return self.change.low >= -MAX_ACCURACY_LOSS

    @property
    def task_changes(self) -> str:
        first, second = self.test.first, self.test.second
        changes = {
            task: second.accuracy_share(task).value - first.accuracy_share(task).value
            for task in second.right
        }
        return ", ".join(f"{task} {change:+.1%}" for task, change in changes.items())


def compare_points(
    pairs: Sequence[tuple[CachePoint, CachePoint]], ratio: str = "to_vanilla"
) -> list[PointComparison]:
    """Each (baseline, point) on the items of the point, tested together (Holm)."""
    tests = compare_pairs([(restrict_to(a.result, b.result), b.result) for a, b in pairs])
    return [PointComparison(b, a, test, ratio) for (a, b), test in zip(pairs, tests, strict=True)]


def saves_bytes(
    comparisons: Sequence[PointComparison], least: float = 0.0, max_forwards: float = inf
) -> bool | None:
    """Whether one policy saves this share of the bytes and keeps accuracy and forwards.

    It counts if it does so by its whole intervals. None where no policy does so and one may.
    """
    if any(
        one.saved.low > least and one.keeps_accuracy and one.forwards.high <= max_forwards
        for one in comparisons
    ):
        return True
    fails = (
        one.saved.high <= least
        or one.forwards.low > max_forwards
        or (one.test.p < SIGNIFICANCE_LEVEL and one.change.value < 0)
        for one in comparisons
    )
    return False if all(fails) else None


def restrict_to(result: VariantResult, other: VariantResult) -> VariantResult:
    """The result on its first items, as many of each task as ``other`` has."""
    right = {task: bits[: len(other.right.get(task, ""))] for task, bits in result.right.items()}
    return replace(result, right={task: bits for task, bits in right.items() if bits})


def lowest_traffic(comparisons: Sequence[PointComparison]) -> PointComparison | None:
    """Of the policies that keep vanilla's accuracy."""
    accurate = [one for one in comparisons if one.keeps_accuracy]
    return max(accurate, key=lambda one: one.saved.value, default=None)


@dataclass(frozen=True)
class ResultGrid:
    """The points of a record."""

    record: Entry
    points: tuple[CachePoint, ...]

    @staticmethod
    def from_record(record: Entry) -> ResultGrid:
        """The points are grouped by policy."""
        sizes = {entry["name"]: entry["expert_bytes"] for entry in record["precisions"]}
        policies = list(dict.fromkeys(run["policy"] for run in record["runs"]))
        points = (
            CachePoint(run, cache, result, sizes[run["precision"]])
            for run in sorted(record["runs"], key=lambda run: policies.index(run["policy"]))
            for result in [VariantResult.from_json(run["tally"])]
            for cache in run["kept"]
        )
        return ResultGrid(record, tuple(points))

    @property
    def precisions(self) -> list[str]:
        """Lower ones are compared with the first."""
        return [entry["name"] for entry in self.record["precisions"]]

    @property
    def commit_kinds(self) -> list[str]:
        return ["policy", "vanilla"] if self.record["commits"] else ["policy"]

    def select(
        self, precision: str, share: str | None = None, commit: str | None = "policy"
    ) -> list[CachePoint]:
        """The matching points, vanilla first; ``commit`` is ignored without commit forwards."""
        return [
            point
            for point in self.points
            if point.run["precision"] == precision
            and share in (None, point.cache["share"])
            and (commit is None or point.run["commit"] in ("", commit))
        ]

    def main_points(self, commit: str | None = "policy") -> list[CachePoint]:
        return self.select(self.precisions[0], self.record["main"], commit)

    def against_vanilla(self, commit: str = "policy") -> list[PointComparison]:
        """All policies at the main share, tested together."""
        vanilla, *others = self.main_points(commit)
        return compare_points([(vanilla, p) for p in others if p.cache["to_vanilla"]])

    def in_precision(self, points: Sequence[CachePoint], name: str) -> list[PointComparison]:
        """The runs of these main points in another precision, compared with them."""
        others = {p.policy: p for p in self.select(name, self.record["main"])}
        pairs = [(p, others[p.policy]) for p in points if p.policy in others]
        return compare_points(pairs, "to_whole")


class ExpertCacheExperiment(Experiment, name="experts"):
    """Policy x share of the experts in memory x precision: accuracy, hits, bytes, forwards."""

    def measure(self, context: StudyContext) -> Entry:
        return measure_expert_cache(context)

    def report(self, record: Entry) -> Iterator[Part]:
        grid, text = ResultGrid.from_record(record), self.text
        yield from self._figures(grid)
        for name in grid.precisions:
            yield self._points_table(grid.select(name))
        for kind in grid.commit_kinds[1:]:
            yield self._points_table(grid.main_points(kind))
        vanilla = [p for p in grid.select(grid.precisions[0]) if p.policy == "vanilla"]
        rates = ", ".join(text.sentence("hit_rate", point=point) for point in vanilla)
        yield text.sentence("cache_alone", grid=grid, rates=rates)
        if vanilla[0].result.accuracy:
            for kind in grid.commit_kinds:
                yield from self._caching_findings(grid.against_vanilla(kind))
            for name in grid.precisions[1:]:
                yield from self._low_findings(grid, name)
        else:
            yield text.finding("no_accuracy", None, claim="caching")
        for name in grid.precisions[1:]:
            same_memory = grid.select(grid.precisions[0], "25%")[:1], grid.select(name, "50%")[:1]
            for base, low in zip(*same_memory, strict=False):
                yield text.sentence("same_memory", base=base, low=low)
        yield from (text.sentence("left_out", **entry) for entry in record["left_out"])
        tasks = {task for point in grid.points for task in point.result.right}
        note = text.sentence("own_problems") if {"words", "docstring"} <= tasks else ""
        yield text.sentence("definitions", record=record, note=note)

    def _figures(self, grid: ResultGrid) -> Iterator[Drawing]:
        """Error rates by bytes, of caches that hold some of the experts."""
        for name in grid.precisions:
            points = [p for p in grid.select(name) if MEMORY_SHARES[p.cache["share"]] < 1]
            suffix = "" if name == grid.precisions[0] else f"-{name}"
            draw = partial(draw_errors, points)
            yield self.text.drawing("bytes", draw, f"experts-bytes{suffix}", point=points[0])
        if grid.record["commits"]:
            points = grid.main_points(None)
            draw = partial(draw_errors, points)
            yield self.text.drawing("commits", draw, "experts-commits", point=points[0])

    def _caching_findings(self, comparisons: Sequence[PointComparison]) -> list[Finding]:
        """Whether a cache saves bytes, and whether it saves half of them."""
        best = lowest_traffic(comparisons)
        resident = [one for one in comparisons if one.point.run["looks"]]
        resident.sort(key=lambda one: -one.saved.value)
        caching = self.text.finding(
            "caching",
            saves_bytes(comparisons, max_forwards=MAX_FORWARD_RATIO),
            commits=self.text.sentence(COMMIT_TEXTS[comparisons[0].point.run["commit"]]),
            accurate=sum(one.keeps_accuracy for one in comparisons),
            policies=len(comparisons),
            selection=self.text.sentence("lowest" if best else "nearest"),
            best=best or max(comparisons, key=lambda one: one.change.low),
        )
        if not resident:
            return [caching]
        policies = "; ".join(self.text.sentence("half_policy", one=one) for one in resident)
        n, holds = resident[0].point.run["items"], saves_bytes(resident, MIN_BYTES_SAVED)
        return [caching, self.text.finding("half", holds, n=n, policies=policies)]

    def _low_findings(self, grid: ResultGrid, name: str) -> list[Finding]:
        """Low precision under vanilla and under the accurate policy that saves most in 16 bits."""
        comparisons = grid.against_vanilla()
        best = lowest_traffic([c for c in comparisons if c.forwards.high <= MAX_FORWARD_RATIO])
        points = [*grid.main_points()[:1], *([] if best is None else [best.point])]
        return [
            self.text.finding("low_precision", saves_bytes([one]), name=name, one=one)
            for one in grid.in_precision(points, name)
        ]

    def _points_table(self, points: Sequence[CachePoint]) -> Table:
        """Policies by shares of the experts in memory; what all shares have is shown once."""
        rows = compare_points([(points[0], point) for point in points])
        size = decimal_bytes(points[0].expert_bytes)
        commits = self.text.sentence(COMMIT_TEXTS[points[-1].run["commit"]])
        table = self.text.table("points", rows, point=points[0], size=size, commits=commits)
        shown: list[list[str]] = []
        for one, above, cells in zip(rows, [None, *rows], table.rows, strict=False):
            hidden = set(RUN_COLUMNS if above and above.point.run is one.point.run else ())
            hidden |= {"change", "p"} if one.point.policy == "vanilla" else set()
            hidden |= set() if one.point.cache["to_vanilla"] else {"saved"}
            pairs = zip(table.heads, cells, strict=True)
            shown.append(["" if head in hidden else cell for head, cell in pairs])
        return replace(table, rows=shown)


def draw_errors(points: Sequence[CachePoint]) -> Figure:
    """Error rates against the bytes moved; a line is a policy."""
    by_policy = {name: list(group) for name, group in groupby(points, lambda p: p.policy)}

    def error(accuracy: float) -> float:
        return max(1 - accuracy, MIN_ERROR_RATE)

    series = [
        policy_series(
            policy,
            [point.bytes / 1e6 for point in group],
            [error(point.result.accuracy) for point in group],
            label=policy.replace(" ", "\n", 1),
            line=line,
            intervals=[sorted(map(error, point.result.interval)) for point in group],
        )
        for (policy, group), line in zip(by_policy.items(), dash_repeats([*by_policy]), strict=True)
    ]
    return line_chart(
        series,
        "MB of experts moved per answer",
        "error rate",
        xlim=(0, None),
        ylim=(MIN_ERROR_RATE, 1.1),
        log="y",
        columns=1,
        height=5.5,
    )
