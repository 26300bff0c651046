"""Differences to vanilla by position and depth: hit rates, cosines, expert activation (Fig. 9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.engine.observation import LayerObservation
from coterie.lab.plotting import (
    Series,
    dash_repeats,
    guide_series,
    indexed_style,
    line_chart,
    new_panels,
    policy_series,
)
from coterie.lab.study.experiment import Entry, Experiment, Part, StudyContext
from coterie.lab.study.fidelity import (
    BlockForward,
    Prompt,
    content_mask,
    count_kept_experts,
    observe_vanilla,
    prompts_at_block_start,
    run_first_forward,
    sample_layers,
)
from coterie.lab.study.variants import GUARD_OPTIONS, short_name
from coterie.routing import parse_policy, route
from coterie.values import Routing

POLICIES = (
    *("des-vote:beta=0.3", "des-seq:k=3"),
    *("des-vote:beta=0.15", f"des-vote:beta=0.15,{GUARD_OPTIONS}"),
)
DEPTH_POLICIES = (  # compared layer by layer
    *("des-vote:beta=0.5", "des-vote:beta=0.3", f"des-vote:beta=0.3,{GUARD_OPTIONS}"),
    *("des-seq:k=3", "des-vote:beta=0.15", "topk:k=4", "random:beta=0.3"),
)
SLOW_STEPS = 8  # forwards per block in slow decoding; a confident model needs one or two
POSITION_KINDS = ("masked", "written", "fill")


class MapsExperiment(Experiment, name="maps"):
    """Hit rates in slow decoding (eight forwards per block); hidden states in first forwards.

    In the first forward of a block, vanilla and the policy have the same input. In the record,
    ``share`` has the kinds of the observed positions: still masked, written, and filled after the
    end-of-text token.
    """

    def measure(self, context: StudyContext) -> Entry:
        router, engine = context.engine.model.spec.router, context.engine
        context.on_progress(0.0, "slow decoding")
        questions, layers = context.questions(), sample_layers(context)
        hit_rates = HitRateCounter(POLICIES, layers)
        routings: dict[int, list[Routing]] = {layer: [] for layer in layers}
        finished = count(1)

        def on_layer(observation: LayerObservation) -> None:
            hit_rates.on_layer(observation)
            routings[observation.layer].append(observation.routing)

        def on_result(_: Result) -> None:
            context.on_progress(0.6 * next(finished) / len(questions), "hit rates")

        observe_vanilla(context, on_layer, unmask=f"fixed:steps={SLOW_STEPS}", on_result=on_result)
        prompts = prompts_at_block_start(engine, questions)
        depths = []
        for index, policy in enumerate(DEPTH_POLICIES):
            share = 0.6 + 0.4 * index / len(DEPTH_POLICIES)
            context.on_progress(share, f"hidden states, {policy}")
            depths.append(depth_cosines(engine, prompts, policy))
        return {
            "experts": router.experts,
            "k": router.k,
            "prompts": len(questions),
            "blocks": len(prompts),
            "layers": list(layers),
            **hit_rates.to_record(),
            "depths": depths,
            "activation": [
                expert_activation(layer, of_layer, router.experts)
                for layer, of_layer in routings.items()
            ],
        }

    def report(self, record: Entry) -> Iterator[Part]:
        draws = {
            "hit-rate-positions": partial(_draw_maps, record, "positions", "position in the block"),
            "hit-rate-steps": partial(_draw_maps, record, "steps", "forward of the block"),
            "cosine-by-depth": partial(_draw_depths, record),
            "sorted-activation": partial(_draw_activation, record),
        }
        for name, draw in draws.items():
            yield self.text.drawing(name, draw, name, record=record, steps=SLOW_STEPS)
        shares, rows = record["share"], [_at_head(entry) for entry in record["depths"]]
        by_kind = {f"{k} ({shares[k]:.0%})": f"{{kinds[{k}]:.1%}}" for k in POSITION_KINDS}
        yield self.text.table("kinds", record["maps"], by_kind)
        yield self.text.table("depths", rows)
        plain, guarded = (m for m in record["maps"] if m["policy"].startswith(POLICIES[2]))
        kinds = [
            f"{kind} {plain['kinds'][kind]:.0%} and {guarded['kinds'][kind]:.0%}"
            for kind in POSITION_KINDS
        ]
        yield self.text.sentence("kinds", plain=plain, kinds=", ".join(kinds), record=record)
        depths = {row["policy"]: row for row in rows}
        vote, seq, topk, random = (
            depths[policy]
            for policy in ("des-vote:beta=0.3", "des-seq:k=3", "topk:k=4", "random:beta=0.3")
        )
        beats_seq, beats_random = (vote["cosine"] > other["cosine"] for other in (seq, random))
        yield self.text.finding("seq", beats_seq, vote=vote, seq=seq)
        yield self.text.finding("random", beats_random, random=random, topk=topk)
        layers = [f"layer {e['layer']} {e['effective']:.0f}" for e in record["activation"]]
        top = max(entry["choices"][0] for entry in record["activation"]) * record["experts"]
        yield self.text.sentence("skew", layers=", ".join(layers), top=top, record=record)


@dataclass(frozen=True)
class HitRateCounter:
    """The share of its own experts that each token keeps, per policy, on vanilla's inputs."""

    policies: tuple[str, ...]
    layers: tuple[int, ...]
    # Per observation, [4 + policies, tokens]: layer, position, forward, kind, a rate per policy.
    _tokens: list[Tensor] = field(default_factory=list)
    _first_forward: dict[tuple[int, int], int] = field(default_factory=dict)  # row, start

    def on_layer(self, observation: LayerObservation) -> None:
        scores = observation.scores
        rates = [
            count_kept_experts(observation, route(scores, parse_policy(policy))) / scores.router.k
            for policy in self.policies
        ]
        columns = [
            torch.tensor(self.layers.index(observation.layer)),
            torch.arange(observation.x.shape[1]),
            self._steps(observation)[:, None],
            position_kinds(observation),
            *rates,
        ]
        shape = observation.x.shape[:2]
        flat = [column.double().cpu().expand(shape).flatten() for column in columns]
        self._tokens.append(torch.stack(flat))

    def to_record(self) -> Entry:
        """``share`` of the kinds of position, and ``maps``: hit rates of each policy.

        They are [layers][positions], [layers][forwards of a block], and by kind.
        """
        tokens = torch.cat(self._tokens, dim=1)
        (layer, position, step, kind), rates = tokens[:4].long(), tokens[4:]
        is_kind = F.one_hot(kind, len(POSITION_KINDS)).double()  # [tokens, kinds]
        maps = [
            {
                "policy": policy,
                "positions": _group_means(rate, layer, position),
                "steps": _group_means(rate, layer, step),
                "kinds": _by_kind(rate @ is_kind / is_kind.sum(0).clamp(min=1)),
            }
            for policy, rate in zip(self.policies, rates, strict=True)
        ]
        return {"share": _by_kind(is_kind.mean(0)), "maps": maps}

    def _steps(self, observation: LayerObservation) -> Tensor:
        """[S]: the index of this forward in its block."""
        keys = zip(observation.rows, observation.starts, strict=True)
        forwards = zip(keys, observation.scores.forward_indices, strict=True)
        return torch.tensor([n - self._first_forward.setdefault(key, n) for key, n in forwards])


def _by_kind(values: Tensor) -> dict[str, float]:
    return dict(zip(POSITION_KINDS, values.tolist(), strict=True))


def _group_means(values: Tensor, rows: Tensor, columns: Tensor) -> list[list[float]]:
    """The mean value of each row and column [n]; 0 where there is none."""
    sums, counts = torch.zeros(2, int(rows.max()) + 1, int(columns.max()) + 1, dtype=values.dtype)
    sums.index_put_((rows, columns), values, accumulate=True)
    counts.index_put_((rows, columns), torch.ones_like(values), accumulate=True)
    return (sums / counts.clamp(min=1)).tolist()


def position_kinds(observation: LayerObservation) -> Tensor:
    """[S, N]: indices of ``POSITION_KINDS``."""
    progress = observation.scores.progress
    if progress is None or progress.masked is None or progress.after_eos is None:
        raise RuntimeError("the observation has no decoding progress")
    return (1 + progress.after_eos.long()).where(~progress.masked, 0)


def expert_activation(layer: int, routings: Sequence[Routing], experts: int) -> Entry:
    """Shares of all selections and of their weights in a layer, each in descending order.

    ``effective`` is exp of the entropy of the selections.
    """
    ids = torch.cat([routing.topk_ids.flatten() for routing in routings])
    weights = torch.cat([routing.topk_weights.flatten().double() for routing in routings])
    choices, weight = (
        torch.bincount(ids, each / each.sum(), minlength=experts).sort(descending=True).values
        for each in (torch.ones_like(weights), weights)
    )
    effective = float((-torch.xlogy(choices, choices).sum()).exp())
    lists = {"choices": choices.tolist(), "weight": weight.tolist()}
    return {"layer": layer, **lists, "effective": effective}


def depth_cosines(engine: Engine, prompts: Sequence[Prompt], policy: str) -> Entry:
    """Mean cosines of hidden states to vanilla's in the first blocks of these prompts.

    ``cosine`` (all positions) and ``words`` (answer tokens) are lists: after the embedding, after
    each layer, before the head. ``low`` is the lowest tenth before the head, ``same`` the share of
    positions with the same most likely token, ``experts`` are those in use per layer.
    """
    cosine_means, content_means, last_cosines, same_tokens, sizes = [], [], [], [], []
    for prompt in prompts:
        vanilla, other = (run_first_forward(engine, prompt, name) for name in ("vanilla", policy))
        states = zip(_hidden_states(vanilla), _hidden_states(other), strict=True)
        cosines = torch.stack(
            [F.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in states]
        )  # [2 + layers, N]
        content = content_mask(engine, vanilla.ids)[0]
        cosine_means.append(cosines.mean(-1))
        content_means.append(cosines[:, content].mean(-1))
        last_cosines.append(cosines[-1])
        same_tokens.append((vanilla.ids == other.ids).double().mean())
        sizes += [routing.used.sum() for _, _, routing in other.trace.routings]
    return {
        "policy": policy,
        "experts": float(torch.stack(sizes).double().mean()),
        "cosine": torch.stack(cosine_means).mean(0).tolist(),
        "words": torch.stack(content_means).mean(0).tolist(),
        "low": float(torch.quantile(torch.cat(last_cosines), 0.1)),
        "same": float(torch.stack(same_tokens).mean()),
    }


def _at_head(entry: Entry) -> dict[str, Any]:
    """An entry of ``depths`` with the cosines before the head only."""
    return {**entry, "cosine": entry["cosine"][-1], "words": entry["words"][-1]}


def _hidden_states(forward: BlockForward) -> list[Tensor]:
    """Hidden states [N, H] of the block after the embedding, after each layer, before the head."""
    *layers, _ = forward.trace.outputs
    return [*(x[0, forward.block] for _, x in layers), forward.hidden[0]]


def _draw_maps(record: Entry, key: str, label: str) -> Figure:
    """One panel per policy, all on one scale."""
    maps, layers = record["maps"], record["layers"]
    figure, subplots = new_panels(len(maps), columns=1, height=1.25)
    low = min(min(map(min, entry[key])) for entry in maps)
    images = []
    for entry, ax in zip(maps, subplots, strict=True):
        rates = np.array(entry[key])
        images.append(ax.imshow(rates, aspect="auto", vmin=low, vmax=1))
        ax.set_title(short_name(entry["policy"]).replace(":", " "), fontsize=9)
        ax.set(yticks=range(len(layers)), yticklabels=layers, ylabel="layer")
        ax.grid(visible=False)
        if key == "steps":
            steps = range(rates.shape[1])
            ax.set_xticks(steps, [str(step + 1) for step in steps])
    subplots[-1].set_xlabel(label)
    bar = figure.colorbar(images[-1], ax=subplots, shrink=0.6, label="hit rate")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return figure


def _draw_depths(record: Entry) -> Figure:
    depths, policies = record["depths"], [entry["policy"] for entry in record["depths"]]
    size = len(depths[0]["cosine"])
    labels = [short_name(policy).replace(":", " ") for policy in policies]
    series = [
        policy_series(entry["policy"], range(size), entry["cosine"], label=label, line=line)
        for entry, label, line in zip(depths, labels, dash_repeats(policies), strict=True)
    ]
    y = "cosine to vanilla's hidden state"
    figure = line_chart(series, "after layer", y, ylim=(None, 1.01), height=3.8)
    names = ["-", *map(str, range(size - 2)), "head"]
    ticks = [0, *range(1, size - 1, -(-(size - 2) // 8)), size - 1]
    figure.axes[0].set_xticks(ticks, [names[tick] for tick in ticks])
    return figure


def _draw_activation(record: Entry) -> Figure:
    experts, series = record["experts"], []
    for index, layer in enumerate(record["activation"]):
        x, style = range(1, 1 + experts), replace(indexed_style(index), marker="")
        series.append(Series(f"layer {layer['layer']}", x, layer["choices"], style))
    series.append(guide_series((0, experts + 1), (1 / experts, 1 / experts)))
    x, y = f"experts of {experts}, in descending order", "share of all selections"
    figure = line_chart(series, x, y, xlim=(0, experts + 1), ylim=(0, None), columns=4)
    figure.axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    return figure
