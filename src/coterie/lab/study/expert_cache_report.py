"""The expert-cache experiment: findings and tables of its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coterie.lab.evals.stats import PairedDifference, holm_adjust, paired_difference
from coterie.lab.study.accuracy import NO_ACCURACY
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    decimal_bytes,
    format_interval,
    format_p,
    judge,
    make_table,
)
from coterie.lab.study.expert_cache import (
    LINKS,
    CachePoint,
    ExpertCacheRecord,
    RatioWithInterval,
    ResultGrid,
    measure_expert_cache,
    restrict_to,
)
from coterie.lab.study.expert_cache_figures import draw_bytes, draw_commits, draw_hits
from coterie.lab.study.paired import SIGNIFICANCE_LEVEL
from coterie.lab.study.results import Pair

MAX_ACCURACY_LOSS = 0.01  # "keeps accuracy" allows this loss at the interval's end
MIN_BYTES_SAVED = 0.5  # the bytes that a policy with a resident bonus should save
MAX_FORWARD_RATIO = 1.1  # "keeps forwards" allows this ratio at the interval's end
CACHING_CLAIM = "An expert cache moves fewer bytes and keeps accuracy and the number of forwards."
HALF_BYTES_CLAIM = (
    "With 35 % of the experts in memory, a coreset policy with a resident bonus moves at least "
    "50 % fewer bytes than vanilla with LRU and stays within a point of its accuracy."
)
LOW_PRECISION_CLAIM = (
    "Experts in {name} move fewer bytes than in 16 bits and stay within a point of accuracy."
)


class ExpertCacheExperiment(Experiment):
    """Policy x share of the experts in memory x precision: accuracy, hits, bytes, forwards."""

    text = ExperimentText.load("experts")

    def measure(self, context: StudyContext) -> ExpertCacheRecord:
        return measure_expert_cache(context)

    def drawings(self, record: ExpertCacheRecord) -> Sequence[Drawing]:
        grid = ResultGrid.from_record(record)
        figures = [
            Drawing(
                "experts-bytes",
                "Accuracy, with 95 % Wilson intervals, against the bytes of experts moved per "
                "answer, one panel per precision. A line is a policy, a marker the share of the "
                "experts in memory (with all of them, each expert moves once). Left and up is "
                "better. The scale is that of error rates.",
                lambda: draw_bytes(grid),
            ),
            Drawing(
                "experts-hits",
                f"Hit rate of the cache ({grid.baseline_precision}, LRU), by the share of the "
                "experts in memory.",
                lambda: draw_hits(grid),
            ),
        ]
        if record["commits"]:
            caption = (
                f"Accuracy against bytes with {grid.main} in memory ({grid.baseline_precision}), "
                "blocks committed by the policy and by vanilla. Open markers: policies with a "
                "resident bonus."
            )
            figures.append(Drawing("experts-commits", caption, lambda: draw_commits(grid)))
        return figures

    def tables(self, record: ExpertCacheRecord) -> Sequence[Table]:
        grid = ResultGrid.from_record(record)
        names = [entry["name"] for entry in record["precisions"]]
        return [
            *(precision_table(grid, name) for name in names),
            *([commit_table(grid)] if record["commits"] else []),
            *(paired_table(grid, name) for name in names[1:]),
        ]

    def findings(self, record: ExpertCacheRecord) -> Sequence[Finding | str]:
        grid = ResultGrid.from_record(record)
        vanilla = next(point for point in grid.points if point.policy == "vanilla")
        findings: list[Finding | str] = [cache_only_sentence(grid)]
        if vanilla.result.accuracy:
            findings += [f for commit in grid.commit_kinds for f in caching_findings(grid, commit)]
            for entry in record["precisions"][1:]:
                findings += low_precision_findings(grid, entry["name"])
        else:
            findings.append(judge(NO_ACCURACY, CACHING_CLAIM, None))
        findings += same_memory_sentences(grid)
        if vanilla.result.accuracy:
            findings += [f"{e['name']} was not measured: {e['why']}" for e in record["left_out"]]
        return [*findings, definitions_text(grid)]


@dataclass(frozen=True)
class PairedChange:
    """A paired difference with an adjusted p value and Tango's interval."""

    paired: PairedDifference
    p: float
    interval: tuple[float, float]

    @property
    def keeps_accuracy(self) -> bool:
        """Whether the whole interval allows no loss above ``MAX_ACCURACY_LOSS``."""
        return self.interval[0] >= -MAX_ACCURACY_LOSS

    @property
    def is_worse(self) -> bool:
        return self.p < SIGNIFICANCE_LEVEL and self.paired.difference < 0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.paired.difference:+.1%} ({low:+.1%} to {high:+.1%}, {format_p(self.p)})"


def paired_changes(pairs: Sequence[Pair]) -> list[PairedChange]:
    """The second minus the first of each pair, tested together (Holm)."""
    tests = [second.compare_to(first) for first, second in pairs]
    adjusted = holm_adjust([test.p_value for test in tests])
    return [PairedChange(test, p, test.interval) for test, p in zip(tests, adjusted, strict=True)]


@dataclass(frozen=True)
class PolicyAssessment:
    """A policy compared with vanilla at the same cache size."""

    point: CachePoint
    vanilla: CachePoint
    change: PairedChange
    saved: RatioWithInterval

    @property
    def keeps_forwards(self) -> bool:
        return self.point.run["to_vanilla"][2] <= MAX_FORWARD_RATIO

    def __str__(self) -> str:
        ratio, low, high = self.point.run["to_vanilla"]
        link, name = next(iter(LINKS.items()))
        ms, vanilla_ms = (entry.outcome["ms"][link] for entry in (self.point, self.vanilla))
        return (
            f"{self.point.policy}: it saves {format_ratio(self.saved)} of vanilla's bytes, with an "
            f"accuracy of {self.point.result.accuracy:.1%} on {self.point.run['items']} problems, "
            f"{self.change} against vanilla, and {ratio:.2f} times the forwards ({low:.2f} to "
            f"{high:.2f}). Predicted over {name} ({link}): {ms:.3g} ms per answer instead of "
            f"{vanilla_ms:.3g}."
        )


def assess_policies(grid: ResultGrid, commit: str) -> list[PolicyAssessment]:
    """All policies but vanilla at the main share, tested together."""
    vanilla, *others = grid.main_points(commit)
    saving = [(point, saved) for point in others if (saved := point.saved) is not None]
    changes = paired_changes([(point.vanilla, point.result) for point, _ in saving])
    return [
        PolicyAssessment(point, vanilla, change, saved)
        for (point, saved), change in zip(saving, changes, strict=True)
    ]


def cache_only_sentence(grid: ResultGrid) -> str:
    rates = [
        f"{point.hit_rate:.0%} with {point.share} in memory"
        for point in grid.select(grid.baseline_precision)
        if point.policy == "vanilla"
    ]
    return (
        "A cache alone changes no answer, because the same experts are computed. Hit rates under "
        f"vanilla (LRU, {grid.baseline_precision}): {', '.join(rates)}."
    )


def caching_findings(grid: ResultGrid, commit: str) -> list[Finding]:
    """Whether a cache saves bytes, and whether it saves half of them, for one kind of commits."""
    assessments = assess_policies(grid, commit)
    committer = "the policy" if commit == "policy" else "vanilla"
    commits = f", commits by {committer}" if grid.record["commits"] else ""
    setting = f"{grid.main} of the experts in memory, {grid.baseline_precision}{commits}"
    if not assessments:
        return [judge(f"{setting}: no policy was run.", CACHING_CLAIM, None)]
    accurate = [one for one in assessments if one.change.keeps_accuracy]
    if accurate:
        best = max(accurate, key=lambda one: one.saved[0])
    else:
        best = max(assessments, key=lambda one: one.change.interval[0])
    text = (
        f"{setting}: {len(accurate)} of {len(assessments)} policies stay within a point of "
        "vanilla's accuracy by their whole interval. "
        f"{'Among these, the lowest traffic has' if accurate else 'The nearest is'} {best}"
    )
    resident = [one for one in assessments if one.point.run["looks"]]
    return [
        judge(text, CACHING_CLAIM, saves_bytes(assessments)),
        judge(resident_policies_sentence(resident), HALF_BYTES_CLAIM, saves_half(resident)),
    ]


def saves_bytes(assessments: Sequence[PolicyAssessment]) -> bool | None:
    """True if one policy moves significantly fewer bytes and keeps accuracy and forwards."""
    fewer = [one for one in assessments if one.saved[1] > 0]
    if any(one.change.keeps_accuracy and one.keeps_forwards for one in fewer):
        return True
    slower = MAX_FORWARD_RATIO
    all_fail = all(one.change.is_worse or one.point.run["to_vanilla"][1] > slower for one in fewer)
    return False if all_fail else None


def saves_half(resident: Sequence[PolicyAssessment]) -> bool | None:
    """True if one policy saves half of the bytes by its whole interval and keeps accuracy."""
    if any(one.change.keeps_accuracy and one.saved[1] >= MIN_BYTES_SAVED for one in resident):
        return True
    is_open = any(not one.change.is_worse and one.saved[2] >= MIN_BYTES_SAVED for one in resident)
    return None if is_open or not resident else False


def resident_policies_sentence(resident: Sequence[PolicyAssessment]) -> str:
    if not resident:
        return "No policy with a resident bonus was run at this share."
    ordered = sorted(resident, key=lambda one: -one.saved[0])
    clauses = [
        f"{one.point.policy} saves {format_ratio(one.saved)} at {one.change}" for one in ordered
    ]
    return (
        f"Policies with a resident bonus, n = {resident[0].point.run['items']}: "
        f"{'; '.join(clauses)}."
    )


def low_precision_findings(grid: ResultGrid, name: str) -> list[Finding]:
    """Low precision under vanilla and under the accurate policy that saves most in 16 bits."""
    accurate = [
        one
        for one in assess_policies(grid, "policy")
        if one.change.keeps_accuracy and one.keeps_forwards
    ]
    best = max(accurate, key=lambda one: one.saved[0], default=None)
    selected = [*grid.main_points()[:1], *([] if best is None else [best.point])]
    return [
        low_precision_finding(before, after, change, LOW_PRECISION_CLAIM.format(name=name))
        for before, after, change in match_precisions(grid, selected, name)
    ]


def match_precisions(
    grid: ResultGrid, points: Sequence[CachePoint], name: str
) -> list[tuple[CachePoint, CachePoint, PairedChange]]:
    """Each point with its counterpart in another precision, compared on the same items."""
    counterparts = [(point, grid.counterpart(point, name)) for point in points]
    matches = [(before, after) for before, after in counterparts if after is not None]
    changes = paired_changes([(restrict_to(b.result, a.result), a.result) for b, a in matches])
    return [(*match, change) for match, change in zip(matches, changes, strict=True)]


def low_precision_finding(
    before: CachePoint, after: CachePoint, change: PairedChange, claim: str
) -> Finding:
    ratio = after.outcome["to_whole"]
    bytes_text = (
        "" if ratio is None else f"{format_interval(ratio[0], ratio[1:], '.2f')} times the bytes, "
    )
    forward_ratio = after.run["to_whole"] or [1.0, 1.0, 1.0]
    tasks = ", ".join(f"{t} {task_difference(before, after, t)}" for t in after.result.right)
    text = (
        f"{before.policy}, {after.run['precision']} against {before.run['precision']}, "
        f"{after.share} in memory: {bytes_text}"
        f"{format_interval(forward_ratio[0], forward_ratio[1:], '.2f')} times the forwards, an "
        f"accuracy of {after.result.accuracy:.1%} on {after.run['items']} problems, {change}; by "
        f"task {tasks}."
    )
    moves_fewer = ratio is not None and ratio[2] < 1
    if change.keeps_accuracy and moves_fewer:
        return judge(text, claim, True)
    return judge(text, claim, False if change.is_worse or not moves_fewer else None)


def task_difference(before: CachePoint, after: CachePoint, task: str) -> str:
    """The change on one task; empty where the second run has no item of it."""
    if task not in after.result.right:
        return ""
    first = restrict_to(before.result, after.result).correct_flags(task)
    return f"{paired_difference(first, after.result.correct_flags(task)).difference:+.1%}"


def same_memory_sentences(grid: ResultGrid) -> list[str]:
    """Traffic in the same bytes of memory, in 16 bits and in lower precision."""
    sentences = []
    sizes = {entry["name"]: entry["expert_bytes"] for entry in grid.record["precisions"]}

    def vanilla_points(precision: str, share: str) -> list[CachePoint]:
        return [p for p in grid.select(precision, share) if p.policy == "vanilla"]

    for name in list(sizes)[1:]:
        base_points = vanilla_points(grid.baseline_precision, "25%")
        for low, base in zip(vanilla_points(name, "50%"), base_points, strict=False):
            memory, low_memory = (
                decimal_bytes(p.outcome["slots"] * sizes[p.run["precision"]]) for p in (base, low)
            )
            sentences.append(
                f"Vanilla with {memory} per layer (25 % in {grid.baseline_precision}) moves "
                f"{decimal_bytes(base.bytes)} per answer; with {low_memory} (50 % in {name}) it "
                f"moves {decimal_bytes(low.bytes)}."
            )
    return sentences


def definitions_text(grid: ResultGrid) -> str:
    tasks = {task for point in grid.points for task in point.result.right}
    task_note = (
        " For the model in the package, its own word and docstring problems replace GSM8K and "
        "HumanEval."
        if {"words", "docstring"} <= tasks
        else ""
    )
    return (
        f"All weights but the experts are in {grid.record['precisions'][0]['dtype']} in every "
        "precision. Caches are simulated on the experts of real runs: answers in sequence, tasks "
        "in turn, LRU, with a cache that persists between answers "
        "(`results/replay-drawn-mini.json` has other eviction policies). Bytes are of all "
        "forwards, with those of the prompt and of commits. Throughput was not measured; "
        "milliseconds are predicted as bytes over the link's bandwidth, without the time of "
        "computation (`results/offload-on-a-cpu.json` has the error of this prediction with a disk "
        "as the link). A verdict needs one policy that meets the condition by its own interval. p "
        "is adjusted for the number of policies in the sentences above (Holm), not in the "
        f"tables.{task_note}"
    )


Row = tuple[CachePoint, bool]  # the flag: the accuracy columns repeat the row above


def precision_table(grid: ResultGrid, name: str) -> Table:
    """Policies by shares of the experts in memory."""
    points = grid.select(name)
    order = list(dict.fromkeys(point.policy for point in points))
    points.sort(key=lambda point: (order.index(point.policy), -point.outcome["slots"]))
    previous = [None, *(point.policy for point in points)]
    rows = [
        (p, p.policy == q and not p.run["looks"]) for p, q in zip(points, previous, strict=False)
    ]

    def once(text: Callable[[CachePoint], str]) -> Callable[[Row], str]:
        return lambda row: "" if row[1] else text(row[0])

    def change(text: Callable[[PairedDifference], str]) -> Callable[[Row], str]:
        return once(lambda p: "" if p.policy == "vanilla" else text(p.result.compare_to(p.vanilla)))

    size = next(p["expert_bytes"] for p in grid.record["precisions"] if p["name"] == name)
    commits = ", commits by the policy" if grid.record["commits"] else ""
    return make_table(
        f"Experts in {name} ({decimal_bytes(size)} each){commits}. A policy that does not depend "
        "on the resident experts has the same answers at every share, so its accuracy is shown "
        "once. Saved: of vanilla's bytes at the same share. p is McNemar's, exact. Milliseconds "
        "per answer are predicted.",
        rows,
        {
            "policy": once(lambda point: point.policy),
            "in memory": "{0[0].share}",
            "n": once(lambda point: str(point.result.accuracy_share().n)),
            "accuracy, 95 %": once(
                lambda p: (
                    f"{p.result.accuracy:.1%}, {p.result.interval[0]:.1%} to "
                    f"{p.result.interval[1]:.1%}"
                )
            ),
            "change": change(lambda paired: f"{paired.difference:+.1%}"),
            "p": change(lambda paired: format_p(paired.p_value, bare=True)),
            "hits": "{0[0].hit_rate:.1%}",
            "bytes per answer": lambda row: decimal_bytes(row[0].bytes),
            "saved": lambda row: "" if row[0].saved is None else f"{row[0].saved[0]:.1%}",
            "forwards": once(lambda point: f"{point.result.forwards_per_block:.2f}"),
            **{f"ms by {link}": f"{{0[0].outcome[ms][{link}]:.3g}}" for link in LINKS},
        },
        text_columns=2,
    )


def commit_table(grid: ResultGrid) -> Table:
    """All policies at the main share, by the policy of the commit forwards."""
    rows = [
        ("the policy" if commit == "policy" else "vanilla", assessment)
        for commit in grid.commit_kinds
        for assessment in assess_policies(grid, commit)
    ]

    def decoding(row: tuple[str, PolicyAssessment]) -> str:
        outcome = row[1].point.outcome
        return f"{outcome['moved_decoding'] / max(1, outcome['moved']):.0%}"

    return make_table(
        f"{grid.main} in memory, {grid.baseline_precision}: accuracy against bytes for both kinds "
        "of commits. Saved: of vanilla's bytes, by a bootstrap over answers. p is McNemar's, "
        "exact, adjusted within each kind (Holm); the interval of the change is Tango's. "
        "In decoding: the share of the bytes that decoding forwards move.",
        rows,
        {
            "policy": "{0[1].point.policy}",
            "commits by": "{0[0]}",
            "n": "{0[1].point.run[items]}",
            "accuracy": "{0[1].point.result.accuracy:.1%}",
            "change, 95 %": lambda row: change_text(row[1].change),
            "p": lambda row: format_p(row[1].change.p, bare=True),
            "bytes per answer": lambda row: decimal_bytes(row[1].point.bytes),
            "saved, 95 %": lambda row: format_ratio(row[1].saved),
            "in decoding": decoding,
            "forwards against vanilla": lambda row: "{:.2f}, {:.2f} to {:.2f}".format(
                *row[1].point.run["to_vanilla"]
            ),
        },
        text_columns=2,
    )


def paired_table(grid: ResultGrid, name: str) -> Table:
    """Policies at the main share in low precision against 16 bits, with the change by task."""
    rows = match_precisions(grid, grid.main_points(), name)

    def first(row: tuple[CachePoint, CachePoint, PairedChange]) -> str:
        return f"{restrict_to(row[0].result, row[1].result).accuracy:.1%}"

    def ratio(value: RatioWithInterval | None) -> str:
        return "" if value is None else "{:.3f}, {:.3f} to {:.3f}".format(*value)

    return make_table(
        f"{name} against {grid.baseline_precision} under the same policy, {grid.main} in memory, "
        "on the same problems: accuracy, and the ratios of bytes and forwards (bootstrap over "
        "answers). p is McNemar's, exact, adjusted for all rows (Holm).",
        rows,
        {
            "policy": "{0[0].policy}",
            "n": "{0[1].run[items]}",
            grid.baseline_precision: first,
            name: "{0[1].result.accuracy:.1%}",
            "change, 95 %": lambda row: change_text(row[2]),
            "p": lambda row: format_p(row[2].p, bare=True),
            "bytes": lambda row: ratio(row[1].outcome["to_whole"]),
            "forwards": lambda row: ratio(row[1].run["to_whole"]),
            **{
                task: lambda row, task=task: task_difference(row[0], row[1], task)
                for task in (rows[0][1].result.right if rows else ())
            },
        },
    )


def change_text(change: PairedChange) -> str:
    low, high = change.interval
    return f"{change.paired.difference:+.1%}, {low:+.1%} to {high:+.1%}"


def format_ratio(ratio: RatioWithInterval) -> str:
    return format_interval(ratio[0], ratio[1:], ".1%")
