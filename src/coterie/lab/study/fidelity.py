"""Fidelity of policies to vanilla: the inputs of the same layers, routed by each policy.

Every number is a mean over observations; an observation is one row in one layer in one decoding
forward of vanilla. In keys, ``word`` marks the tokens of the answer up to the end-of-text token,
without the prompt before them and the fill after them; ``open`` marks those still masked.
Intervals are bootstraps over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from coterie.engine.events import Result
from coterie.engine.observation import LayerObservation, moe_output, observe_forwards
from coterie.errors import CoterieError
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Table, format_interval, make_table
from coterie.routing import needs_importance, parse_policy, route
from coterie.telemetry import routing_stats
from coterie.values import Routing, expert_mask

FloatArray = NDArray[np.float64]  # [.., columns]
ProgressCallback = Callable[[float], None]  # the share done
Metric = Literal[
    "recall", "loss", "word_recall", "word_loss", "open_loss", "experts", "mass", "cosine"
]

MAX_LAYERS = 4  # MoE layers observed, evenly spread over a large model
MAX_FORWARDS = 24  # forwards observed per row, from its first
SLOW_STEPS = 8  # forwards per block in slow decoding; a confident model needs one or two
BOOTSTRAP_DRAWS = 1000
COLUMNS = (
    *("looks", "unique", "squared", "held", "votes", "hits", "choices", "loss", "cosine"),
    *("word_looks", "word_hits", "word_choices", "word_loss", "open_looks", "open_loss"),
)
COLUMN_INDEX = {name: index for index, name in enumerate(COLUMNS)}
METRIC_NAMES: Mapping[Metric, str] = {
    "experts": "unique experts",
    "mass": "votes kept",
    "recall": "top-K recall",
    "word_recall": "top-K recall, answer tokens",
    "loss": "reconstruction loss",
    "word_loss": "reconstruction loss, answer tokens",
    "open_loss": "reconstruction loss, masked answer tokens",
    "cosine": "cosine of the layer's output",
}


class FidelityScores(TypedDict):
    """The metrics of one policy; ``spread`` is the standard deviation of ``experts``.

    ``experts`` counts unique experts in use, ``mass`` is their share of the votes, ``loss`` is
    |y - y_vanilla|^2 / |y_vanilla|^2 of the layer's output y, and ``cosine`` is that of y.
    """

    policy: str
    experts: float
    spread: float
    mass: float
    recall: float
    loss: float
    cosine: float
    word_recall: float
    word_loss: float
    open_loss: float
    recall_interval: list[float]
    loss_interval: list[float]


class CurveGap(TypedDict):
    """A policy minus a curve at the same number of experts, with its 95 % interval."""

    policy: str
    experts: float
    value: float  # of the policy
    curve: float  # of the curve there
    gap: float
    interval: list[float]


@dataclass(frozen=True)
class VanillaTrace:
    """Prompts answered once by vanilla, which fixes where the answers end."""

    prompts: tuple[str, ...]
    results: tuple[Result, ...]
    layers: tuple[int, ...]
    unmask: str

    @property
    def num_observations(self) -> int:
        """The number of observations that a replay yields."""
        return sum(min(result.forwards, MAX_FORWARDS) for result in self.results) * len(self.layers)


@dataclass  # mutable: it accumulates
class FidelitySums:
    """Sums per policy and prompt: [policies, prompts, columns]."""

    policies: tuple[str, ...]
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))


def trace_vanilla(context: StudyContext, *, slow: bool = False) -> VanillaTrace:
    """Answer the study's prompts with vanilla; ``slow`` uses ``SLOW_STEPS`` forwards per block."""
    prompts = context.questions()
    unmask = f"fixed:steps={SLOW_STEPS}" if slow else context.engine.generation.unmask
    results = observe_forwards(
        context.engine, prompts, lambda _: None, unmask=unmask, max_forwards=MAX_FORWARDS
    )
    if not any(result.forwards for result in results):
        raise CoterieError("no decoding forward was made")
    return VanillaTrace(tuple(prompts), tuple(results), sample_layers(context), unmask)


def sample_layers(context: StudyContext, count: int = MAX_LAYERS) -> tuple[int, ...]:
    """At most ``count`` of the MoE layers, with the first and the last."""
    moe_layers = context.engine.model.spec.moe_layers
    if len(moe_layers) <= count:
        return moe_layers
    indices = np.linspace(0, len(moe_layers) - 1, count).round().astype(int)
    return tuple(moe_layers[index] for index in indices)


def replay_vanilla(
    context: StudyContext,
    trace: VanillaTrace,
    on_layer: Callable[[LayerObservation], None],
    on_progress: ProgressCallback,
) -> None:
    """Run vanilla's forwards again and pass every observation to ``on_layer``."""
    num_done = 0

    def on_observation(observation: LayerObservation) -> None:
        nonlocal num_done
        on_layer(observation)
        num_done += len(observation.rows)
        on_progress(min(1.0, num_done / max(1, trace.num_observations)))

    observe_forwards(
        context.engine,
        trace.prompts,
        on_observation,
        layers=trace.layers,
        max_forwards=MAX_FORWARDS,
        unmask=trace.unmask,
    )


def answer_mask(trace: VanillaTrace, observation: LayerObservation) -> Tensor:
    """Bool [S, N]: positions of the answer, including its end-of-text token."""
    position = torch.tensor(observation.starts)[:, None] + torch.arange(observation.x.shape[1])
    ends = torch.tensor([trace.results[row].new_tokens for row in observation.rows])[:, None]
    return ((position >= 0) & (position <= ends)).to(observation.x.device)


def compare_policies(
    context: StudyContext,
    trace: VanillaTrace,
    policies: Sequence[str],
    on_progress: ProgressCallback,
) -> FidelitySums:
    """Measure every policy on every observation. Memory: one layer of one forward."""
    parsed = [parse_policy(policy) for policy in policies]
    if any(map(needs_importance, parsed)):
        raise CoterieError("mc-moe needs token importance, which is not recorded here")
    sums = torch.zeros(len(policies), len(trace.prompts), len(COLUMNS), dtype=torch.float64)

    def on_layer(observation: LayerObservation) -> None:
        vanilla_output = moe_output(context.engine.model, observation, observation.routing)
        content = answer_mask(trace, observation)
        rows = torch.tensor(observation.rows)
        for number, policy in enumerate(parsed):
            routing = route(observation.scores, policy)
            output = moe_output(context.engine.model, observation, routing)
            sums[number].index_add_(
                0, rows, measure_layer(observation, routing, output, vanilla_output, content).cpu()
            )

    replay_vanilla(context, trace, on_layer, on_progress)
    return FidelitySums(tuple(policies), sums)


def measure_layer(
    observation: LayerObservation,
    routing: Routing,
    output: Tensor,
    vanilla_output: Tensor,
    words: Tensor,
) -> Tensor:
    """[S, columns] float64 of one policy in one layer; outputs are [S, N, H], ``words`` [S, N]."""
    unique, _, votes_kept, votes, hits, choices = routing_stats(observation.scores, routing).unbind(
        -1
    )
    squared_error = (output.double() - vanilla_output.double()).square().sum(-1)  # [S, N]
    squared_norm = vanilla_output.double().square().sum(-1)
    cosine = F.cosine_similarity(output.double(), vanilla_output.double(), dim=-1).mean(-1)
    kept_experts = count_kept_experts(observation, routing)
    masked_words = words & masked_positions(observation)
    columns = {
        "looks": torch.ones_like(unique),
        "unique": unique,
        "squared": unique.square(),
        "held": votes_kept,
        "votes": votes,
        "hits": hits,
        "choices": choices,
        "loss": squared_error.sum(-1) / squared_norm.sum(-1),
        "cosine": cosine,
        "word_looks": words.any(-1).double(),
        "word_hits": (kept_experts * words).sum(-1).double(),
        "word_choices": (words.sum(-1) * observation.scores.router.k).double(),
        "word_loss": _masked_share(squared_error, squared_norm, words),
        "open_looks": masked_words.any(-1).double(),
        "open_loss": _masked_share(squared_error, squared_norm, masked_words),
    }
    return torch.stack([columns[name] for name in COLUMNS], dim=-1)


def masked_positions(observation: LayerObservation) -> Tensor:
    """Bool [S, N]: positions still masked."""
    progress = observation.scores.progress
    if progress is None or progress.masked is None:
        raise RuntimeError("the observation has no decoding progress")
    return progress.masked


def count_kept_experts(observation: LayerObservation, routing: Routing) -> Tensor:
    """[S, N]: how many of its own experts each token keeps."""
    shape = observation.scores.logits.shape
    in_use = expert_mask(routing.topk_ids, shape[-1])  # [T, E]
    return in_use.gather(-1, routing.vanilla_ids).sum(-1).view(shape[:2])


METRICS: Mapping[Metric, Callable[[FloatArray], FloatArray]] = {  # from sums [.., columns]
    "experts": lambda sums: _ratio(sums, "unique", "looks"),
    "mass": lambda sums: _ratio(sums, "held", "votes"),
    "recall": lambda sums: _ratio(sums, "hits", "choices"),
    "loss": lambda sums: _ratio(sums, "loss", "looks"),
    "cosine": lambda sums: _ratio(sums, "cosine", "looks"),
    "word_recall": lambda sums: _ratio(sums, "word_hits", "word_choices"),
    "word_loss": lambda sums: _ratio(sums, "word_loss", "word_looks"),
    "open_loss": lambda sums: _ratio(sums, "open_loss", "open_looks"),
}


def fidelity_scores(fidelity: FidelitySums) -> list[FidelityScores]:
    """The scores of every policy, in order."""
    totals, samples = fidelity.sums.sum(dim=1).numpy(), bootstrap(fidelity.sums)
    values_by_metric = {name: metric(totals) for name, metric in METRICS.items()}
    squares = _ratio(totals, "squared", "looks") - values_by_metric["experts"] ** 2
    interval_metrics: tuple[Metric, ...] = ("recall", "loss")
    intervals = {name: _interval(METRICS[name](samples)) for name in interval_metrics}
    return [
        cast(
            "FidelityScores",
            {
                "policy": policy,
                **{name: float(values[index]) for name, values in values_by_metric.items()},
                "spread": float(np.sqrt(max(0.0, squares[index]))),
                **{f"{name}_interval": ends[index] for name, ends in intervals.items()},
            },
        )
        for index, policy in enumerate(fidelity.policies)
    ]


def gaps_to_curve(
    fidelity: FidelitySums, policies: Sequence[str], curve: Sequence[str], metric: Metric = "loss"
) -> list[CurveGap]:
    """Each policy's metric minus that of a curve of policies, at the policy's own size.

    The curve is linear between its points; a policy beyond its ends is omitted.
    """
    totals, samples = fidelity.sums.sum(dim=1).numpy()[None], bootstrap(fidelity.sums)
    curve_indices = [fidelity.policies.index(policy) for policy in curve]
    curve_gaps = []
    for policy in policies:
        index = fidelity.policies.index(policy)
        size = float(METRICS["experts"](totals)[0, index])
        ends = METRICS["experts"](totals)[0, curve_indices]
        if not ends.min() <= size <= ends.max():
            continue
        value, curve_value = _value_and_curve(totals, index, curve_indices, metric)
        gap = np.subtract(*_value_and_curve(samples, index, curve_indices, metric))
        curve_gaps.append(
            CurveGap(
                policy=policy,
                experts=size,
                value=float(value[0]),
                curve=float(curve_value[0]),
                gap=float(value[0] - curve_value[0]),
                interval=_interval(gap[:, None])[0],
            )
        )
    return curve_gaps


def metric_gaps(
    fidelity: FidelitySums, policies: Sequence[str], curve: Sequence[str], metrics: Sequence[Metric]
) -> dict[Metric, list[CurveGap]]:
    """``gaps_to_curve`` for each of these metrics."""
    return {metric: gaps_to_curve(fidelity, policies, curve, metric) for metric in metrics}


def compare_to_curve(gap: CurveGap, metric: Metric) -> int:
    """1 where the policy beats the curve beyond the interval, -1 where it loses, else 0."""
    sign = -1 if metric.endswith("loss") else 1
    low, high = sorted(sign * end for end in gap["interval"])
    return int(low > 0) - int(high < 0)


def count_outcomes(gaps: Sequence[CurveGap], metric: Metric) -> tuple[int, int, int]:
    """The numbers of sizes at which policies are better than the curve, worse, and similar."""
    signs = [compare_to_curve(gap, metric) for gap in gaps]
    return signs.count(1), signs.count(-1), signs.count(0)


def outcomes_text(gaps_by_metric: Mapping[Metric, Sequence[CurveGap]]) -> str:
    """Metric by metric: the numbers of sizes that are better, worse and similar."""
    clauses = []
    for metric, gaps in gaps_by_metric.items():
        better, worse, similar = count_outcomes(gaps, metric)
        clauses.append(f"{METRIC_NAMES[metric]} {better} better, {worse} worse, {similar} similar")
    return "; ".join(clauses)


def gaps_table(
    gaps_by_metric: Mapping[Metric, Sequence[CurveGap]], first_head: str, caption: str
) -> Table:
    """One policy per row, one metric per column: the gap to the curve."""
    by_policy: dict[str, list[str]] = {}
    for gap in (gap for gaps in gaps_by_metric.values() for gap in gaps):
        row = by_policy.setdefault(gap["policy"], [gap["policy"], f"{gap['experts']:.1f}"])
        row.append(format_interval(gap["gap"], gap["interval"], "+.3f"))
    heads = [first_head, "experts", *(METRIC_NAMES[metric] for metric in gaps_by_metric)]
    return Table(heads, list(by_policy.values()), caption, range(1, len(heads)))


def scores_table(scores: Sequence[FidelityScores], caption: str) -> Table:
    """One policy per row."""
    return make_table(
        caption,
        scores,
        {
            "policy": "{policy}",
            "experts": "{experts:.1f}",
            "votes kept": "{mass:.1%}",
            "recall": "{recall:.1%}",
            "recall, answer tokens": "{word_recall:.1%}",
            "loss": "{loss:.3f}",
            "loss, answer tokens": "{word_loss:.3f}",
            "loss, masked answer tokens": "{open_loss:.3f}",
        },
    )


def bootstrap(sums: Tensor, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> FloatArray:
    """Bootstrap over prompts: [policies, prompts, C] -> [draws, policies, C]."""
    prompts = sums.shape[1]
    weights = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, size=draws)
    return np.einsum("dn,pnc->dpc", weights.astype(np.float64), sums.numpy())


def _value_and_curve(
    sums: FloatArray, index: int, curve_indices: Sequence[int], metric: Metric
) -> tuple[FloatArray, FloatArray]:
    """[draws] twice: the policy's metric, and the curve's at the policy's number of experts."""
    sizes, values = METRICS["experts"](sums), METRICS[metric](sums)
    order = np.argsort(sizes[:, curve_indices], axis=1, kind="stable")
    ends, heights = (
        np.take_along_axis(array[:, curve_indices], order, axis=1) for array in (sizes, values)
    )
    return values[:, index], interpolate(sizes[:, index], ends, heights)


def interpolate(size: FloatArray, ends: FloatArray, heights: FloatArray) -> FloatArray:
    """[draws]: linear interpolation at size [draws] through (ends, heights) [draws, points].

    ``ends`` ascend; beyond them the first and last heights continue.
    """
    right = (ends < size[:, None]).sum(axis=1).clip(1, ends.shape[1] - 1)[:, None]
    (x0, x1), (y0, y1) = (
        [np.take_along_axis(array, index, axis=1)[:, 0] for index in (right - 1, right)]
        for array in (ends, heights)
    )
    share = np.where(x1 > x0, (size - x0) / np.where(x1 > x0, x1 - x0, 1.0), 1.0)
    return y0 + share.clip(0.0, 1.0) * (y1 - y0)


def _masked_share(error: Tensor, total: Tensor, mask: Tensor) -> Tensor:
    """[S]: the ratio of two [S, N] summed over ``mask``; 0 where the mask is empty."""
    return (error * mask).sum(-1) / (total * mask).sum(-1).where(mask.any(-1), 1.0)


def _ratio(sums: FloatArray, numerator_name: str, denominator_name: str) -> FloatArray:
    """The ratio of two columns; without observations, 1 for shares kept and 0 for losses."""
    denominator = sums[..., COLUMN_INDEX[denominator_name]]
    default = 1.0 if denominator_name in ("choices", "word_choices", "votes") else 0.0
    return np.where(
        denominator > 0,
        sums[..., COLUMN_INDEX[numerator_name]] / np.where(denominator > 0, denominator, 1.0),
        default,
    )


def _interval(samples: FloatArray) -> list[list[float]]:
    """[draws, n] -> n pairs: the central 95 %."""
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    return [[float(a), float(b)] for a, b in zip(low, high, strict=True)]
