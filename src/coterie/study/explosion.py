"""The expert explosion (Fig. 1a): how many experts a block asks for as it grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor

from coterie.engine.watch import Watched, watch
from coterie.figures.style import axes, colour, ink, legend, look
from coterie.naming import CoterieError
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.lab import Lab
from coterie.telemetry import figures

BLOCKS = (8, 16, 24, 32, 48, 64)
VANILLA = "vanilla"
POLICIES = (VANILLA, "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
STEPS = 32  # of the slow decoding that passes every count of masks
DASHES = ("-", (0, (1, 1.5)), (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)))


class Point(TypedDict):
    """Unique experts of the forwards at one block size: quartiles over forwards of the mean over
    layers, and each layer's mean over forwards."""

    block: int
    forwards: int
    mean: float
    low: float
    high: float
    layers: list[float]


class Curve(TypedDict):
    """One policy; ``budget`` is the size of its coreset where it has a fixed one."""

    policy: str
    budget: int | None
    points: list[Point]


class Masked(TypedDict):
    """Vanilla forwards of the usual block with about so many positions still masked."""

    masked: float
    forwards: int
    mean: float


class Found(TypedDict):
    """``skipped`` says in sentences what could not be run."""

    experts: int
    k: int
    usual: int
    prompts: int
    layers: list[int]
    curves: list[Curve]
    masked: list[Masked]
    skipped: list[str]


@dataclass(frozen=True)
class Explosion:
    """Real prompts through the engine, block size by block size, every decoding forward counted."""

    name: str = "explosion"
    title: str = "The expert explosion (Fig. 1a)"
    question: str = (
        "A block of words is computed together, and each word asks for its own experts. "
        "How many different experts does the whole block ask for, as blocks grow?"
    )

    blocks: Sequence[int] = BLOCKS

    def measure(self, lab: Lab) -> Facts:
        prompts = lab.questions()
        curves: dict[str, list[Point]] = {policy: [] for policy in POLICIES}
        skipped: dict[int, str] = {}
        runs = [(block, policy) for block in self.blocks for policy in POLICIES]
        for number, (block, policy) in enumerate(runs):
            lab.tell(number / (len(runs) + 1), f"blocks of {block}, {policy}")
            if block in skipped:
                continue
            try:
                counts = _counted(lab, prompts, policy, block=block)
            except CoterieError as error:
                skipped[block] = f"Blocks of {block} were left out: {error}."
                continue
            curves[policy].append(point(block, counts.per_layer))
        lab.tell(len(runs) / (len(runs) + 1), "one word at a time")
        spec, usual = lab.engine.model.spec, lab.engine.generation.block
        slow = _counted(
            lab,
            prompts[: -(-len(prompts) // 2)],
            VANILLA,
            block=usual,
            unmask=f"fixed:steps={STEPS}",
        )
        found = Found(
            experts=spec.router.experts,
            k=spec.router.k,
            usual=usual,
            prompts=len(prompts),
            layers=list(spec.moe_layers),
            curves=[
                Curve(policy=policy, budget=budget(policy, spec.router.experts), points=points)
                for policy, points in curves.items()
            ],
            masked=by_masked(slow.masked, slow.mean, usual),
            skipped=list(skipped.values()),
        )
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        return [
            Drawing(
                self.name,
                "Unique experts of a decoding forward against block size, mean over layers and "
                "forwards; the band spans the layers under vanilla. Broken above: what routing by "
                "lot would touch.",
                lambda: _draw_blocks(found),
            ),
            Drawing(
                f"{self.name}-masked",
                f"The same under vanilla for blocks of {found['usual']}, against the positions "
                "still masked, decoding one word at a time.",
                lambda: _draw_masked(found),
            ),
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        blocks = [point["block"] for point in found["curves"][0]["points"]]
        rows = [
            [curve["policy"], *(f"{point['mean']:.1f}" for point in curve["points"])]
            for curve in found["curves"]
        ]
        lot = [f"{uniform(found['experts'], found['k'], block):.1f}" for block in blocks]
        return [
            Table(
                heads=["policy", *(f"block {block}" for block in blocks)],
                rows=[*rows, ["by lot", *lot]],
                caption=f"Unique experts of {found['experts']}, mean over layers and forwards; "
                f"{found['prompts']} prompts. Each token takes {found['k']}.",
                numbers=list(range(1, len(blocks) + 1)),
            )
        ]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        voted = [curve for curve in found["curves"] if curve["budget"] is not None]
        return [_growth(found), _skew(found), *map(_flat, voted), *found["skipped"]]


@dataclass(frozen=True)
class Counts:
    """Unique experts row by row, forward by forward."""

    per_layer: Mapping[int, Tensor]  # layer -> [rows and forwards]
    masked: Tensor  # [rows and forwards], positions still masked

    @property
    def mean(self) -> Tensor:
        """Over layers, [rows and forwards]."""
        return torch.stack(list(self.per_layer.values())).mean(dim=0)


def uniform(experts: int, k: int, tokens: float) -> float:
    """Unique experts if every token drew its own by lot: M (1 - (1 - K/M)^N)."""
    return experts * (1 - (1 - k / experts) ** tokens)


def budget(policy: str, experts: int) -> int | None:
    """Of the DES-Vote policies in ``POLICIES``: the experts of a coreset."""
    family, _, beta = policy.partition(":beta=")
    return int(float(beta) * experts + 1e-9) if family == "des-vote" else None


def point(block: int, per_layer: Mapping[int, Tensor]) -> Point:
    """From layer -> unique experts of every forward, in the same order."""
    counts = torch.stack(list(per_layer.values())).double()  # [layers, forwards]
    low, high = torch.quantile(counts.mean(dim=0), torch.tensor([0.25, 0.75]).double()).tolist()
    return Point(
        block=block,
        forwards=counts.shape[1],
        mean=float(counts.mean()),
        low=low,
        high=high,
        layers=counts.mean(dim=1).tolist(),
    )


def by_masked(masked: Tensor, mean: Tensor, block: int, bins: int = 8) -> list[Masked]:
    """Means over forwards with nearly as many masks, an eighth of a block together."""
    place = ((masked.double() - 1) * bins / block).floor().clamp(0, bins - 1)
    found = []
    for number in range(bins):
        here = place == number
        if bool(here.any()):
            found.append(
                Masked(
                    masked=float(masked[here].double().mean()),
                    forwards=int(here.sum()),
                    mean=float(mean[here].double().mean()),
                )
            )
    return found


def _counted(
    lab: Lab, prompts: Sequence[str], policy: str, *, block: int, unmask: str | None = None
) -> Counts:
    """What every decoding forward of these prompts used."""
    unmask = unmask or lab.engine.generation.unmask
    per_layer: dict[int, list[Tensor]] = {layer: [] for layer in lab.engine.model.spec.moe_layers}
    masked: list[Tensor] = []

    def see(watched: Watched) -> None:
        per_layer[watched.layer].append(figures(watched.scores, watched.routing)[:, 0].cpu())
        progress = watched.scores.progress
        if watched.layer == min(per_layer) and progress is not None and progress.masked is not None:
            masked.append(progress.masked.sum(dim=1).cpu())

    watch(lab.engine, prompts, see, policy=policy, block=block, unmask=unmask)
    if not masked:
        raise CoterieError("no decoding forward was made")
    return Counts({layer: torch.cat(seen) for layer, seen in per_layer.items()}, torch.cat(masked))


def _draw_blocks(found: Found) -> Figure:
    figure, one = axes("block size (positions)", f"unique experts of {found['experts']}")
    sizes = [point["block"] for point in found["curves"][0]["points"]]
    span = range(1, sizes[-1] + 1)
    lot = [uniform(found["experts"], found["k"], tokens) for tokens in span]
    one.plot(span, lot, color=ink(), linestyle="--", linewidth=1, label="by lot")
    for curve, dashes in zip(found["curves"], DASHES, strict=True):
        policy, points = curve["policy"], curve["points"]
        blocks = [point["block"] for point in points]
        if policy == VANILLA:
            least, most = ([edge(p["layers"]) for p in points] for edge in (min, max))
            one.fill_between(blocks, least, most, color=colour(policy), alpha=0.2, linewidth=0)
        one.plot(
            blocks,
            [point["mean"] for point in points],
            color=colour(policy),
            marker=look(policy).marker,
            linestyle=dashes,
            label=policy,
        )
    one.set(xticks=sizes, xlim=(4, sizes[-1] + 2), ylim=(0, found["experts"]))
    legend(one)
    return figure


def _draw_masked(found: Found) -> Figure:
    figure, one = axes("positions still masked", f"unique experts of {found['experts']}")
    bins = found["masked"]
    one.plot(
        [there["masked"] for there in bins],
        [there["mean"] for there in bins],
        color=colour(VANILLA),
        marker=look(VANILLA).marker,
    )
    one.set(ylim=(0, found["experts"]), xlim=(found["usual"] + 1, 0))
    return figure


def _growth(found: Found) -> Finding:
    points = found["curves"][0]["points"]
    first, last = points[0], points[-1]
    grows = all(a["mean"] < b["mean"] for a, b in pairwise(points)) and len(points) > 1
    return Finding(
        f"Under vanilla a forward touches {first['mean']:.0f} experts of {found['experts']} with "
        f"blocks of {first['block']} and {last['mean']:.0f} with blocks of {last['block']}, "
        f"{last['mean'] / found['k']:.1f} times what one token uses.",
        claim="The experts that a forward reads grow with the block, far past those of one token.",
        verdict="holds" if grows else "does not hold",
    )


def _skew(found: Found) -> Finding:
    points = found["curves"][0]["points"]
    shares = [p["mean"] / uniform(found["experts"], found["k"], p["block"]) for p in points]
    return Finding(
        f"That is {min(shares):.0%} to {max(shares):.0%} of what routing by lot would touch: "
        "words of one block want many of the same experts.",
        claim="Real routing shares experts: fewer are touched than by lot (84 of 163 for 256).",
        verdict="holds" if max(shares) < 1 else "does not hold",
    )


def _flat(curve: Curve) -> Finding:
    points, most = curve["points"], curve["budget"] or 0
    largest = max(point["high"] for point in points)
    return Finding(
        f"Under {curve['policy']} it touches {points[0]['mean']:.1f} with blocks of "
        f"{points[0]['block']} and {points[-1]['mean']:.1f} with blocks of {points[-1]['block']}; "
        f"the coreset holds {most}.",
        claim="A voted coreset decouples what is read from how many tokens are decoded together.",
        verdict="holds" if largest <= most else "does not hold",
    )
