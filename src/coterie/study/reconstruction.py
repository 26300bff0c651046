"""Top-K recall and reconstruction loss against the size of the coreset (Fig. 4 right)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from coterie.figures.style import axes, ink, legend, look, percent
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.fidelity import Gap, Reading, compared, gaps, readings, traced
from coterie.study.lab import Lab

SHARES = (
    *("0.03125", "0.0625", "0.1", "0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.45", "0.5"),
    *("0.6", "0.75", "1.0"),
)
FEWER = ("0.0625", "0.15", "0.3", "0.5", "0.75")
SEQ, VOTE, GUARDED, LOT, TOPK = "DES-Seq", "DES-Vote", "words vote, top-1", "random", "top-k"
OURS = "proportional"
JUDGED = ("recall", "word_recall", "loss", "word_loss")
HEADS = (
    *("policy", "experts", "votes kept", "recall", "of words"),
    *("loss", "of words", "of words still masked"),
)
NAMES: Mapping[str, str] = {
    "recall": "top-K recall",
    "word_recall": "top-K recall, words only",
    "loss": "reconstruction loss",
    "word_loss": "reconstruction loss, words only",
    "open_loss": "reconstruction loss, words still masked",
}


class Curve(TypedDict):
    """Policies of one family, one a size."""

    name: str
    readings: list[Reading]


class Found(TypedDict):
    """``against`` holds, by figure, DES-Seq's policies less DES-Vote's curve at their own size;
    ``control`` the same for the random control."""

    experts: int
    k: int
    prompts: int
    looks: int
    layers: list[int]
    curves: list[Curve]
    against: dict[str, list[Gap]]
    guarded: dict[str, list[Gap]]
    ours: dict[str, list[Gap]]
    control: dict[str, list[Gap]]


@dataclass(frozen=True)
class Reconstruction:
    """Every policy routes what vanilla's gates read, and its layer's output is held against
    vanilla's: nothing that it would have changed before can add up."""

    name: str = "reconstruction"
    title: str = "Top-K recall and reconstruction loss against coreset size (Fig. 4 right)"
    question: str = (
        "With so many experts to choose from, how many of its own does a token keep, and how far "
        "is the layer's output from what it would have been?"
    )

    def measure(self, lab: Lab) -> Facts:
        spec = lab.engine.model.spec
        trace = traced(lab)
        families = policies(spec.router.k)
        every = [policy for family in families.values() for policy in family]
        lab.tell(0.02, f"{len(every)} policies on {len(trace.prompts)} prompts")
        tally = compared(lab, trace, every, lambda share: lab.tell(0.02 + 0.95 * share, "routing"))
        by_policy = dict(zip(every, readings(tally), strict=True))
        seq, vote = families[SEQ][:-1], families[VOTE]

        def against(these: Sequence[str]) -> dict[str, list[Gap]]:
            return {figure: gaps(tally, these, vote, figure) for figure in JUDGED}

        found = Found(
            experts=spec.router.experts,
            k=spec.router.k,
            prompts=len(trace.prompts),
            looks=trace.looks,
            layers=list(trace.layers),
            curves=[
                Curve(name=name, readings=[by_policy[policy] for policy in family])
                for name, family in families.items()
            ],
            against=against(seq),
            guarded=against(families[GUARDED]),
            ours=against(families[OURS]),
            control=against(families[LOT]),
        )
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        where = f"{found['prompts']} prompts, layers {', '.join(map(str, found['layers']))}"
        return [
            Drawing(
                "recall",
                "Share of every token's own experts that it keeps, against unique experts really "
                f"used. Bars: 95 % interval over prompts. {where}.",
                lambda: draw(found, "recall"),
            ),
            Drawing(
                "reconstruction-loss",
                "Squared distance of the layer's output to vanilla's, relative to vanilla's square "
                "(logarithmic), on the same input, over all positions of the block.",
                lambda: draw(found, "loss"),
            ),
            Drawing(
                "reconstruction-loss-words",
                "The same over the positions of the answer only: without the prompt's part of the "
                "block, and without the fill behind the end-of-text.",
                lambda: draw(found, "word_loss"),
            ),
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        return [
            Table(
                heads=HEADS,
                rows=[row(reading) for curve in found["curves"] for reading in curve["readings"]],
                caption=f"On {found['looks']} looks (a row in a layer in a forward) at vanilla's "
                f"decoding; {found['experts']} experts, {found['k']} a token.",
                numbers=list(range(1, len(HEADS))),
            ),
            Table(
                heads=["DES-Seq", "experts", *(NAMES[figure] for figure in JUDGED)],
                rows=versus_rows(found["against"]),
                caption="DES-Seq less DES-Vote at the same number of experts, with 95 % intervals "
                "over prompts. Between measured sizes DES-Vote's curve is taken as straight.",
                numbers=[1, 2, 3, 4, 5],
            ),
        ]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        return [
            _control(found),
            _verdict(
                found,
                "recall",
                "Vote keeps a higher top-K recall than Seq at the same coreset size.",
                " A set of the most wanted experts nearly maximises recall by its definition.",
            ),
            _verdict(
                found, "loss", "Vote has a lower reconstruction loss than Seq at the same size."
            ),
            _words(found),
            _beside_plain(found["guarded"], "With only words voting and top-1 kept"),
            _beside_plain(found["ours"], "Elected in proportion (`proportional-vote`)"),
        ]


def policies(k: int) -> dict[str, list[str]]:
    """By family, the smallest coreset first."""
    return {
        VOTE: [f"des-vote:beta={share}" for share in SHARES],
        SEQ: [f"des-seq:k={m}" for m in range(1, k + 1)],
        OURS: [f"proportional-vote:beta={share}" for share in FEWER],
        GUARDED: [f"des-vote:beta={share},voters=before-eos,protect=top1" for share in FEWER],
        TOPK: [f"topk:k={m}" for m in range(1, k)],
        LOT: [f"random:beta={share}" for share in FEWER],
    }


def row(reading: Reading) -> list[str]:
    """A line of the table."""
    shares = [f"{reading[name]:.1%}" for name in ("mass", "recall", "word_recall")]
    losses = [f"{reading[name]:.3f}" for name in ("loss", "word_loss", "open_loss")]
    return [reading["policy"], f"{reading['experts']:.1f}", *shares, *losses]


def versus_rows(against: Mapping[str, Sequence[Gap]]) -> list[list[str]]:
    """A line a policy: what it has more than the curve, figure by figure."""
    by_policy: dict[str, list[str]] = {}
    for gaps_of_figure in against.values():
        for gap in gaps_of_figure:
            line = by_policy.setdefault(gap["policy"], [gap["policy"], f"{gap['experts']:.1f}"])
            low, high = gap["interval"]
            line.append(f"{gap['gap']:+.3f} ({low:+.3f} to {high:+.3f})")
    return list(by_policy.values())


def better(gap: Gap, figure: str) -> int:
    """1 where the policy beats the curve beyond the interval, -1 where it loses, else 0."""
    sign = -1 if figure.endswith("loss") else 1
    low, high = sorted(sign * end for end in gap["interval"])
    return int(low > 0) - int(high < 0)


def draw(found: Found, figure: str) -> Figure:
    """One figure against unique experts, a line a family."""
    drawn, one = axes(f"unique experts of {found['experts']}", NAMES[figure])
    for curve in found["curves"]:
        points = [r for r in curve["readings"] if not figure.endswith("loss") or r[figure] > 0]
        dress = look(points[0]["policy"])
        heights = [reading[figure] for reading in points]
        ends = [reading.get(f"{figure}_interval") for reading in points]
        errors = None
        if all(end is not None for end in ends):
            pairs = [cast("list[float]", end) for end in ends]
            errors = [
                [max(0.0, h - low) for h, (low, _) in zip(heights, pairs, strict=True)],
                [max(0.0, high - h) for h, (_, high) in zip(heights, pairs, strict=True)],
            ]
        one.errorbar(
            [reading["experts"] for reading in points],
            heights,
            yerr=errors,
            color=dress.colour,
            marker=dress.marker,
            linestyle=":" if curve["name"] in (LOT, TOPK) else "-",
            elinewidth=0.8,
            label=curve["name"],
        )
    if figure.endswith("loss"):
        log_axis(one)
        one.set_ylim(bottom=1e-3)
    else:
        one.axhline(1.0, color=ink(), linewidth=0.7)
        one.set_ylim(0, 1.03)
        percent(one)
    one.set_xlim(left=0)
    legend(one, columns=3)
    return drawn


def log_axis(one: Axes, axis: Literal["x", "y"] = "y") -> None:
    """In powers, labelled 0.01, 0.02, 0.05, 0.1 ..."""
    (one.set_yscale if axis == "y" else one.set_xscale)("log")
    chosen = one.yaxis if axis == "y" else one.xaxis
    chosen.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    chosen.set_major_formatter(lambda value, _: f"{value:g}")
    chosen.set_minor_formatter(NullFormatter())


def _tallied(gaps_of_figure: Sequence[Gap], figure: str) -> tuple[int, int, int]:
    """In how many sizes the curve is better, worse, and neither beyond its interval."""
    marks = [better(gap, figure) for gap in gaps_of_figure]
    return marks.count(-1), marks.count(1), marks.count(0)


def _verdict(found: Found, figure: str, claim: str, remark: str = "") -> Finding:
    here = found["against"][figure]
    if not here:
        return Finding("No size of DES-Seq lies among DES-Vote's.", claim, "cannot be told here")
    wins, losses, ties = _tallied(here, figure)
    widest = max(here, key=lambda gap: abs(gap["gap"]))
    return Finding(
        f"In {NAMES[figure]}, of {len(here)} sizes, Vote is better than Seq at {wins}, worse at "
        f"{losses}, and not told apart at {ties}. Furthest apart at "
        f"{widest['experts']:.0f} experts: Vote {widest['curve']:.3f}, Seq {widest['value']:.3f}."
        f"{remark}",
        claim,
        "holds" if wins > len(here) / 2 and not losses else "does not hold",
    )


def _words(found: Found) -> str:
    here = found["against"]["word_loss"]
    wins, losses, ties = _tallied(here, "word_loss")
    return (
        f"Over the words of the answer alone, Vote's loss is lower than Seq's at {wins} of "
        f"{len(here)} sizes, higher at {losses}, not told apart at {ties}: where the loss falls "
        "matters as much as how large it is."
    )


def _beside_plain(gaps_of: Mapping[str, Sequence[Gap]], called: str) -> str:
    said = []
    for figure, here in gaps_of.items():
        wins, losses, ties = _tallied(here, figure)
        said.append(f"{NAMES[figure]} better at {losses}, worse at {wins}, alike at {ties}")
    sizes = max(map(len, gaps_of.values()))
    return f"{called}, against plain Vote of the same size ({sizes} sizes): {'; '.join(said)}."


def _control(found: Found) -> Finding:
    here = found["control"]["recall"] + found["control"]["loss"]
    lost = [
        better(gap, figure) < 0 for figure in ("recall", "loss") for gap in found["control"][figure]
    ]
    least = min(found["control"]["recall"], key=lambda gap: abs(gap["gap"]), default=None)
    nearest = (
        ""
        if least is None
        else f" Nearest in recall at {least['experts']:.0f} experts: {least['value']:.3f} "
        f"against {least['curve']:.3f}."
    )
    return Finding(
        f"A random coreset is worse than a voted one of its size in {sum(lost)} of {len(here)} "
        f"comparisons of recall and loss.{nearest}",
        claim="What a block elects is not arbitrary: a voted coreset beats a random one.",
        verdict="holds" if lost and all(lost) else "does not hold",
    )
