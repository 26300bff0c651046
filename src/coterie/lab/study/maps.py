"""Differences to vanilla by position and depth: hit rates, cosines, expert activation (Fig. 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from coterie.engine.observation import LayerObservation
from coterie.lab.plotting import (
    SERIES_COLOURS,
    SeriesStyle,
    foreground,
    new_panels,
)
from coterie.lab.study.charts import Series, dash_repeats, line_chart, policy_series
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    judge,
    make_table,
)
from coterie.lab.study.fidelity import SLOW_STEPS, count_kept_experts, replay_vanilla, trace_vanilla
from coterie.lab.study.first_forwards import (
    BlockForward,
    Prompt,
    content_mask,
    prompts_at_block_start,
    run_first_forward,
)
from coterie.lab.study.variants import GUARD_OPTIONS
from coterie.routing import parse_policy, route
from coterie.values import Policy

POLICIES = (
    *("des-vote:beta=0.3", "des-seq:k=3"),
    *("des-vote:beta=0.15", f"des-vote:beta=0.15,{GUARD_OPTIONS}"),
)
DEPTH_POLICIES = (  # compared layer by layer
    *("des-vote:beta=0.5", "des-vote:beta=0.3", f"des-vote:beta=0.3,{GUARD_OPTIONS}"),
    *("des-seq:k=3", "des-vote:beta=0.15", "topk:k=4", "random:beta=0.3"),
)
POSITION_KINDS: tuple[str, ...] = ("masked", "written", "fill")


class HitRateMap(TypedDict):
    """Hit rates of one policy: [layers][positions], [layers][forwards of a block], and by kind.

    The kinds of a position are still masked, written, and filled after the end-of-text token.
    """

    policy: str
    positions: list[list[float]]
    steps: list[list[float]]
    kinds: dict[str, float]


class DepthCosines(TypedDict):
    """Mean cosines of hidden states to vanilla's: after the embedding, each layer, before the head.

    ``cosine`` is over all positions and ``words`` over answer tokens; ``low`` is the lowest tenth
    before the head, and ``same`` the share of positions with the same most likely token.
    """

    policy: str
    experts: float  # in use per layer
    cosine: list[float]
    words: list[float]
    low: float
    same: float


class LayerActivation(TypedDict):
    """Shares of all selections and weights in one layer under vanilla, in descending order.

    ``effective`` is exp of the entropy of the selections.
    """

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
    share: dict[str, float]  # of all observed positions, by kind
    maps: list[HitRateMap]
    depths: list[DepthCosines]
    activation: list[LayerActivation]


class MapsExperiment(Experiment):
    """Hit rates in slow decoding (eight forwards per block); hidden states in first forwards.

    In the first forward of a block, vanilla and the policy have the same input.
    """

    text = ExperimentText.load("maps")

    def measure(self, context: StudyContext) -> MapsRecord:
        spec = context.engine.model.spec
        context.on_progress(0.0, "slow decoding")
        trace = trace_vanilla(context, slow=True)
        hit_counter = HitRateCounter(tuple(map(parse_policy, POLICIES)), trace.layers)
        use_counter = ExpertUseCounter(trace.layers, spec.router.experts)

        def on_layer(observation: LayerObservation) -> None:
            hit_counter.on_layer(observation)
            use_counter.on_layer(observation)

        def on_progress(share: float) -> None:
            context.on_progress(0.1 + 0.5 * share, "hit rates")

        replay_vanilla(context, trace, on_layer, on_progress)
        prompts = prompts_at_block_start(context.engine, trace.prompts)
        depths = []
        for index, policy in enumerate(DEPTH_POLICIES):
            share = 0.6 + 0.4 * index / len(DEPTH_POLICIES)
            context.on_progress(share, f"hidden states, {policy}")
            depths.append(depth_cosines(context, prompts, policy))
        return MapsRecord(
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

    def drawings(self, record: MapsRecord) -> Sequence[Drawing]:
        return [
            Drawing(
                "hit-rate-positions",
                "Share of its own experts that a token keeps, by layer and position; vanilla "
                f"decodes in {SLOW_STEPS} forwards per block, {record['prompts']} prompts.",
                lambda: draw_maps(record, "positions", "position in the block"),
            ),
            Drawing(
                "hit-rate-steps",
                "The same, by layer and forward of the block.",
                lambda: draw_maps(record, "steps", "forward of the block"),
            ),
            Drawing(
                "cosine-by-depth",
                "Cosine of hidden states to vanilla's in the first forward of a block that is all "
                f"answer, layer by layer; {record['blocks']} blocks. Right end: before the head.",
                lambda: draw_depths(record),
            ),
            Drawing(
                "sorted-activation",
                "Experts by their share of all selections under vanilla, for each layer. Dashed: "
                "uniform use.",
                lambda: draw_activation(record),
            ),
        ]

    def tables(self, record: MapsRecord) -> Sequence[Table]:
        shares = record["share"]
        by_kind = {f"{k} ({shares[k]:.0%})": f"{{kinds[{k}]:.1%}}" for k in POSITION_KINDS}
        return [
            make_table(
                "Hit rate by kind of position: still masked, written, or filled after the "
                "end-of-text token; in brackets its share of all positions.",
                record["maps"],
                {"hit rate": "{policy}", **by_kind},
            ),
            make_table(
                "Hidden states before the head, compared with vanilla's; experts in use per layer "
                "in these forwards.",
                record["depths"],
                {
                    "policy": "{policy}",
                    "experts": "{experts:.1f}",
                    "cosine": lambda entry: f"{entry['cosine'][-1]:.3f}",
                    "answer tokens": lambda entry: f"{entry['words'][-1]:.3f}",
                    "lowest tenth": "{low:.3f}",
                    "same token": "{same:.1%}",
                },
            ),
        ]

    def findings(self, record: MapsRecord) -> Sequence[Finding | str]:
        depths = {entry["policy"]: entry for entry in record["depths"]}
        vote, seq = depths["des-vote:beta=0.3"], depths["des-seq:k=3"]
        random, topk = depths["random:beta=0.3"], depths["topk:k=4"]
        return [
            _fill_sentence(record),
            judge(
                f"The cosine of the head's input to vanilla's is {vote['cosine'][-1]:.3f} under "
                f"{vote['policy']} ({vote['experts']:.0f} experts) and {seq['cosine'][-1]:.3f} "
                f"under {seq['policy']} ({seq['experts']:.0f} experts).",
                "Hidden states under DES-Vote are nearer to vanilla's than under DES-Seq.",
                vote["cosine"][-1] > seq["cosine"][-1],
            ),
            judge(
                f"With a random coreset of that size the cosine is {random['cosine'][-1]:.3f}, "
                f"with top-k and half of a token's experts {topk['cosine'][-1]:.3f}.",
                "An elected coreset keeps hidden states nearer to vanilla's than a random one.",
                vote["cosine"][-1] > random["cosine"][-1],
            ),
            _skew_sentence(record),
        ]


@dataclass  # mutable: it accumulates
class HitRateCounter:
    """Selections kept and selections made, by layer, position, forward of the block and kind."""

    policies: tuple[Policy, ...]
    layers: tuple[int, ...]
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _first_forward: dict[tuple[int, int], int] = field(default_factory=dict)  # row, start

    def on_layer(self, observation: LayerObservation) -> None:
        kinds = position_kinds(observation)  # [kinds, S, N]
        self._add_rates("", observation, kinds, torch.ones_like(kinds[0]))
        for index, policy in enumerate(self.policies):
            kept_experts = count_kept_experts(observation, route(observation.scores, policy))
            rates = kept_experts.double().cpu() / observation.scores.router.k  # [S, N]
            self._add_rates(f"{index}/", observation, kinds, rates)

    def to_map(self, index: int, policy: str) -> HitRateMap:
        positions, steps, kinds = (
            (self._sums[f"{index}/{name}"] / self._sums[name].clamp(min=1e-9)).tolist()
            for name in ("positions", "steps", "kinds")
        )
        by_kind = dict(zip(POSITION_KINDS, kinds[0], strict=True))
        return HitRateMap(policy=policy, positions=positions, steps=steps, kinds=by_kind)

    def kind_shares(self) -> dict[str, float]:
        kinds = self._sums["kinds"][0]
        return dict(zip(POSITION_KINDS, (kinds / kinds.sum()).tolist(), strict=True))

    def _add_rates(
        self, prefix: str, observation: LayerObservation, kinds: Tensor, rates: Tensor
    ) -> None:
        layer = self.layers.index(observation.layer)
        self._add(f"{prefix}positions", layer, torch.arange(rates.shape[1]), rates.mean(0))
        self._add(f"{prefix}steps", layer, self._steps(observation), rates.mean(1))
        self._add(f"{prefix}kinds", 0, torch.arange(len(kinds)), (kinds * rates).sum((1, 2)))

    def _steps(self, observation: LayerObservation) -> Tensor:
        """[S]: the index of this forward in its block."""
        keys = zip(observation.rows, observation.starts, strict=True)
        forwards = zip(keys, observation.scores.forward_indices, strict=True)
        return torch.tensor([n - self._first_forward.setdefault(key, n) for key, n in forwards])

    def _add(self, name: str, layer: int, columns: Tensor, values: Tensor) -> None:
        """Add ``values`` to [layers, columns], which grows to the right."""
        current = self._sums.get(name, torch.zeros(len(self.layers), 0, dtype=torch.float64))
        missing = max(0, int(columns.max()) + 1 - current.shape[1])
        self._sums[name] = F.pad(current, (0, missing))
        self._sums[name][layer].index_add_(0, columns, values.double())


@dataclass  # mutable: it accumulates
class ExpertUseCounter:
    """The number and the total weight of vanilla's selections of each expert in each layer."""

    layers: tuple[int, ...]
    experts: int
    _sums: dict[int, Tensor] = field(default_factory=dict)  # [2, E]

    def on_layer(self, observation: LayerObservation) -> None:
        zeros = torch.zeros(2, self.experts, dtype=torch.float64)
        sums = self._sums.setdefault(observation.layer, zeros)
        ids = observation.routing.topk_ids.flatten().cpu()
        weights = observation.routing.topk_weights.flatten().double().cpu()
        sums[0].index_add_(0, ids, torch.ones_like(weights))
        sums[1].index_add_(0, ids, weights)

    def activation(self, layer: int) -> LayerActivation:
        shares = self._sums[layer] / self._sums[layer].sum(-1, keepdim=True)
        choices, weight = shares.sort(dim=-1, descending=True).values
        effective = float((-torch.xlogy(choices, choices).sum()).exp())
        return LayerActivation(
            layer=layer, choices=choices.tolist(), weight=weight.tolist(), effective=effective
        )


def position_kinds(observation: LayerObservation) -> Tensor:
    """[kinds, S, N] float64: an indicator for each kind of position."""
    progress = observation.scores.progress
    if progress is None or progress.masked is None or progress.after_eos is None:
        raise RuntimeError("the observation has no decoding progress")
    masked, is_fill = progress.masked, progress.after_eos & ~progress.masked
    return torch.stack([masked, ~masked & ~is_fill, is_fill]).double().cpu()


def depth_cosines(context: StudyContext, prompts: Sequence[Prompt], policy: str) -> DepthCosines:
    """One policy on the first blocks of these prompts, compared with vanilla."""
    cosine_means, content_means, last_cosines, same_tokens, sizes = [], [], [], [], []
    for prompt in prompts:
        vanilla, other = (
            run_first_forward(context.engine, prompt, name) for name in ("vanilla", policy)
        )
        states = zip(_hidden_states(vanilla), _hidden_states(other), strict=True)
        cosines = torch.stack(
            [F.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in states]
        )  # [2 + layers, N]
        content = content_mask(context.engine, vanilla.ids)[0]
        cosine_means.append(cosines.mean(-1))
        content_means.append(cosines[:, content].mean(-1))
        last_cosines.append(cosines[-1])
        same_tokens.append((vanilla.ids == other.ids).double().mean())
        sizes += [routing.used.sum() for _, _, routing in other.trace.routings]
    return DepthCosines(
        policy=policy,
        experts=float(torch.stack(sizes).double().mean()),
        cosine=torch.stack(cosine_means).mean(0).tolist(),
        words=torch.stack(content_means).mean(0).tolist(),
        low=float(torch.quantile(torch.cat(last_cosines), 0.1)),
        same=float(torch.stack(same_tokens).mean()),
    )


def _hidden_states(forward: BlockForward) -> list[Tensor]:
    """Hidden states [N, H] of the block after the embedding, after each layer, before the head."""
    *layers, _ = forward.trace.outputs
    return [*(x[0, forward.block] for _, x in layers), forward.hidden[0]]


def draw_maps(record: MapsRecord, key: Literal["positions", "steps"], label: str) -> Figure:
    """One panel per policy, all on one scale."""
    maps, layers = record["maps"], record["layers"]
    figure, subplots = new_panels(len(maps), columns=1, height=1.25)
    low = min(min(map(min, entry[key])) for entry in maps)
    image = None
    for entry, ax in zip(maps, subplots, strict=True):
        rates = entry[key]
        image = ax.imshow(np.array(rates), aspect="auto", vmin=low, vmax=1)
        ax.set_title(_short_name(entry["policy"]), fontsize=9)
        ax.set(yticks=range(len(layers)), ylabel="layer")
        ax.set_yticklabels(list(map(str, layers)))
        ax.grid(visible=False)
        if key == "steps":
            ax.set_xticks(range(len(rates[0])), [str(step + 1) for step in range(len(rates[0]))])
    subplots[-1].set_xlabel(label)
    if image is not None:
        bar = figure.colorbar(image, ax=subplots, shrink=0.6)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        bar.set_label("hit rate")
    return figure


def draw_depths(record: MapsRecord) -> Figure:
    depths = record["depths"]
    count = len(depths[0]["cosine"])
    lines = dash_repeats([depth["policy"] for depth in depths])
    series = [
        policy_series(
            depth["policy"], range(count), depth["cosine"],
            label=_short_name(depth["policy"]), line=line,
        )
        for depth, line in zip(depths, lines, strict=True)
    ]  # fmt: skip
    y = "cosine to vanilla's hidden state"
    figure = line_chart(series, "after layer", y, ylim=(None, 1.01), height=3.8)
    names = ["-", *map(str, range(count - 2)), "head"]
    ticks = [0, *range(1, count - 1, -(-(count - 2) // 8)), count - 1]
    figure.axes[0].set_xticks(ticks, [names[tick] for tick in ticks])
    return figure


def draw_activation(record: MapsRecord) -> Figure:
    experts = record["experts"]
    series = [
        Series(
            f"layer {layer['layer']}", range(1, 1 + len(layer["choices"])), layer["choices"],
            SeriesStyle(SERIES_COLOURS[index % len(SERIES_COLOURS)], "", ""),
        )
        for index, layer in enumerate(record["activation"])
    ]  # fmt: skip
    x, y = f"experts of {experts}, in descending order", "share of all selections"
    figure = line_chart(series, x, y, xlim=(0, experts + 1), ylim=(0, None), columns=4)
    ax = figure.axes[0]
    ax.axhline(1 / experts, color=foreground(), linestyle="--", linewidth=1)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    return figure


def _short_name(policy: str) -> str:
    return policy.replace(f",{GUARD_OPTIONS}", ", guarded").replace(":", " ")


def _fill_sentence(record: MapsRecord) -> str:
    plain, guarded = (m for m in record["maps"] if m["policy"].startswith(POLICIES[2]))
    clauses = [
        f"{kind} {plain['kinds'][kind]:.0%} and {guarded['kinds'][kind]:.0%}"
        for kind in POSITION_KINDS
    ]
    return (
        f"Hit rates under {plain['policy']} and under its guarded form, by kind of position: "
        f"{', '.join(clauses)}. Fill is {record['share']['fill']:.0%} of all positions."
    )


def _skew_sentence(record: MapsRecord) -> str:
    activation, experts = record["activation"], record["experts"]
    text = ", ".join(f"layer {entry['layer']} {entry['effective']:.0f}" for entry in activation)
    top = max(entry["choices"][0] for entry in activation) * experts
    return (
        "Over all blocks vanilla uses its experts nearly uniformly: the effective number of "
        f"{experts} is {text}, and the most used expert has {top:.1f} times its uniform share. A "
        "small coreset is possible because a single block uses fewer experts."
    )
