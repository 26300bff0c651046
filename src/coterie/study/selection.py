"""The time of the selection itself (Fig. 6): scores in, experts and weights out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coterie.bench.routings import BLOCK, bend_for, skewed
from coterie.bench.timing import Conditions, Spread, conditions, crowded, in_turns, mean_spread, on
from coterie.engine.engine import Engine
from coterie.engine.watch import collect
from coterie.figures.style import look, panels
from coterie.routing import parse_policy, route
from coterie.routing.select import route_by_mask
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.lab import Lab
from coterie.study.latency import Line
from coterie.study.layers import moe_layers, whole_layer
from coterie.values import Policy, Progress, RouterSpec, Routing, Scores

EXPERTS = (64, 128, 256)
TOKENS = (8, 16, 32, 64)
VANILLA = "vanilla"
POLICIES = (
    VANILLA,
    "topk:k=4",
    "naee:beta=0.6",
    "des-seq:k=3",
    "des-vote:beta=0.15",
    "xshare:beta=0.15",
    "mass-vote:tau=0.8",
    "des-vote:beta=0.15,voters=before-eos,protect=top1",
)
DRAWN = (VANILLA, "topk:k=4", "des-seq:k=3", "des-vote:beta=0.15", "xshare:beta=0.15")
ROUNDS = 12
PROMPTS = 4
SPREAD_OUT = 0.5  # of what a block would use by lot: how skewed the scores are that are drawn
SMALL = 0.1  # of the layer's time, up to which a selection is said to cost next to nothing

Select = Callable[[Scores, Policy], Routing]

EAGER, FUSED = "eager", "fused"

# Every version of the selection by name. ``fused`` is what models run: one kernel where the device
# and the policy have one, and eager torch where they have not.
VERSIONS: dict[str, Select] = {EAGER: route_by_mask, FUSED: route}


class Point(TypedDict):
    """One selection for a block of ``tokens`` among ``experts``."""

    version: str
    policy: str
    experts: int
    tokens: int
    seconds: Spread


class Layer(TypedDict):
    """The model's own MoE layer and the selection in it, on real blocks of ``tokens``."""

    policy: str
    tokens: int
    layer: Spread
    selection: Spread


class Large(TypedDict):
    """A random layer's experts on a vanilla block of 32, as the latency chapter timed them."""

    name: str
    experts: int
    seconds: Spread


class Found(TypedDict):
    activation: str
    machine: Conditions
    points: list[Point]
    layers: list[Layer]
    large: list[Large]


@dataclass(frozen=True)
class Selection:
    """Scores drawn for every number of experts, then the model's own, each policy in turn."""

    name: str = "selection"
    title: str = "What the selection costs (Fig. 6)"
    question: str = (
        "Electing a coreset and routing inside it is work as well. "
        "How long does it take beside the layer whose bytes it saves?"
    )

    rounds: int = ROUNDS

    def measure(self, lab: Lab) -> Facts:
        spec, device = lab.engine.model.spec, lab.engine.model.transformer.device
        points: list[Point] = []
        for number, experts in enumerate(EXPERTS):
            share, said = number / (len(EXPERTS) + 1), f"selections among {experts} experts"

            def tell(part: float, share: float = share, said: str = said) -> None:
                lab.tell(share + part / (len(EXPERTS) + 1), said)

            points += selections(
                scaled(spec.router, experts), device, tell=tell, rounds=self.rounds
            )
        lab.tell(len(EXPERTS) / (len(EXPERTS) + 1), "the model's own layers")
        found = Found(
            activation=spec.router.activation,
            machine=conditions(device),
            points=points,
            layers=own_layers(lab.engine, lab.questions()[:PROMPTS], rounds=self.rounds),
            large=large_layers(lab),
        )
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        versions = list(dict.fromkeys(point["version"] for point in found["points"]))
        where = f"{found['activation']} router, {on(found['machine'])}"
        return [
            Drawing(
                f"{self.name}-{version}",
                f"Time of one {version} selection against the experts to choose from, for a block "
                f"of {BLOCK} (left), and against the tokens of the block, among {EXPERTS[-1]} "
                f"experts (right); {where}. Bars span the quartiles.",
                lambda version=version: _draw(found, version),
            )
            for version in versions
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        return [*_by_version(found), _beside_layer(found)]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        plain = next(each for each in found["layers"] if each["policy"] == VANILLA)
        told = [_cost(e, plain) for e in found["layers"] if e["policy"].startswith("des-")]
        large = [_beside_large(found, each) for each in found["large"]]
        return [*told, *large, _width(found), *_gain(found), *crowded(found["machine"])]


def scaled(router: RouterSpec, experts: int) -> RouterSpec:
    """The same router over another number of experts; without groups where these do not divide."""
    grouped = experts % router.groups == 0 and experts // router.groups >= 2
    return replace(
        router,
        experts=experts,
        k=min(router.k, experts),
        groups=router.groups if grouped else 1,
        kept_groups=router.kept_groups if grouped else 1,
    )


def selections(
    router: RouterSpec,
    device: torch.device,
    *,
    tell: Callable[[float], None],
    rounds: int,
) -> list[Point]:
    """Every version and policy at every block size, on scores drawn once."""
    draw = torch.Generator().manual_seed(0)
    by_lot = router.experts * (1 - (1 - router.k / router.experts) ** BLOCK)
    bend = bend_for(router, SPREAD_OUT * by_lot)
    blocks = {count: _moved(skewed(router, count, bend, draw), device) for count in TOKENS}
    works = {
        (version, policy, count): selecting(select, scores, parse_policy(policy))
        for count, scores in blocks.items()
        for policy in POLICIES
        for version, select in VERSIONS.items()
    }
    taken = in_turns(works, rounds, device=device, tell=tell)
    return [
        Point(version=version, policy=policy, experts=router.experts, tokens=count, seconds=seconds)
        for (version, policy, count), seconds in taken.items()
    ]


def own_layers(engine: Engine, prompts: Sequence[str], *, rounds: int) -> list[Layer]:
    """Layer and selection in turns, over the real decoding forwards of one row at a time."""
    seen = collect(engine, prompts, rows=1, forwards=1)
    moes = {moe.layer: moe for moe in moe_layers(engine.model.transformer)}
    works: dict[tuple[str, str, int], Callable[[], object]] = {}
    for spelling in POLICIES:
        for at, watched in enumerate(seen):
            policy, scores = parse_policy(spelling), replace(watched.scores, own=None)
            works["layer", spelling, at] = whole_layer(moes[watched.layer], watched, policy)
            works["selection", spelling, at] = selecting(VERSIONS[FUSED], scores, policy)
    taken = in_turns(works, rounds, device=engine.model.transformer.device)
    return [
        Layer(
            policy=policy,
            tokens=seen[0].x.shape[1],
            layer=mean_spread([taken["layer", policy, at] for at in range(len(seen))]),
            selection=mean_spread([taken["selection", policy, at] for at in range(len(seen))]),
        )
        for policy in POLICIES
    ]


def large_layers(lab: Lab) -> list[Large]:
    """Those of the latency chapter whose experts are as many as here; none where it has not run."""
    record = lab.record("latency")
    lines = cast("list[Line]", record["lines"]) if record is not None else []
    return [
        Large(
            name=line["bench"]["name"], experts=line["bench"]["experts"], seconds=check["seconds"]
        )
        for line in lines
        for check in line["checks"]
        if check["policy"] == VANILLA
        and line["bench"]["random"]
        and line["bench"]["experts"] in EXPERTS
    ]


def selecting(select: Select, scores: Scores, policy: Policy) -> Callable[[], Routing]:
    """Every time from the logits on: what scores remember of themselves is forgotten."""
    return lambda: select(replace(scores), policy)


def _moved(scores: Scores, device: torch.device) -> Scores:
    """On the device, with a canvas on which nothing but the last quarter is fill."""
    tokens = scores.logits.shape[1]
    filled = (torch.arange(tokens, device=device) >= tokens - tokens // 4).unsqueeze(0)
    masked = torch.ones_like(filled)
    return replace(
        scores, logits=scores.logits.to(device), progress=Progress(masked=masked, filled=filled)
    )


def _draw(found: Found, version: str) -> Figure:
    mine = [p for p in found["points"] if p["version"] == version and p["policy"] in DRAWN]
    figure, (left, right) = panels(2, height=3.4)
    left.set(xlabel="experts to choose from", ylabel="milliseconds", xticks=EXPERTS)
    right.set(xlabel="tokens of the block", xticks=TOKENS)
    _draw_against(left, "experts", [point for point in mine if point["tokens"] == BLOCK])
    _draw_against(right, "tokens", [point for point in mine if point["experts"] == EXPERTS[-1]])
    slowest = max(point["seconds"]["median"] for point in mine)
    for one in (left, right):
        one.set(ylim=(0, 1.3e3 * slowest))
    right.tick_params(labelleft=False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def _draw_against(one: Axes, what: Literal["experts", "tokens"], points: Sequence[Point]) -> None:
    for policy in DRAWN:
        here = [point for point in points if point["policy"] == policy]
        taken = [point["seconds"] for point in here]
        below = [(each["median"] - each["low"]) * 1e3 for each in taken]
        above = [(each["high"] - each["median"]) * 1e3 for each in taken]
        one.errorbar(
            [point[what] for point in here],
            [each["median"] * 1e3 for each in taken],
            yerr=[below, above],
            color=look(policy).colour,
            marker=look(policy).marker,
            elinewidth=1,
            label=policy,
        )


def _by_version(found: Found) -> list[Table]:
    """A table for each version: policies against experts and tokens."""
    tables = []
    for version in dict.fromkeys(point["version"] for point in found["points"]):
        mine = [point for point in found["points"] if point["version"] == version]
        sizes = list(dict.fromkeys((p["experts"], p["tokens"]) for p in mine if p["tokens"] >= 32))
        taken = {(p["policy"], p["experts"], p["tokens"]): p["seconds"]["median"] for p in mine}
        tables.append(
            Table(
                heads=["policy", *(f"{experts}, N = {tokens}" for experts, tokens in sizes)],
                rows=[
                    [policy, *(f"{taken[policy, *size] * 1e3:.2f}" for size in sizes)]
                    for policy in POLICIES
                ],
                caption=f"Median milliseconds of one {version} selection, from the logits to "
                "experts and weights: by experts to choose from and tokens of the block.",
                numbers=list(range(1, len(sizes) + 1)),
            )
        )
    return tables


def _beside_layer(found: Found) -> Table:
    rows = [
        [
            each["policy"],
            f"{each['selection']['median'] * 1e3:.3f}",
            f"{each['layer']['median'] * 1e3:.3f}",
            f"{each['layer']['low'] * 1e3:.3f} to {each['layer']['high'] * 1e3:.3f}",
            f"{each['selection']['median'] / each['layer']['median']:.0%}",
        ]
        for each in found["layers"]
    ]
    return Table(
        heads=["policy", "selection, ms", "whole layer, ms", "quartiles", "selection's share"],
        rows=rows,
        caption=f"The model's own MoE layer on real blocks of {found['layers'][0]['tokens']}; the "
        "whole layer is gate, selection, experts and shared expert.",
        numbers=[1, 2, 3, 4],
    )


def _cost(each: Layer, plain: Layer) -> Finding:
    more = each["selection"]["median"] - plain["selection"]["median"]
    share = more / plain["layer"]["median"]
    return Finding(
        f"{each['policy']} selects in {each['selection']['median'] * 1e3:.2f} ms, "
        f"{abs(more) * 1e3:.2f} ms {'more' if more > 0 else 'less'} than vanilla: "
        f"{abs(share):.0%} of vanilla's layer.",
        claim="The selection costs next to nothing beside the layer.",
        verdict="holds" if share <= SMALL else "does not hold",
    )


def _beside_large(found: Found, large: Large) -> Finding:
    policy = "des-vote:beta=0.15"
    taken = {
        p["policy"]: p["seconds"]["median"]
        for p in found["points"]
        if (p["version"], p["experts"], p["tokens"]) == (_built(found), large["experts"], BLOCK)
    }
    more, whole = taken[policy] - taken[VANILLA], large["seconds"]["median"]
    return Finding(
        f"Beside the experts of a random layer of {large['name']}'s shape, {whole * 1e3:.0f} ms "
        f"under vanilla, the {more * 1e3:.2f} ms more that {policy} takes to select among "
        f"{large['experts']} are {more / whole:.1%}.",
        claim="The selection costs next to nothing beside the layer.",
        verdict="holds" if more <= SMALL * whole else "does not hold",
    )


def _width(found: Found) -> str:
    taken = {
        (p["policy"], p["tokens"]): p["seconds"]["median"]
        for p in found["points"]
        if p["experts"] == EXPERTS[-1] and p["version"] == _built(found)
    }
    policy, (least, most) = "des-vote:beta=0.15", (TOKENS[0], TOKENS[-1])
    ratio = taken[policy, most] / taken[policy, least]
    return (
        f"Among {EXPERTS[-1]} experts, a selection by {policy} for {most} tokens takes {ratio:.1f} "
        f"times as long as one for {least}."
    )


def _built(found: Found) -> str:
    """The version that models ran when this was measured."""
    return FUSED if any(point["version"] == FUSED for point in found["points"]) else EAGER


def _gain(found: Found) -> list[str]:
    """Of one kernel over eager torch, among the most experts."""
    if _built(found) == EAGER:
        return [
            "There is no fused selection yet: every time here is that of eager torch operations."
        ]
    taken = {
        (p["version"], p["policy"]): p["seconds"]["median"] * 1e6
        for p in found["points"]
        if (p["experts"], p["tokens"]) == (EXPERTS[-1], BLOCK)
    }
    return [
        f"Among {EXPERTS[-1]} experts, a block of {BLOCK} is routed under {policy} in "
        f"{taken[FUSED, policy]:.0f} us as models do it, and in {taken[EAGER, policy]:.0f} us by "
        f"eager torch operations: {taken[EAGER, policy] / taken[FUSED, policy]:.1f} times as long."
        for policy in (VANILLA, "des-vote:beta=0.15")
    ]
