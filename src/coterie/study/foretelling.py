"""Which figure of single forwards ranks policies as their accuracy does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, cast

import numpy as np
from matplotlib.figure import Figure

from coterie.figures.style import legend, look, panels, percent
from coterie.naming import CoterieError
from coterie.routing import needs_importance, parse_policy
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.fidelity import FIGURES, SLOW, Tally, compared, resampled, traced
from coterie.study.lab import Lab
from coterie.study.ranks import spearman
from coterie.study.reconstruction import log_axis
from coterie.study.tally import Arms

JUDGED: Mapping[str, str] = {
    "experts": "unique experts",
    "mass": "votes kept",
    "recall": "top-K recall",
    "word_recall": "top-K recall, words",
    "loss": "reconstruction loss",
    "word_loss": "reconstruction loss, words",
    "open_loss": "reconstruction loss, words still masked",
    "cosine": "cosine of the layer's output",
}
TRACES = ("usual", "slow")
DRAWS = 200


class Point(TypedDict):
    """One policy: how many answers it left right, and its figures on the usual forwards."""

    policy: str
    accuracy: float
    figures: dict[str, float]


class Agreement(TypedDict):
    """Rank correlation with accuracy over policies, 1 being the same order (for losses: the
    reverse one); the interval is a bootstrap over the prompts of the figure."""

    rho: float
    interval: list[float]


class Found(TypedDict):
    points: list[Point]
    agreement: dict[str, dict[str, Agreement]]  # trace -> figure


@dataclass(frozen=True)
class Foretelling:
    """Accuracy is that of the chapter on accuracy, of whole answers; the figures come from
    vanilla's forwards alone, which cost seconds."""

    name: str = "foretelling"
    title: str = "What single forwards foretell of accuracy (not in the paper)"
    question: str = (
        "Recall and loss of a layer are cheap to measure, accuracy is not. Does any of them put "
        "policies in the order that their accuracy has?"
    )

    def measure(self, lab: Lab) -> Facts:
        accuracy = _accuracies(lab)
        policies = list(accuracy)
        right = [accuracy[policy] for policy in policies]
        tallies: dict[str, Tally] = {}
        for number, name in enumerate(TRACES):
            # Slow decoding takes many times the forwards: half the prompts will do.
            share = lab.prompts if name == "usual" else -(-lab.prompts // 2)
            trace = traced(replace(lab, prompts=share), slow=name == "slow")

            def tell(done: float, number: int = number, name: str = name) -> None:
                lab.tell((number + done) / len(TRACES), f"{len(policies)} policies, {name}")

            tallies[name] = compared(lab, trace, policies, tell)
        whole = tallies["usual"].sums.sum(dim=1).numpy()
        values = {name: FIGURES[name](whole) for name in JUDGED}
        found = Found(
            points=[
                Point(
                    policy=policy,
                    accuracy=accuracy[policy],
                    figures={name: float(column[place]) for name, column in values.items()},
                )
                for place, policy in enumerate(policies)
            ],
            agreement={
                name: {figure: agreement(tally, figure, right) for figure in JUDGED}
                for name, tally in tallies.items()
            },
        )
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        return [
            Drawing(
                "foretelling",
                "Accuracy of whole answers against two figures of single forwards, a point a "
                "policy.",
                lambda: draw(found),
            )
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        return [
            Table(
                heads=["figure", "usual decoding", f"{SLOW} forwards a block"],
                rows=[
                    [said, *(_told(found["agreement"][name][figure]) for name in TRACES)]
                    for figure, said in JUDGED.items()
                ],
                caption=f"Rank correlation with accuracy over {len(found['points'])} policies, "
                "1 being the same order; 95 % intervals over prompts.",
                numbers=[1, 2],
            )
        ]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        usual = found["agreement"]["usual"]
        best = max(JUDGED, key=lambda figure: usual[figure]["rho"])
        size = usual["experts"]
        return [
            *(_foretold(JUDGED[figure], usual[figure], size) for figure in ("recall", "loss")),
            f"Over {len(found['points'])} policies, nearest to the order of accuracy comes "
            f"{JUDGED[best]}, by {_told(usual[best])}.",
        ]


def agreement(tally: Tally, figure: str, right: Sequence[float]) -> Agreement:
    """Of one figure over policies with the shares of right answers, in the same order."""
    sign = -1.0 if figure.endswith("loss") else 1.0
    drawn = FIGURES[figure](resampled(tally.sums, draws=DRAWS))
    rhos = [sign * spearman(values, right) for values in drawn]
    low, high = np.quantile(rhos, [0.025, 0.975])
    whole = FIGURES[figure](tally.sums.sum(dim=1).numpy())
    return Agreement(rho=sign * spearman(whole, right), interval=[float(low), float(high)])


def draw(found: Found) -> Figure:
    figure, two = panels(2, columns=1, height=2.9)
    for one, name in zip(two, ("recall", "loss"), strict=True):
        for point in found["points"]:
            if name == "loss" and point["figures"][name] <= 0:
                continue
            dress = look(point["policy"])
            one.plot(
                point["figures"][name],
                point["accuracy"],
                color=dress.colour,
                marker=dress.marker,
                linestyle="none",
                label=dress.name,
            )
        one.set(xlabel=JUDGED[name], ylabel="right answers", ylim=(-0.03, 1.03))
        percent(one)
    percent(two[0], axis="x")
    log_axis(two[1], axis="x")
    legend(two[0], columns=3)
    return figure


def _accuracies(lab: Lab) -> dict[str, float]:
    """Of every policy that can be watched, decoding as the model usually does."""
    record = lab.record("accuracy")
    if record is None:
        raise CoterieError("needs the record of the chapter accuracy: ask for both")
    arms = Arms.of(record)
    found = {
        tally.policy: tally.accuracy
        for tally in arms.tallies.values()
        if tally.generation == arms.vanilla.generation
        and not needs_importance(parse_policy(tally.policy))
    }
    if len(found) < 3:
        raise CoterieError("the chapter accuracy has fewer than three policies to put in order")
    return found


def _foretold(said: str, one: Agreement, size: Agreement) -> Finding:
    """Whether a figure orders policies better than the experts that they use do."""
    (low, high), rho = one["interval"], size["rho"]
    return Finding(
        f"{said[0].upper()}{said[1:]} ranks policies as accuracy does by {_told(one)}; counting "
        f"unique experts does by {_told(size)}.",
        claim=f"{said[0].upper()}{said[1:]} tells how well a policy will do (better than its size "
        "does).",
        verdict="holds" if low > rho else "does not hold" if high < rho else "cannot be told here",
    )


def _told(one: Agreement) -> str:
    low, high = one["interval"]
    return f"{one['rho']:.2f} ({low:.2f} to {high:.2f})"
