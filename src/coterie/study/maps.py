"""Where policies leave vanilla: hit-rate maps, cosine by depth, sorted activation (Fig. 9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from coterie.engine.watch import Watched
from coterie.figures.style import SERIES, axes, ink, legend, look, panels
from coterie.routing import parse_policy, route
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.fidelity import SLOW, kept, look_again, traced
from coterie.study.lab import Lab
from coterie.study.opened import Opened, open_block, opened_prompts, words_of
from coterie.values import Policy

GUARDED = "voters=before-eos,protect=top1"
POLICIES = (
    *("des-vote:beta=0.3", "des-seq:k=3"),
    *("des-vote:beta=0.15", f"des-vote:beta=0.15,{GUARDED}"),
)
FOLLOWED = (  # down through the layers
    *("des-vote:beta=0.5", "des-vote:beta=0.3", f"des-vote:beta=0.3,{GUARDED}", "des-seq:k=3"),
    *("des-vote:beta=0.15", "topk:k=4", "random:beta=0.3"),
)
KINDS = ("masked", "written", "fill")
DASHES: Mapping[int, str | tuple[int, tuple[float, ...]]] = {0: "-", 1: (0, (4, 1.5)), 2: ":"}


class Map(TypedDict):
    """Hit rates of one policy: [layers][positions], [layers][forwards of a block], and by what
    stands at the position (masked still, a word already, end-of-text fill already)."""

    policy: str
    positions: list[list[float]]
    steps: list[list[float]]
    kinds: dict[str, float]


class Depth(TypedDict):
    """Mean cosine of hidden states to vanilla's: after the embedding, after every layer, and as
    the head reads them; over all positions and over words, and the last one's lowest tenth."""

    policy: str
    experts: float  # used in a layer
    cosine: list[float]
    words: list[float]
    low: float
    same: float  # share of positions at which the same token would be written


class Activation(TypedDict):
    """One layer under vanilla: shares of all choices and of all weight, the largest first;
    ``effective``: exp of the entropy of the choices."""

    layer: int
    choices: list[float]
    weight: list[float]
    effective: float


class Found(TypedDict):
    experts: int
    k: int
    prompts: int
    blocks: int
    layers: list[int]
    share: dict[str, float]  # of all positions that were looked at, by kind
    maps: list[Map]
    depths: list[Depth]
    activation: list[Activation]


@dataclass(frozen=True)
class Maps:
    """Decoding slowed down to eight forwards a block, so that steps can be told apart; hidden
    states on blocks that are opened, where vanilla and policy start from the same."""

    name: str = "maps"
    title: str = "Hit-rate maps, cosine to vanilla, sorted activation (Fig. 9)"
    question: str = (
        "In which layers, at which positions and steps do tokens lose their own experts, and how "
        "far does the hidden state drift as layer follows on layer?"
    )

    def measure(self, lab: Lab) -> Facts:
        spec = lab.engine.model.spec
        lab.tell(0.0, "decoding slowly")
        trace = traced(lab, slow=True)
        hits = Hits(tuple(map(parse_policy, POLICIES)), trace.layers)
        used = Used(trace.layers, spec.router.experts)

        def see(watched: Watched) -> None:
            hits.see(watched)
            used.see(watched)

        look_again(lab, trace, see, lambda share: lab.tell(0.1 + 0.5 * share, "hit rates"))
        prompts = opened_prompts(lab.engine, trace.prompts)
        depths = []
        for number, policy in enumerate(FOLLOWED):
            lab.tell(0.6 + 0.4 * number / len(FOLLOWED), f"hidden states, {policy}")
            depths.append(followed(lab, prompts, policy))
        found = Found(
            experts=spec.router.experts,
            k=spec.router.k,
            prompts=len(trace.prompts),
            blocks=len(prompts),
            layers=list(trace.layers),
            share=hits.share(),
            maps=[hits.map(place, policy) for place, policy in enumerate(POLICIES)],
            depths=depths,
            activation=[used.activation(layer) for layer in trace.layers],
        )
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        slow = f"vanilla decoding in {SLOW} forwards a block, {found['prompts']} prompts"
        return [
            Drawing(
                "hit-rate-positions",
                f"Share of their own experts that tokens keep, layer by position; {slow}.",
                lambda: draw_maps(found, "positions", "position in the block"),
            ),
            Drawing(
                "hit-rate-steps",
                "The same, layer by forward of the block.",
                lambda: draw_maps(found, "steps", "forward of the block"),
            ),
            Drawing(
                "cosine-by-depth",
                "Cosine of hidden states to vanilla's in the first forward of a block that is all "
                f"answer, layer after layer; {found['blocks']} blocks. At the right: as the head "
                "reads them.",
                lambda: draw_depths(found),
            ),
            Drawing(
                "sorted-activation",
                "Experts by their share of all choices under vanilla, layer by layer. Dashed: "
                "what even use would give.",
                lambda: draw_activation(found),
            ),
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        share = found["share"]
        return [
            Table(
                heads=["hit rate", *(f"{kind} ({share[kind]:.0%})" for kind in KINDS)],
                rows=[
                    [one["policy"], *(f"{one['kinds'][kind]:.1%}" for kind in KINDS)]
                    for one in found["maps"]
                ],
                caption="By what stands at the position: masked still, a word already, "
                "end-of-text fill already; in brackets their share of all positions.",
                numbers=[1, 2, 3],
            ),
            Table(
                heads=["policy", "experts", "cosine", "of words", "lowest tenth", "same token"],
                rows=[
                    [
                        one["policy"],
                        f"{one['experts']:.1f}",
                        f"{one['cosine'][-1]:.3f}",
                        f"{one['words'][-1]:.3f}",
                        f"{one['low']:.3f}",
                        f"{one['same']:.1%}",
                    ]
                    for one in found["depths"]
                ],
                caption="Hidden states as the head reads them, against vanilla's; experts used in "
                "a layer, in these forwards.",
                numbers=[1, 2, 3, 4, 5],
            ),
        ]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        return [_fill(found), _drift(found), _control(found), _skew(found)]


@dataclass  # not frozen: it adds up
class Hits:
    """Choices kept and choices made, by layer, position, forward of the block and kind."""

    policies: tuple[Policy, ...]
    layers: tuple[int, ...]
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _began: dict[tuple[int, int], int] = field(default_factory=dict)  # row, start -> forward

    def see(self, watched: Watched) -> None:
        layer = self.layers.index(watched.layer)
        kinds = kinds_of(watched)  # [kinds, S, N]
        steps = self._steps(watched)
        for place, policy in enumerate(self.policies):
            own = kept(watched, route(watched.scores, policy)).double().cpu()  # [S, N]
            rates = own / watched.scores.router.k
            self._add(f"{place}/positions", layer, torch.arange(own.shape[1]), rates.mean(0))
            self._add(f"{place}/steps", layer, steps, rates.mean(1))
            self._add(f"{place}/kinds", 0, torch.arange(len(KINDS)), (kinds * rates).sum((1, 2)))
        ones = torch.ones(watched.x.shape[:2], dtype=torch.float64)
        self._add("positions", layer, torch.arange(ones.shape[1]), ones.mean(0))
        self._add("steps", layer, steps, ones.mean(1))
        self._add("kinds", 0, torch.arange(len(KINDS)), kinds.sum((1, 2)))

    def map(self, place: int, policy: str) -> Map:
        positions, steps, kinds = (
            (self._sums[f"{place}/{name}"] / self._sums[name].clamp(min=1e-9)).tolist()
            for name in ("positions", "steps", "kinds")
        )
        return Map(
            policy=policy,
            positions=positions,
            steps=steps,
            kinds=dict(zip(KINDS, kinds[0], strict=True)),
        )

    def share(self) -> dict[str, float]:
        kinds = self._sums["kinds"][0]
        return dict(zip(KINDS, (kinds / kinds.sum()).tolist(), strict=True))

    def _steps(self, watched: Watched) -> Tensor:
        """[S]: which forward of its block this is, from 0."""
        forward = watched.scores.forward
        return torch.tensor(
            [
                number - self._began.setdefault((row, start), number)
                for row, start, number in zip(watched.rows, watched.starts, forward, strict=True)
            ]
        )

    def _add(self, name: str, layer: int, at: Tensor, values: Tensor) -> None:
        """``values`` into [layers, columns], which grows to the right."""
        there = self._sums.get(name, torch.zeros(len(self.layers), 0, dtype=torch.float64))
        more = max(0, int(at.max()) + 1 - there.shape[1])
        self._sums[name] = F.pad(there, (0, more))
        self._sums[name][layer].index_add_(0, at, values.double())


@dataclass  # not frozen: it adds up
class Used:
    """How often, and with how much weight, vanilla uses each expert of each layer."""

    layers: tuple[int, ...]
    experts: int
    _sums: dict[int, Tensor] = field(default_factory=dict)  # [2, E]

    def see(self, watched: Watched) -> None:
        there = self._sums.setdefault(
            watched.layer, torch.zeros(2, self.experts, dtype=torch.float64)
        )
        ids = watched.routing.ids.flatten().cpu()
        weights = watched.routing.weights.flatten().double().cpu()
        there[0].index_add_(0, ids, torch.ones_like(weights))
        there[1].index_add_(0, ids, weights)

    def activation(self, layer: int) -> Activation:
        shares = self._sums[layer] / self._sums[layer].sum(-1, keepdim=True)
        choices, weight = shares.sort(dim=-1, descending=True).values
        entropy = -torch.xlogy(choices, choices).sum()
        return Activation(
            layer=layer,
            choices=choices.tolist(),
            weight=weight.tolist(),
            effective=float(entropy.exp()),
        )


def kinds_of(watched: Watched) -> Tensor:
    """[kinds, S, N] float64: what stands at each position."""
    progress = watched.scores.progress
    if progress is None or progress.masked is None or progress.filled is None:
        raise RuntimeError("the engine tells how far decoding is")
    masked, fill = progress.masked, progress.filled & ~progress.masked
    return torch.stack([masked, ~masked & ~fill, fill]).double().cpu()


def followed(lab: Lab, prompts: Sequence[tuple[int, ...]], policy: str) -> Depth:
    """One policy on the blocks that these prompts open, against vanilla on the same."""
    every, of_words, last, same, sizes = [], [], [], [], []
    for prompt in prompts:
        plain, other = (open_block(lab.engine, prompt, each) for each in ("vanilla", policy))
        cosines = torch.stack(
            [
                F.cosine_similarity(a.double(), b.double(), dim=-1)
                for a, b in zip(_states(plain), _states(other), strict=True)
            ]
        )  # [2 + layers, N]
        words = words_of(lab.engine, plain.ids)[0]
        every.append(cosines.mean(-1))
        of_words.append(cosines[:, words].mean(-1))
        last.append(cosines[-1])
        same.append((plain.ids == other.ids).double().mean())
        sizes += [routing.used.sum() for _, _, routing in other.trace.routings]
    return Depth(
        policy=policy,
        experts=float(torch.stack(sizes).double().mean()),
        cosine=torch.stack(every).mean(0).tolist(),
        words=torch.stack(of_words).mean(0).tolist(),
        low=float(torch.quantile(torch.cat(last), 0.1)),
        same=float(torch.stack(same).mean()),
    )


def _states(opened: Opened) -> list[Tensor]:
    """Hidden states [N, H] of the block after the embedding, after each layer, before the head."""
    *layers, _ = opened.trace.outputs
    return [*(x[0, opened.block] for _, x in layers), opened.hidden[0]]


def draw_maps(found: Found, which: str, label: str) -> Figure:
    """A panel a policy, all on one scale."""
    figure, several = panels(len(found["maps"]), columns=1, height=1.25)
    rates = [cast("list[list[float]]", one[which]) for one in found["maps"]]
    low = min(min(map(min, rate)) for rate in rates)
    image = None
    for one, rate, axis in zip(found["maps"], rates, several, strict=True):
        image = axis.imshow(np.array(rate), aspect="auto", vmin=low, vmax=1)
        axis.set_title(_short(one["policy"]), fontsize=9)
        axis.set(yticks=range(len(found["layers"])), ylabel="layer")
        axis.set_yticklabels(list(map(str, found["layers"])))
        axis.grid(visible=False)
        if which == "steps":
            axis.set_xticks(range(len(rate[0])), [str(step + 1) for step in range(len(rate[0]))])
    several[-1].set_xlabel(label)
    if image is not None:
        bar = figure.colorbar(image, ax=several, shrink=0.6)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        bar.set_label("hit rate")
    return figure


def draw_depths(found: Found) -> Figure:
    figure, one = axes("after layer", "cosine to vanilla's hidden state", height=3.8)
    seen: dict[str, int] = {}
    for depth in found["depths"]:
        dress = look(depth["policy"])
        number = seen[dress.colour] = seen.get(dress.colour, -1) + 1
        one.plot(
            range(len(depth["cosine"])),
            depth["cosine"],
            color=dress.colour,
            marker=dress.marker,
            linestyle=DASHES[number % len(DASHES)],
            label=_short(depth["policy"]),
        )
    count = len(found["depths"][0]["cosine"])
    step = -(-(count - 2) // 8)
    names = ["-", *map(str, range(count - 2)), "head"]
    ticks = [0, *range(1, count - 1, step), count - 1]
    one.set_xticks(ticks, [names[tick] for tick in ticks])
    one.set_ylim(top=1.01)
    legend(one)
    return figure


def draw_activation(found: Found) -> Figure:
    figure, one = axes(f"experts of {found['experts']}, the busiest first", "share of all choices")
    for place, layer in enumerate(found["activation"]):
        one.plot(
            range(1, 1 + len(layer["choices"])),
            layer["choices"],
            color=SERIES[place % len(SERIES)],
            label=f"layer {layer['layer']}",
        )
    one.axhline(1 / found["experts"], color=ink(), linestyle="--", linewidth=1)
    one.set(xlim=(0, found["experts"] + 1), ylim=(0, None))
    one.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    legend(one, columns=4)
    return figure


def _short(policy: str) -> str:
    return policy.replace(f",{GUARDED}", ", words, top-1").replace(":", " ")


def _of(found: Found, policy: str, pick: Callable[[Depth], float]) -> float:
    return next(pick(one) for one in found["depths"] if one["policy"] == policy)


def _fill(found: Found) -> str:
    plain, guarded = (one for one in found["maps"] if one["policy"].startswith(POLICIES[2]))
    said = [f"{kind} {plain['kinds'][kind]:.0%} and {guarded['kinds'][kind]:.0%}" for kind in KINDS]
    return (
        f"Hit rates under {plain['policy']}, when all vote and when only words do with top-1 kept: "
        f"{', '.join(said)}. Fill already written is {found['share']['fill']:.0%} of all positions."
    )


def _drift(found: Found) -> Finding:
    both = ("des-vote:beta=0.3", "des-seq:k=3")
    vote, seq = (_of(found, policy, lambda one: one["cosine"][-1]) for policy in both)
    sizes = [_of(found, policy, lambda one: one["experts"]) for policy in both]
    return Finding(
        f"The hidden state that the head reads has a cosine of {vote:.3f} to vanilla's under "
        f"des-vote:beta=0.3 ({sizes[0]:.0f} experts), {seq:.3f} under des-seq:k=3 "
        f"({sizes[1]:.0f} experts).",
        claim="Hidden states under DES-Vote stay nearer to vanilla's than under DES-Seq.",
        verdict="holds" if vote > seq else "does not hold",
    )


def _control(found: Found) -> Finding:
    vote, lot, topk = (
        _of(found, policy, lambda one: one["cosine"][-1])
        for policy in ("des-vote:beta=0.3", "random:beta=0.3", "topk:k=4")
    )
    return Finding(
        f"A random coreset of that size leaves {lot:.3f}, top-k with half of a token's experts "
        f"{topk:.3f}.",
        claim="A voted coreset keeps hidden states nearer to vanilla's than a random one.",
        verdict="holds" if vote > lot else "does not hold",
    )


def _skew(found: Found) -> str:
    said = ", ".join(f"layer {one['layer']} {one['effective']:.0f}" for one in found["activation"])
    top = max(one["choices"][0] for one in found["activation"]) * found["experts"]
    return (
        f"Over all blocks vanilla uses its experts nearly evenly: the effective number of "
        f"{found['experts']} is {said}; the busiest has {top:.1f} times its even share. A small "
        "coreset is possible because a single block is narrower than that."
    )
