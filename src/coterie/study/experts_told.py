"""What the record of experts that do not fit comes to: tables, and both questions answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.evals.stats import Paired, holm, paired
from coterie.study.chapter import Finding, Table, Verdict
from coterie.study.duel import LEVEL, p_value
from coterie.study.experts_facts import LINKS, Grid, Point, Ratio, head
from coterie.study.table import readable
from coterie.study.tally import Tally

WITHIN = 0.01  # of the answers: what "keeps accuracy" allows, at the interval's end
HALF = 0.5  # of the bytes: what a rule with residents preferred is to save
SLOWER = 1.1  # times the forwards: what keeping their number allows, at the interval's end
CACHED = "Expert caching can cut what is moved and keep accuracy and the number of forwards."
HALVED = (
    "At 35 % of the experts in memory, a coreset rule that prefers residents moves at least 50 % "
    "fewer bytes than vanilla with LRU and stays within a point of its accuracy."
)
COARSE = "Experts in {name} move fewer bytes than in 16 bits and stay within a point of accuracy."


@dataclass(frozen=True)
class Change:
    """Right answers of one arm against another's, ``p`` raised for those tested beside it."""

    paired: Paired
    p: float
    interval: tuple[float, float]

    @property
    def kept(self) -> bool:
        """Whether no more than ``WITHIN`` is lost, by the whole interval."""
        return self.interval[0] >= -WITHIN

    @property
    def worse(self) -> bool:
        return self.p < LEVEL and self.paired.difference < 0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.paired.difference:+.1%} ({low:+.1%} to {high:+.1%}, {p_value(self.p)})"


def changes(pairs: Sequence[tuple[Tally, Tally]]) -> list[Change]:
    """The second of each against the first, on the same items; tested together."""
    tests = [paired(first.bits(), second.bits()) for first, second in pairs]
    raised = holm([test.p for test in tests])
    return [Change(test, p, test.score_interval) for test, p in zip(tests, raised, strict=True)]


def conclusions(facts: Mapping[str, object]) -> list[Finding | str]:
    """Both questions, and what each answer rests on."""
    grid = Grid.of(facts)
    vanilla = next(point for point in grid.points if point.policy == "vanilla")
    if not vanilla.tally.accuracy:
        text = "Vanilla itself answers nothing right: there is no accuracy to keep."
        nothing = Finding(text, CACHED, "cannot be told here")
        return [alone(grid), nothing, *same_memory(grid), definitions(grid)]
    caching = [finding for commit in commits_of(grid) for finding in cached(grid, commit)]
    names = [one["name"] for one in grid.found["precisions"][1:]]
    coarse = [finding for name in names for finding in few_bits(grid, name)]
    left = [f"{one['name']} was not measured: {one['why']}" for one in grid.found["left_out"]]
    return [alone(grid), *caching, *coarse, *same_memory(grid), *left, definitions(grid)]


def commits_of(grid: Grid) -> list[str]:
    """Both kinds, where blocks are committed apart."""
    return ["policy", "vanilla"] if grid.found["commits"] else ["policy"]


def alone(grid: Grid) -> str:
    """A cache and nothing else: the same answers."""
    told = [
        f"{point.hit_rate:.0%} with {share_said(point.kept['share'])} in memory"
        for point in grid.at(grid.first)
        if point.policy == "vanilla"
    ]
    return (
        "A cache alone changes no answer, for the same experts are computed; of those that vanilla "
        f"uses it finds {', '.join(told)} (LRU, {grid.first})."
    )


def cached(grid: Grid, commit: str) -> list[Finding]:
    """Question 1, and the bar of half the bytes, under one kind of commits."""
    judged = judge(grid, commit)
    how = ""
    if grid.found["commits"]:
        how = f" With commits by {'the policy' if commit == 'policy' else 'vanilla'}:"
    if not judged:
        return [Finding(f"No policy was run at this share.{how}", CACHED, "cannot be told here")]
    keeping = [one for one in judged if one.change.kept]
    text = (
        f"{share_said(grid.found['main'])} of the experts in memory, {grid.first}.{how} "
        f"{len(keeping)} of {len(judged)} policies stay within a point of vanilla by their whole "
        "interval. "
    )
    best = max(
        keeping or judged, key=lambda one: one.saved[0] if keeping else one.change.interval[0]
    )
    text += f"{'Of these, least is moved by' if keeping else 'The nearest is'} {best}"
    looking = [one for one in judged if one.point.run["looks"]]
    return [
        Finding(text, CACHED, verdict_on_caching(judged)),
        Finding(preferring(looking), HALVED, verdict_on_half(looking)),
    ]


@dataclass(frozen=True)
class Judged:
    """A policy against vanilla in a memory of the same size."""

    point: Point
    vanilla: Point
    change: Change
    saved: Ratio

    @property
    def fast(self) -> bool:
        return self.point.run["to_vanilla"][2] <= SLOWER

    def __str__(self) -> str:
        many, low, high = self.point.run["to_vanilla"]
        link, name = next(iter(LINKS.items()))
        ms, before = (one.kept["ms"][link] for one in (self.point, self.vanilla))
        return (
            f"{self.point.policy}: {ratio_said(self.saved)} of vanilla's bytes saved, "
            f"{self.point.tally.accuracy:.1%} of {self.point.run['items']} right, "
            f"{self.change} against vanilla; {many:.2f} times the forwards ({low:.2f} to "
            f"{high:.2f}); predicted over {name} ({link}): {ms:.3g} ms an answer in place of "
            f"{before:.3g}."
        )


def judge(grid: Grid, commit: str) -> list[Judged]:
    """Every policy at the main share but vanilla, tested together."""
    main = grid.at(grid.first, grid.found["main"], commit)
    found = [(point, saved) for point in main[1:] if (saved := point.saved) is not None]
    tested = changes([(point.vanilla, point.tally) for point, _ in found])
    return [
        Judged(point, main[0], change, saved)
        for (point, saved), change in zip(found, tested, strict=True)
    ]


def verdict_on_caching(judged: Sequence[Judged]) -> Verdict:
    """One that moves less, beyond its interval, and keeps the rest, is enough."""
    fewer = [one for one in judged if one.saved[1] > 0]
    if any(one.change.kept and one.fast for one in fewer):
        return "holds"
    lost = all(one.change.worse or one.point.run["to_vanilla"][1] > SLOWER for one in fewer)
    return "does not hold" if lost else "cannot be told here"


def verdict_on_half(looking: Sequence[Judged]) -> Verdict:
    if any(one.change.kept and one.saved[1] >= HALF for one in looking):
        return "holds"
    open_ = [one for one in looking if not one.change.worse and one.saved[2] >= HALF]
    return "cannot be told here" if open_ or not looking else "does not hold"


def preferring(looking: Sequence[Judged]) -> str:
    """Those that are told who is in memory, most saved first."""
    if not looking:
        return "No policy that prefers residents was run at this share."
    order = sorted(looking, key=lambda one: -one.saved[0])
    told = "; ".join(
        f"{one.point.policy} saves {ratio_said(one.saved)} at {one.change}" for one in order
    )
    return f"Rules that prefer residents, n = {looking[0].point.run['items']}: {told}."


def few_bits(grid: Grid, name: str) -> list[Finding]:
    """Question 2, of vanilla and of the rule that saves most and keeps accuracy in 16 bits."""
    claim = COARSE.format(name=name)
    judged = [one for one in judge(grid, "policy") if one.change.kept and one.fast]
    best = max(judged, key=lambda one: one.saved[0], default=None)
    main = grid.at(grid.first, grid.found["main"])
    asked = [*main[:1], *([] if best is None else [best.point])]
    pairs = [(point, grid.like(point, name)) for point in asked]
    met = [(before, after) for before, after in pairs if after is not None]
    tested = changes([(head(a.tally, b.tally), b.tally) for a, b in met])
    return [
        coarser(before, after, change, claim)
        for (before, after), change in zip(met, tested, strict=True)
    ]


def coarser(before: Point, after: Point, change: Change, claim: str) -> Finding:
    to = after.kept["to_whole"]
    bytes_ = "" if to is None else f"{to[0]:.2f} times the bytes ({to[1]:.2f} to {to[2]:.2f}), "
    many, low, high = after.run["to_whole"] or [1.0, 1.0, 1.0]
    first = head(before.tally, after.tally)
    tasks = ", ".join(f"{t} {by_task(first, after.tally, t)}" for t in after.tally.right)
    text = (
        f"{before.policy}, {after.run['precision']} against {before.run['precision']}, "
        f"{share_said(after.kept['share'])} in memory: {bytes_}{many:.2f} times the forwards "
        f"({low:.2f} to {high:.2f}), {after.tally.accuracy:.1%} of {after.run['items']} right, "
        f"{change}; by task {tasks}."
    )
    fewer = to is not None and to[2] < 1
    if change.kept and fewer:
        return Finding(text, claim, "holds")
    return Finding(
        text, claim, "does not hold" if change.worse or not fewer else "cannot be told here"
    )


def by_task(first: Tally, second: Tally, task: str) -> str:
    """The difference; nothing where so few questions were asked that none was of this task."""
    if task not in second.right:
        return ""
    return f"{paired(first.bits(task), second.bits(task)).difference:+.1%}"


def same_memory(grid: Grid) -> list[str]:
    """What the same bytes of memory hold in fewer bits."""
    found = []
    sizes = {one["name"]: one["expert_bytes"] for one in grid.found["precisions"]}
    for name in list(sizes)[1:]:
        here = [p for p in grid.at(name, "50%") if p.policy == "vanilla"]
        there = [p for p in grid.at(grid.first, "25%") if p.policy == "vanilla"]
        for few, whole in zip(here, there, strict=False):
            memory = [p.kept["slots"] * sizes[p.run["precision"]] for p in (whole, few)]
            found.append(
                f"Vanilla in {readable(memory[0])} a layer (25 % in {grid.first}) moves "
                f"{readable(whole.bytes)} an answer, in {readable(memory[1])} (50 % in {name}) "
                f"{readable(few.bytes)}."
            )
    return found


def definitions(grid: Grid) -> str:
    """What was counted, and what was not."""
    tasks = {task for point in grid.points for task in point.tally.right}
    standing = (
        " On the model in the package its own words and docstring problems stand in for GSM8K and "
        "HumanEval."
        if {"words", "docstring"} <= tasks
        else ""
    )
    first = grid.found["precisions"][0]
    return (
        f"All but the experts is in {first['dtype']} in every precision. Memories are imagined: "
        "book is kept of real runs, one answer after the other, tasks in turn, a memory living on "
        "from answer to answer; LRU (`results/replay-drawn-mini.json` has other rules). Bytes are "
        "of all forwards, those for the prompt and those that commit among them. No throughput was "
        "measured: forwards were, and milliseconds are predicted by the replay's clock, bytes over "
        "the link's rate with computing taken as free (`results/offload-on-a-cpu.json` says how "
        "far that clock was off where a disk was the link). Every policy is judged by its own "
        "interval, and one that keeps it is enough; p is corrected for their number in the "
        f"sentences above (Holm), not in the tables.{standing}"
    )


def tables(facts: Mapping[str, object]) -> list[Table]:
    """One for each precision; commits side by side; precisions paired."""
    grid = Grid.of(facts)
    found = [whole_table(grid, one["name"]) for one in grid.found["precisions"]]
    if grid.found["commits"]:
        found.append(commit_table(grid))
    return [*found, *(paired_table(grid, one["name"]) for one in grid.found["precisions"][1:])]


def whole_table(grid: Grid, name: str) -> Table:
    """Policy x share."""
    links = [f"ms by {link}" for link in LINKS]
    heads = ["policy", "in memory", "n", "right, 95 %", "change", "p", "hits", "an answer moves",
             "saved", "forwards", *links]  # fmt: skip
    rows, seen = [], ""
    for point in by_policy(grid.at(name)):
        again = point.policy == seen and not point.run["looks"]
        rows.append(row(point, again=again, links=list(LINKS)))
        seen = point.policy
    size = next(p["expert_bytes"] for p in grid.found["precisions"] if p["name"] == name)
    commits = ", commits by the policy" if grid.found["commits"] else ""
    return Table(
        heads,
        rows,
        f"Experts in {name} ({readable(size)} each){commits}. A policy that does not ask who is in "
        "memory answers the same in each: its accuracy stands once. Saved: of vanilla's bytes in "
        "the same memory. p is McNemar's, exact. Milliseconds of an answer are predicted.",
        numbers=range(2, len(heads)),
    )


def by_policy(points: Sequence[Point]) -> list[Point]:
    """Policy by policy, from the largest memory to the smallest."""
    order = list(dict.fromkeys(point.policy for point in points))
    return sorted(points, key=lambda p: (order.index(p.policy), -p.kept["slots"]))


def row(point: Point, *, again: bool, links: Sequence[str]) -> list[str]:
    share = point.tally.share()
    low, high = share.interval
    plain = point.policy == "vanilla"
    change = paired(point.vanilla.bits(), point.tally.bits())
    answers = ["", "", "", ""] if again else [
        str(share.n),
        f"{share.value:.1%}, {low:.1%} to {high:.1%}",
        "" if plain else f"{change.difference:+.1%}",
        "" if plain else p_value(change.p, bare=True),
    ]  # fmt: skip
    return [
        "" if again else point.policy,
        share_said(point.kept["share"]),
        *answers,
        f"{point.hit_rate:.1%}",
        readable(point.bytes),
        "" if point.saved is None else f"{point.saved[0]:.1%}",
        "" if again else f"{point.tally.forwards_per_block:.2f}",
        *(f"{point.kept['ms'][link]:.3g}" for link in links),
    ]


def commit_table(grid: Grid) -> Table:
    """Every policy at the main share, by who routes the forwards that commit."""
    heads = ["policy", "commits by", "n", "right", "change, 95 %", "p", "an answer moves",
             "saved, 95 %", "in decoding", "forwards against vanilla"]  # fmt: skip
    rows = []
    for commit in commits_of(grid):
        for one in judge(grid, commit):
            run, change = one.point.run, one.change
            low, high = change.interval
            decoding = one.point.kept["moved_decoding"] / max(1, one.point.kept["moved"])
            rows.append([
                one.point.policy, "the policy" if commit == "policy" else "vanilla",
                str(run["items"]), f"{one.point.tally.accuracy:.1%}",
                f"{change.paired.difference:+.1%}, {low:+.1%} to {high:+.1%}",
                p_value(change.p, bare=True), readable(one.point.bytes), ratio_said(one.saved),
                f"{decoding:.0%}", "{:.2f}, {:.2f} to {:.2f}".format(*run["to_vanilla"]),
            ])  # fmt: skip
    return Table(
        heads,
        rows,
        f"{share_said(grid.found['main'])} in memory, {grid.first}: accuracy against bytes for "
        "both kinds of commits. Saved is of vanilla's bytes, by a bootstrap over answers; p is "
        "McNemar's, exact, raised for those of the same kind (Holm); the change's interval is "
        "Tango's. In decoding: which part of the bytes decoding forwards move.",
        numbers=range(2, len(heads)),
    )


def paired_table(grid: Grid, name: str) -> Table:
    """One policy and memory a row, in few bits against 16, task by task."""
    met = [
        (before, after)
        for before in grid.at(grid.first, grid.found["main"])
        for after in [grid.like(before, name)]
        if after is not None
    ]
    tasks = list(met[0][1].tally.right) if met else []
    heads = ["policy", "n", grid.first, name, "change, 95 %", "p", "bytes", "forwards", *tasks]
    tested = changes([(head(a.tally, b.tally), b.tally) for a, b in met])
    rows = []
    for (before, after), change in zip(met, tested, strict=True):
        first, to, many = (
            head(before.tally, after.tally),
            after.kept["to_whole"],
            after.run["to_whole"],
        )
        low, high = change.interval
        rows.append([
            before.policy, str(after.run["items"]), f"{first.accuracy:.1%}",
            f"{after.tally.accuracy:.1%}",
            f"{change.paired.difference:+.1%}, {low:+.1%} to {high:+.1%}",
            p_value(change.p, bare=True),
            "" if to is None else "{:.3f}, {:.3f} to {:.3f}".format(*to),
            "" if many is None else "{:.3f}, {:.3f} to {:.3f}".format(*many),
            *(by_task(first, after.tally, task) for task in tasks),
        ])  # fmt: skip
    return Table(
        heads,
        rows,
        f"{name} against {grid.first} under the same policy, {share_said(grid.found['main'])} in "
        "memory, on the same questions: right answers, and how many times the bytes and forwards "
        "(bootstrap over answers). p is McNemar's, exact, raised for all rows (Holm).",
        numbers=range(1, len(heads)),
    )


def share_said(share: str) -> str:
    """ "35%" as prose has it."""
    return share.replace("%", " %")


def ratio_said(found: Ratio) -> str:
    value, low, high = found
    return f"{value:.1%} ({low:.1%} to {high:.1%})"
