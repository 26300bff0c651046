"""What the record of experts that do not fit comes to: tables, and both questions answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.lab.evals.stats import PairedDifference, holm_adjust, paired_difference
from coterie.lab.study.experiment import Finding, Table, Verdict
from coterie.lab.study.experts_facts import (
    LINKS,
    CachePoint,
    RatioWithInterval,
    ResultGrid,
    restrict_to,
)
from coterie.lab.study.paired import SIGNIFICANCE_LEVEL, format_p
from coterie.lab.study.results import VariantResult
from coterie.lab.study.table import format_bytes

MAX_ACCURACY_LOSS = 0.01  # of the answers: what "keeps accuracy" allows, at the interval's end
MIN_BYTES_SAVED = 0.5  # of the bytes: what a rule with residents preferred is to save
MAX_FORWARD_RATIO = (
    1.1  # times the forwards: what keeping their number allows, at the interval's end
)
CACHING_CLAIM = "Expert caching can cut what is moved and keep accuracy and the number of forwards."
HALF_BYTES_CLAIM = (
    "At 35 % of the experts in memory, a coreset rule that prefers residents moves at least 50 % "
    "fewer bytes than vanilla with LRU and stays within a point of its accuracy."
)
LOW_PRECISION_CLAIM = (
    "Experts in {name} move fewer bytes than in 16 bits and stay within a point of accuracy."
)


@dataclass(frozen=True)
class PairedChange:
    """Right answers of one arm against another's, ``p`` raised for those tested beside it."""

    paired: PairedDifference
    p: float
    interval: tuple[float, float]

    @property
    def keeps_accuracy(self) -> bool:
        """Whether no more than ``WITHIN`` is lost, by the whole interval."""
        return self.interval[0] >= -MAX_ACCURACY_LOSS

    @property
    def is_worse(self) -> bool:
        return self.p < SIGNIFICANCE_LEVEL and self.paired.difference < 0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.paired.difference:+.1%} ({low:+.1%} to {high:+.1%}, {format_p(self.p)})"


def paired_changes(pairs: Sequence[tuple[VariantResult, VariantResult]]) -> list[PairedChange]:
    """The second of each against the first, on the same items; tested together."""
    tests = [
        paired_difference(first.correct_flags(), second.correct_flags()) for first, second in pairs
    ]
    adjusted = holm_adjust([test.p_value for test in tests])
    return [
        PairedChange(test, p, test.score_interval) for test, p in zip(tests, adjusted, strict=True)
    ]


def cache_findings(data: Mapping[str, object]) -> list[Finding | str]:
    """Both questions, and what each answer rests on."""
    grid = ResultGrid.from_data(data)
    vanilla = next(point for point in grid.points if point.policy == "vanilla")
    if not vanilla.result.accuracy:
        text = "Vanilla itself answers nothing right: there is no accuracy to keep."
        inconclusive = Finding(text, CACHING_CLAIM, "cannot be told here")
        return [
            cache_only_sentence(grid),
            inconclusive,
            *same_memory_sentences(grid),
            definitions_text(grid),
        ]
    caching = [
        finding for commit in commit_kinds(grid) for finding in caching_findings(grid, commit)
    ]
    names = [entry["name"] for entry in grid.record["precisions"][1:]]
    coarse = [finding for name in names for finding in low_precision_findings(grid, name)]
    skipped = [
        f"{entry['name']} was not measured: {entry['why']}" for entry in grid.record["left_out"]
    ]
    return [
        cache_only_sentence(grid),
        *caching,
        *coarse,
        *same_memory_sentences(grid),
        *skipped,
        definitions_text(grid),
    ]


def commit_kinds(grid: ResultGrid) -> list[str]:
    """Both kinds, where blocks are committed apart."""
    return ["policy", "vanilla"] if grid.record["commits"] else ["policy"]


def cache_only_sentence(grid: ResultGrid) -> str:
    """A cache and nothing else: the same answers."""
    sentences = [
        f"{point.hit_rate:.0%} with {format_share(point.outcome['share'])} in memory"
        for point in grid.select(grid.baseline_precision)
        if point.policy == "vanilla"
    ]
    return (
        "A cache alone changes no answer, for the same experts are computed; of those that vanilla "
        f"uses it finds {', '.join(sentences)} (LRU, {grid.baseline_precision})."
    )


def caching_findings(grid: ResultGrid, commit: str) -> list[Finding]:
    """Question 1, and the bar of half the bytes, under one kind of commits."""
    assessments = assess_policies(grid, commit)
    commit_text = ""
    if grid.record["commits"]:
        commit_text = f" With commits by {'the policy' if commit == 'policy' else 'vanilla'}:"
    if not assessments:
        return [
            Finding(
                f"No policy was run at this share.{commit_text}",
                CACHING_CLAIM,
                "cannot be told here",
            )
        ]
    accurate = [assessment for assessment in assessments if assessment.change.keeps_accuracy]
    text = (
        f"{format_share(grid.record['main'])} of the experts in memory, {grid.baseline_precision}.{commit_text} "
        f"{len(accurate)} of {len(assessments)} policies stay within a point of vanilla by their whole "
        "interval. "
    )
    best = max(
        accurate or assessments,
        key=lambda one: one.saved[0] if accurate else one.change.interval[0],
    )
    text += f"{'Of these, least is moved by' if accurate else 'The nearest is'} {best}"
    resident = [assessment for assessment in assessments if assessment.point.run["looks"]]
    return [
        Finding(text, CACHING_CLAIM, verdict_on_caching(assessments)),
        Finding(resident_policies_sentence(resident), HALF_BYTES_CLAIM, verdict_on_half(resident)),
    ]


@dataclass(frozen=True)
class PolicyAssessment:
    """A policy against vanilla in a memory of the same size."""

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
            f"{self.point.policy}: {format_ratio(self.saved)} of vanilla's bytes saved, "
            f"{self.point.result.accuracy:.1%} of {self.point.run['items']} right, "
            f"{self.change} against vanilla; {ratio:.2f} times the forwards ({low:.2f} to "
            f"{high:.2f}); predicted over {name} ({link}): {ms:.3g} ms an answer in place of "
            f"{vanilla_ms:.3g}."
        )


def assess_policies(grid: ResultGrid, commit: str) -> list[PolicyAssessment]:
    """Every policy at the main share but vanilla, tested together."""
    main = grid.select(grid.baseline_precision, grid.record["main"], commit)
    saving = [(point, saved) for point in main[1:] if (saved := point.saved) is not None]
    tests = paired_changes([(point.vanilla, point.result) for point, _ in saving])
    return [
        PolicyAssessment(point, main[0], change, saved)
        for (point, saved), change in zip(saving, tests, strict=True)
    ]


def verdict_on_caching(assessments: Sequence[PolicyAssessment]) -> Verdict:
    """One that moves less, beyond its interval, and keeps the rest, is enough."""
    fewer = [assessment for assessment in assessments if assessment.saved[1] > 0]
    if any(assessment.change.keeps_accuracy and assessment.keeps_forwards for assessment in fewer):
        return "holds"
    all_worse = all(
        assessment.change.is_worse or assessment.point.run["to_vanilla"][1] > MAX_FORWARD_RATIO
        for assessment in fewer
    )
    return "does not hold" if all_worse else "cannot be told here"


def verdict_on_half(resident: Sequence[PolicyAssessment]) -> Verdict:
    if any(
        assessment.change.keeps_accuracy and assessment.saved[1] >= MIN_BYTES_SAVED
        for assessment in resident
    ):
        return "holds"
    undecided = [
        assessment
        for assessment in resident
        if not assessment.change.is_worse and assessment.saved[2] >= MIN_BYTES_SAVED
    ]
    return "cannot be told here" if undecided or not resident else "does not hold"


def resident_policies_sentence(resident: Sequence[PolicyAssessment]) -> str:
    """Those that are told who is in memory, most saved first."""
    if not resident:
        return "No policy that prefers residents was run at this share."
    ordered = sorted(resident, key=lambda one: -one.saved[0])
    text = "; ".join(
        f"{assessment.point.policy} saves {format_ratio(assessment.saved)} at {assessment.change}"
        for assessment in ordered
    )
    return f"Rules that prefer residents, n = {resident[0].point.run['items']}: {text}."


def low_precision_findings(grid: ResultGrid, name: str) -> list[Finding]:
    """Question 2, of vanilla and of the rule that saves most and keeps accuracy in 16 bits."""
    claim = LOW_PRECISION_CLAIM.format(name=name)
    accurate = [
        assessment
        for assessment in assess_policies(grid, "policy")
        if assessment.change.keeps_accuracy and assessment.keeps_forwards
    ]
    best = max(accurate, key=lambda one: one.saved[0], default=None)
    main = grid.select(grid.baseline_precision, grid.record["main"])
    selected = [*main[:1], *([] if best is None else [best.point])]
    pairs = [(point, grid.counterpart(point, name)) for point in selected]
    matches = [(before, after) for before, after in pairs if after is not None]
    tests = paired_changes([(restrict_to(a.result, b.result), b.result) for a, b in matches])
    return [
        low_precision_finding(before, after, change, claim)
        for (before, after), change in zip(matches, tests, strict=True)
    ]


def low_precision_finding(
    before: CachePoint, after: CachePoint, change: PairedChange, claim: str
) -> Finding:
    bytes_ratio = after.outcome["to_whole"]
    bytes_ = (
        ""
        if bytes_ratio is None
        else f"{bytes_ratio[0]:.2f} times the bytes ({bytes_ratio[1]:.2f} to {bytes_ratio[2]:.2f}), "
    )
    forward_ratio, low, high = after.run["to_whole"] or [1.0, 1.0, 1.0]
    first = restrict_to(before.result, after.result)
    tasks = ", ".join(f"{t} {task_difference(first, after.result, t)}" for t in after.result.right)
    text = (
        f"{before.policy}, {after.run['precision']} against {before.run['precision']}, "
        f"{format_share(after.outcome['share'])} in memory: {bytes_}{forward_ratio:.2f} times the forwards "
        f"({low:.2f} to {high:.2f}), {after.result.accuracy:.1%} of {after.run['items']} right, "
        f"{change}; by task {tasks}."
    )
    moves_fewer = bytes_ratio is not None and bytes_ratio[2] < 1
    if change.keeps_accuracy and moves_fewer:
        return Finding(text, claim, "holds")
    return Finding(
        text,
        claim,
        "does not hold" if change.is_worse or not moves_fewer else "cannot be told here",
    )


def task_difference(first: VariantResult, second: VariantResult, task: str) -> str:
    """The difference; nothing where so few questions were asked that none was of this task."""
    if task not in second.right:
        return ""
    return f"{paired_difference(first.correct_flags(task), second.correct_flags(task)).difference:+.1%}"


def same_memory_sentences(grid: ResultGrid) -> list[str]:
    """What the same bytes of memory hold in fewer bits."""
    sentences = []
    sizes = {entry["name"]: entry["expert_bytes"] for entry in grid.record["precisions"]}
    for name in list(sizes)[1:]:
        low_points = [p for p in grid.select(name, "50%") if p.policy == "vanilla"]
        base_points = [
            p for p in grid.select(grid.baseline_precision, "25%") if p.policy == "vanilla"
        ]
        for low, base in zip(low_points, base_points, strict=False):
            layer_bytes = [p.outcome["slots"] * sizes[p.run["precision"]] for p in (base, low)]
            sentences.append(
                f"Vanilla in {format_bytes(layer_bytes[0])} a layer (25 % in {grid.baseline_precision}) moves "
                f"{format_bytes(base.bytes)} an answer, in {format_bytes(layer_bytes[1])} (50 % in {name}) "
                f"{format_bytes(low.bytes)}."
            )
    return sentences


def definitions_text(grid: ResultGrid) -> str:
    """What was counted, and what was not."""
    tasks = {task for point in grid.points for task in point.result.right}
    task_note = (
        " On the model in the package its own words and docstring problems stand in for GSM8K and "
        "HumanEval."
        if {"words", "docstring"} <= tasks
        else ""
    )
    first = grid.record["precisions"][0]
    return (
        f"All but the experts is in {first['dtype']} in every precision. Memories are imagined: "
        "book is kept of real runs, one answer after the other, tasks in turn, a memory living on "
        "from answer to answer; LRU (`results/replay-drawn-mini.json` has other rules). Bytes are "
        "of all forwards, those for the prompt and those that commit among them. No throughput was "
        "measured: forwards were, and milliseconds are predicted by the replay's clock, bytes over "
        "the link's rate with computing taken as free (`results/offload-on-a-cpu.json` says how "
        "far that clock was off where a disk was the link). Every policy is judged by its own "
        "interval, and one that keeps it is enough; p is corrected for their number in the "
        f"sentences above (Holm), not in the tables.{task_note}"
    )


def cache_tables(data: Mapping[str, object]) -> list[Table]:
    """One for each precision; commits side by side; precisions paired."""
    grid = ResultGrid.from_data(data)
    precision_tables = [precision_table(grid, entry["name"]) for entry in grid.record["precisions"]]
    if grid.record["commits"]:
        precision_tables.append(commit_table(grid))
    return [
        *precision_tables,
        *(paired_table(grid, entry["name"]) for entry in grid.record["precisions"][1:]),
    ]


def precision_table(grid: ResultGrid, name: str) -> Table:
    """Policy x share."""
    links = [f"ms by {link}" for link in LINKS]
    heads = ["policy", "in memory", "n", "right, 95 %", "change", "p", "hits", "an answer moves",
             "saved", "forwards", *links]  # fmt: skip
    rows, last_policy = [], ""
    for point in sort_by_policy(grid.select(name)):
        repeated = point.policy == last_policy and not point.run["looks"]
        rows.append(policy_row(point, repeated=repeated, links=list(LINKS)))
        last_policy = point.policy
    size = next(p["expert_bytes"] for p in grid.record["precisions"] if p["name"] == name)
    commits = ", commits by the policy" if grid.record["commits"] else ""
    return Table(
        heads,
        rows,
        f"Experts in {name} ({format_bytes(size)} each){commits}. A policy that does not ask who is in "
        "memory answers the same in each: its accuracy stands once. Saved: of vanilla's bytes in "
        "the same memory. p is McNemar's, exact. Milliseconds of an answer are predicted.",
        numbers=range(2, len(heads)),
    )


def sort_by_policy(points: Sequence[CachePoint]) -> list[CachePoint]:
    """Policy by policy, from the largest memory to the smallest."""
    order = list(dict.fromkeys(point.policy for point in points))
    return sorted(points, key=lambda p: (order.index(p.policy), -p.outcome["slots"]))


def policy_row(point: CachePoint, *, repeated: bool, links: Sequence[str]) -> list[str]:
    share = point.result.accuracy_share()
    low, high = share.interval
    is_vanilla = point.policy == "vanilla"
    change = paired_difference(point.vanilla.correct_flags(), point.result.correct_flags())
    answers = ["", "", "", ""] if repeated else [
        str(share.n),
        f"{share.value:.1%}, {low:.1%} to {high:.1%}",
        "" if is_vanilla else f"{change.difference:+.1%}",
        "" if is_vanilla else format_p(change.p_value, bare=True),
    ]  # fmt: skip
    return [
        "" if repeated else point.policy,
        format_share(point.outcome["share"]),
        *answers,
        f"{point.hit_rate:.1%}",
        format_bytes(point.bytes),
        "" if point.saved is None else f"{point.saved[0]:.1%}",
        "" if repeated else f"{point.result.forwards_per_block:.2f}",
        *(f"{point.outcome['ms'][link]:.3g}" for link in links),
    ]


def commit_table(grid: ResultGrid) -> Table:
    """Every policy at the main share, by who routes the forwards that commit."""
    heads = ["policy", "commits by", "n", "right", "change, 95 %", "p", "an answer moves",
             "saved, 95 %", "in decoding", "forwards against vanilla"]  # fmt: skip
    rows = []
    for commit in commit_kinds(grid):
        for assessment in assess_policies(grid, commit):
            run, change = assessment.point.run, assessment.change
            low, high = change.interval
            decoding = assessment.point.outcome["moved_decoding"] / max(
                1, assessment.point.outcome["moved"]
            )
            rows.append([
                assessment.point.policy, "the policy" if commit == "policy" else "vanilla",
                str(run["items"]), f"{assessment.point.result.accuracy:.1%}",
                f"{change.paired.difference:+.1%}, {low:+.1%} to {high:+.1%}",
                format_p(change.p, bare=True), format_bytes(assessment.point.bytes), format_ratio(assessment.saved),
                f"{decoding:.0%}", "{:.2f}, {:.2f} to {:.2f}".format(*run["to_vanilla"]),
            ])  # fmt: skip
    return Table(
        heads,
        rows,
        f"{format_share(grid.record['main'])} in memory, {grid.baseline_precision}: accuracy against bytes for "
        "both kinds of commits. Saved is of vanilla's bytes, by a bootstrap over answers; p is "
        "McNemar's, exact, raised for those of the same kind (Holm); the change's interval is "
        "Tango's. In decoding: which part of the bytes decoding forwards move.",
        numbers=range(2, len(heads)),
    )


def paired_table(grid: ResultGrid, name: str) -> Table:
    """One policy and memory a row, in few bits against 16, task by task."""
    matches = [
        (before, after)
        for before in grid.select(grid.baseline_precision, grid.record["main"])
        for after in [grid.counterpart(before, name)]
        if after is not None
    ]
    tasks = list(matches[0][1].result.right) if matches else []
    heads = [
        "policy",
        "n",
        grid.baseline_precision,
        name,
        "change, 95 %",
        "p",
        "bytes",
        "forwards",
        *tasks,
    ]
    tests = paired_changes([(restrict_to(a.result, b.result), b.result) for a, b in matches])
    rows = []
    for (before, after), change in zip(matches, tests, strict=True):
        first, bytes_ratio, forward_ratio = (
            restrict_to(before.result, after.result),
            after.outcome["to_whole"],
            after.run["to_whole"],
        )
        low, high = change.interval
        rows.append([
            before.policy, str(after.run["items"]), f"{first.accuracy:.1%}",
            f"{after.result.accuracy:.1%}",
            f"{change.paired.difference:+.1%}, {low:+.1%} to {high:+.1%}",
            format_p(change.p, bare=True),
            "" if bytes_ratio is None else "{:.3f}, {:.3f} to {:.3f}".format(*bytes_ratio),
            "" if forward_ratio is None else "{:.3f}, {:.3f} to {:.3f}".format(*forward_ratio),
            *(task_difference(first, after.result, task) for task in tasks),
        ])  # fmt: skip
    return Table(
        heads,
        rows,
        f"{name} against {grid.baseline_precision} under the same policy, {format_share(grid.record['main'])} in "
        "memory, on the same questions: right answers, and how many times the bytes and forwards "
        "(bootstrap over answers). p is McNemar's, exact, raised for all rows (Holm).",
        numbers=range(1, len(heads)),
    )


def format_share(share: str) -> str:
    """ "35%" as prose has it."""
    return share.replace("%", " %")


def format_ratio(ratio: RatioWithInterval) -> str:
    value, low, high = ratio
    return f"{value:.1%} ({low:.1%} to {high:.1%})"
