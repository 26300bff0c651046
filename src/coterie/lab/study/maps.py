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

from coterie.engine.observation import LayerObservation
from coterie.lab.plotting import (
    SERIES_COLOURS,
    add_legend,
    foreground,
    new_axes,
    new_panels,
    policy_style,
)
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.fidelity import SLOW_STEPS, count_kept_experts, replay_vanilla, trace_vanilla
from coterie.lab.study.first_forwards import (
    BlockForward,
    content_mask,
    prompts_at_block_start,
    run_first_forward,
)
from coterie.routing import parse_policy, route
from coterie.values import Policy

GUARD_OPTIONS = "voters=before-eos,protect=top1"
POLICIES = (
    *("des-vote:beta=0.3", "des-seq:k=3"),
    *("des-vote:beta=0.15", f"des-vote:beta=0.15,{GUARD_OPTIONS}"),
)
DEPTH_POLICIES = (  # down through the layers
    *(
        "des-vote:beta=0.5",
        "des-vote:beta=0.3",
        f"des-vote:beta=0.3,{GUARD_OPTIONS}",
        "des-seq:k=3",
    ),
    *("des-vote:beta=0.15", "topk:k=4", "random:beta=0.3"),
)
POSITION_KINDS = ("masked", "written", "fill")
DASHES: Mapping[int, str | tuple[int, tuple[float, ...]]] = {0: "-", 1: (0, (4, 1.5)), 2: ":"}


class HitRateMap(TypedDict):
    """Hit rates of one policy: [layers][positions], [layers][forwards of a block], and by what
    stands at the position (masked still, a word already, end-of-text fill already)."""

    policy: str
    positions: list[list[float]]
    steps: list[list[float]]
    kinds: dict[str, float]


class DepthCosines(TypedDict):
    """Mean cosine of hidden states to vanilla's: after the embedding, after every layer, and as
    the head reads them; over all positions and over words, and the last one's lowest tenth."""

    policy: str
    experts: float  # used in a layer
    cosine: list[float]
    words: list[float]
    low: float
    same: float  # share of positions at which the same token would be written


class LayerActivation(TypedDict):
    """One layer under vanilla: shares of all choices and of all weight, the largest first;
    ``effective``: exp of the entropy of the choices."""

    layer: int
    choices: list[float]
    weight: list[float]
    effective: float


class MapsRecord(TypedDict):
    experts: int
    k: int
    prompts: int
    blocks: int
    layers: list[int]
    share: dict[str, float]  # of all positions that were looked at, by kind
    maps: list[HitRateMap]
    depths: list[DepthCosines]
    activation: list[LayerActivation]


@dataclass(frozen=True)
class MapsExperiment:
    """Decoding slowed down to eight forwards a block, so that steps can be told apart; hidden
    states on blocks that are opened, where vanilla and policy start from the same."""

    name: str = "maps"
    title: str = "Hit-rate maps, cosine to vanilla, sorted activation (Fig. 9)"
    question: str = (
        "In which layers, at which positions and steps do tokens lose their own experts, and how "
        "far does the hidden state drift as layer follows on layer?"
    )

    def measure(self, context: StudyContext) -> ExperimentData:
        spec = context.engine.model.spec
        context.on_progress(0.0, "decoding slowly")
        trace = trace_vanilla(context, slow=True)
        hit_counter = HitRateCounter(tuple(map(parse_policy, POLICIES)), trace.layers)
        use_counter = ExpertUseCounter(trace.layers, spec.router.experts)

        def on_layer(observation: LayerObservation) -> None:
            hit_counter.on_layer(observation)
            use_counter.on_layer(observation)

        replay_vanilla(
            context,
            trace,
            on_layer,
            lambda share: context.on_progress(0.1 + 0.5 * share, "hit rates"),
        )
        prompts = prompts_at_block_start(context.engine, trace.prompts)
        depths = []
        for number, policy in enumerate(DEPTH_POLICIES):
            context.on_progress(
                0.6 + 0.4 * number / len(DEPTH_POLICIES), f"hidden states, {policy}"
            )
            depths.append(depth_cosines(context, prompts, policy))
        record = MapsRecord(
            experts=spec.router.experts,
            k=spec.router.k,
            prompts=len(trace.prompts),
            blocks=len(prompts),
            layers=list(trace.layers),
            share=hit_counter.kind_shares(),
            maps=[hit_counter.to_map(index, policy) for index, policy in enumerate(POLICIES)],
            depths=depths,
            activation=[use_counter.activation(layer) for layer in trace.layers],
        )
        return cast("ExperimentData", record)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("MapsRecord", data)
        slow = f"vanilla decoding in {SLOW_STEPS} forwards a block, {record['prompts']} prompts"
        return [
            Drawing(
                "hit-rate-positions",
                f"Share of their own experts that tokens keep, layer by position; {slow}.",
                lambda: draw_maps(record, "positions", "position in the block"),
            ),
            Drawing(
                "hit-rate-steps",
                "The same, layer by forward of the block.",
                lambda: draw_maps(record, "steps", "forward of the block"),
            ),
            Drawing(
                "cosine-by-depth",
                "Cosine of hidden states to vanilla's in the first forward of a block that is all "
                f"answer, layer after layer; {record['blocks']} blocks. At the right: as the head "
                "reads them.",
                lambda: draw_depths(record),
            ),
            Drawing(
                "sorted-activation",
                "Experts by their share of all choices under vanilla, layer by layer. Dashed: "
                "what even use would give.",
                lambda: draw_activation(record),
            ),
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("MapsRecord", data)
        share = record["share"]
        return [
            Table(
                heads=["hit rate", *(f"{kind} ({share[kind]:.0%})" for kind in POSITION_KINDS)],
                rows=[
                    [entry["policy"], *(f"{entry['kinds'][kind]:.1%}" for kind in POSITION_KINDS)]
                    for entry in record["maps"]
                ],
                caption="By what stands at the position: masked still, a word already, "
                "end-of-text fill already; in brackets their share of all positions.",
                numbers=[1, 2, 3],
            ),
            Table(
                heads=["policy", "experts", "cosine", "of words", "lowest tenth", "same token"],
                rows=[
                    [
                        entry["policy"],
                        f"{entry['experts']:.1f}",
                        f"{entry['cosine'][-1]:.3f}",
                        f"{entry['words'][-1]:.3f}",
                        f"{entry['low']:.3f}",
                        f"{entry['same']:.1%}",
                    ]
                    for entry in record["depths"]
                ],
                caption="Hidden states as the head reads them, against vanilla's; experts used in "
                "a layer, in these forwards.",
                numbers=[1, 2, 3, 4, 5],
            ),
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("MapsRecord", data)
        return [
            _fill_sentence(record),
            _drift_finding(record),
            _control_finding(record),
            _skew_sentence(record),
        ]


@dataclass  # not frozen: it adds up
class HitRateCounter:
    """Choices kept and choices made, by layer, position, forward of the block and kind."""

    policies: tuple[Policy, ...]
    layers: tuple[int, ...]
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _first_forward: dict[tuple[int, int], int] = field(
        default_factory=dict
    )  # row, start -> forward

    def on_layer(self, observation: LayerObservation) -> None:
        layer = self.layers.index(observation.layer)
        kinds = position_kinds(observation)  # [kinds, S, N]
        steps = self._steps(observation)
        for index, policy in enumerate(self.policies):
            kept_experts = (
                count_kept_experts(observation, route(observation.scores, policy)).double().cpu()
            )  # [S, N]
            rates = kept_experts / observation.scores.router.k
            self._add(
                f"{index}/positions", layer, torch.arange(kept_experts.shape[1]), rates.mean(0)
            )
            self._add(f"{index}/steps", layer, steps, rates.mean(1))
            self._add(
                f"{index}/kinds", 0, torch.arange(len(POSITION_KINDS)), (kinds * rates).sum((1, 2))
            )
        ones = torch.ones(observation.x.shape[:2], dtype=torch.float64)
        self._add("positions", layer, torch.arange(ones.shape[1]), ones.mean(0))
        self._add("steps", layer, steps, ones.mean(1))
        self._add("kinds", 0, torch.arange(len(POSITION_KINDS)), kinds.sum((1, 2)))

    def to_map(self, index: int, policy: str) -> HitRateMap:
        positions, steps, kinds = (
            (self._sums[f"{index}/{name}"] / self._sums[name].clamp(min=1e-9)).tolist()
            for name in ("positions", "steps", "kinds")
        )
        return HitRateMap(
            policy=policy,
            positions=positions,
            steps=steps,
            kinds=dict(zip(POSITION_KINDS, kinds[0], strict=True)),
        )

    def kind_shares(self) -> dict[str, float]:
        kinds = self._sums["kinds"][0]
        return dict(zip(POSITION_KINDS, (kinds / kinds.sum()).tolist(), strict=True))

    def _steps(self, observation: LayerObservation) -> Tensor:
        """[S]: which forward of its block this is, from 0."""
        forward = observation.scores.forward_indices
        return torch.tensor(
            [
                number - self._first_forward.setdefault((row, start), number)
                for row, start, number in zip(
                    observation.rows, observation.starts, forward, strict=True
                )
            ]
        )

    def _add(self, name: str, layer: int, columns: Tensor, values: Tensor) -> None:
        """``values`` into [layers, columns], which grows to the right."""
        current = self._sums.get(name, torch.zeros(len(self.layers), 0, dtype=torch.float64))
        missing = max(0, int(columns.max()) + 1 - current.shape[1])
        self._sums[name] = F.pad(current, (0, missing))
        self._sums[name][layer].index_add_(0, columns, values.double())


@dataclass  # not frozen: it adds up
class ExpertUseCounter:
    """How often, and with how much weight, vanilla uses each expert of each layer."""

    layers: tuple[int, ...]
    experts: int
    _sums: dict[int, Tensor] = field(default_factory=dict)  # [2, E]

    def on_layer(self, observation: LayerObservation) -> None:
        sums = self._sums.setdefault(
            observation.layer, torch.zeros(2, self.experts, dtype=torch.float64)
        )
        ids = observation.routing.topk_ids.flatten().cpu()
        weights = observation.routing.topk_weights.flatten().double().cpu()
        sums[0].index_add_(0, ids, torch.ones_like(weights))
        sums[1].index_add_(0, ids, weights)

    def activation(self, layer: int) -> LayerActivation:
        shares = self._sums[layer] / self._sums[layer].sum(-1, keepdim=True)
        choices, weight = shares.sort(dim=-1, descending=True).values
        entropy = -torch.xlogy(choices, choices).sum()
        return LayerActivation(
            layer=layer,
            choices=choices.tolist(),
            weight=weight.tolist(),
            effective=float(entropy.exp()),
        )


def position_kinds(observation: LayerObservation) -> Tensor:
    """[kinds, S, N] float64: what stands at each position."""
    progress = observation.scores.progress
    if progress is None or progress.masked is None or progress.after_eos is None:
        raise RuntimeError("the engine tells how far decoding is")
    masked, is_fill = progress.masked, progress.after_eos & ~progress.masked
    return torch.stack([masked, ~masked & ~is_fill, is_fill]).double().cpu()


def depth_cosines(
    context: StudyContext, prompts: Sequence[tuple[int, ...]], policy: str
) -> DepthCosines:
    """One policy on the blocks that these prompts open, against vanilla on the same."""
    cosine_means, word_means, last_cosines, same_tokens, sizes = [], [], [], [], []
    for prompt in prompts:
        vanilla, observed = (
            run_first_forward(context.engine, prompt, name) for name in ("vanilla", policy)
        )
        cosines = torch.stack(
            [
                F.cosine_similarity(a.double(), b.double(), dim=-1)
                for a, b in zip(_hidden_states(vanilla), _hidden_states(observed), strict=True)
            ]
        )  # [2 + layers, N]
        words = content_mask(context.engine, vanilla.ids)[0]
        cosine_means.append(cosines.mean(-1))
        word_means.append(cosines[:, words].mean(-1))
        last_cosines.append(cosines[-1])
        same_tokens.append((vanilla.ids == observed.ids).double().mean())
        sizes += [routing.used.sum() for _, _, routing in observed.trace.routings]
    return DepthCosines(
        policy=policy,
        experts=float(torch.stack(sizes).double().mean()),
        cosine=torch.stack(cosine_means).mean(0).tolist(),
        words=torch.stack(word_means).mean(0).tolist(),
        low=float(torch.quantile(torch.cat(last_cosines), 0.1)),
        same=float(torch.stack(same_tokens).mean()),
    )


def _hidden_states(forward: BlockForward) -> list[Tensor]:
    """Hidden states [N, H] of the block after the embedding, after each layer, before the head."""
    *layers, _ = forward.trace.outputs
    return [*(x[0, forward.block] for _, x in layers), forward.hidden[0]]


def draw_maps(record: MapsRecord, key: str, label: str) -> Figure:
    """A panel a policy, all on one scale."""
    figure, subplots = new_panels(len(record["maps"]), columns=1, height=1.25)
    rates = [cast("list[list[float]]", entry[key]) for entry in record["maps"]]
    low = min(min(map(min, rate)) for rate in rates)
    image = None
    for entry, rate, axis in zip(record["maps"], rates, subplots, strict=True):
        image = axis.imshow(np.array(rate), aspect="auto", vmin=low, vmax=1)
        axis.set_title(_short_name(entry["policy"]), fontsize=9)
        axis.set(yticks=range(len(record["layers"])), ylabel="layer")
        axis.set_yticklabels(list(map(str, record["layers"])))
        axis.grid(visible=False)
        if key == "steps":
            axis.set_xticks(range(len(rate[0])), [str(step + 1) for step in range(len(rate[0]))])
    subplots[-1].set_xlabel(label)
    if image is not None:
        bar = figure.colorbar(image, ax=subplots, shrink=0.6)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        bar.set_label("hit rate")
    return figure


def draw_depths(record: MapsRecord) -> Figure:
    figure, ax = new_axes("after layer", "cosine to vanilla's hidden state", height=3.8)
    num_by_color: dict[str, int] = {}
    for depth in record["depths"]:
        style = policy_style(depth["policy"])
        number = num_by_color[style.colour] = num_by_color.get(style.colour, -1) + 1
        ax.plot(
            range(len(depth["cosine"])),
            depth["cosine"],
            color=style.colour,
            marker=style.marker,
            linestyle=DASHES[number % len(DASHES)],
            label=_short_name(depth["policy"]),
        )
    count = len(record["depths"][0]["cosine"])
    step = -(-(count - 2) // 8)
    names = ["-", *map(str, range(count - 2)), "head"]
    ticks = [0, *range(1, count - 1, step), count - 1]
    ax.set_xticks(ticks, [names[tick] for tick in ticks])
    ax.set_ylim(top=1.01)
    add_legend(ax)
    return figure


def draw_activation(record: MapsRecord) -> Figure:
    figure, ax = new_axes(
        f"experts of {record['experts']}, the busiest first", "share of all choices"
    )
    for index, layer in enumerate(record["activation"]):
        ax.plot(
            range(1, 1 + len(layer["choices"])),
            layer["choices"],
            color=SERIES_COLOURS[index % len(SERIES_COLOURS)],
            label=f"layer {layer['layer']}",
        )
    ax.axhline(1 / record["experts"], color=foreground(), linestyle="--", linewidth=1)
    ax.set(xlim=(0, record["experts"] + 1), ylim=(0, None))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    add_legend(ax, columns=4)
    return figure


def _short_name(policy: str) -> str:
    return policy.replace(f",{GUARD_OPTIONS}", ", words, top-1").replace(":", " ")


def _depth_value(record: MapsRecord, policy: str, get: Callable[[DepthCosines], float]) -> float:
    return next(get(entry) for entry in record["depths"] if entry["policy"] == policy)


def _fill_sentence(record: MapsRecord) -> str:
    unguarded, guarded = (
        entry for entry in record["maps"] if entry["policy"].startswith(POLICIES[2])
    )
    clauses = [
        f"{kind} {unguarded['kinds'][kind]:.0%} and {guarded['kinds'][kind]:.0%}"
        for kind in POSITION_KINDS
    ]
    return (
        f"Hit rates under {unguarded['policy']}, when all vote and when only words do with top-1 kept: "
        f"{', '.join(clauses)}. Fill already written is {record['share']['fill']:.0%} of all positions."
    )


def _drift_finding(record: MapsRecord) -> Finding:
    names = ("des-vote:beta=0.3", "des-seq:k=3")
    vote, seq = (_depth_value(record, policy, lambda one: one["cosine"][-1]) for policy in names)
    sizes = [_depth_value(record, policy, lambda one: one["experts"]) for policy in names]
    return Finding(
        f"The hidden state that the head reads has a cosine of {vote:.3f} to vanilla's under "
        f"des-vote:beta=0.3 ({sizes[0]:.0f} experts), {seq:.3f} under des-seq:k=3 "
        f"({sizes[1]:.0f} experts).",
        claim="Hidden states under DES-Vote stay nearer to vanilla's than under DES-Seq.",
        verdict="holds" if vote > seq else "does not hold",
    )


def _control_finding(record: MapsRecord) -> Finding:
    vote, random_cosine, topk = (
        _depth_value(record, policy, lambda one: one["cosine"][-1])
        for policy in ("des-vote:beta=0.3", "random:beta=0.3", "topk:k=4")
    )
    return Finding(
        f"A random coreset of that size leaves {random_cosine:.3f}, top-k with half of a token's experts "
        f"{topk:.3f}.",
        claim="A voted coreset keeps hidden states nearer to vanilla's than a random one.",
        verdict="holds" if vote > random_cosine else "does not hold",
    )


def _skew_sentence(record: MapsRecord) -> str:
    text = ", ".join(
        f"layer {entry['layer']} {entry['effective']:.0f}" for entry in record["activation"]
    )
    top = max(entry["choices"][0] for entry in record["activation"]) * record["experts"]
    return (
        f"Over all blocks vanilla uses its experts nearly evenly: the effective number of "
        f"{record['experts']} is {text}; the busiest has {top:.1f} times its even share. A small "
        "coreset is possible because a single block is narrower than that."
    )
