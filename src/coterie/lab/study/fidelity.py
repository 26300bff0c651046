"""How near policies stay to vanilla: the same inputs of the same layers, routed again by each.

Every number is a mean over looks; a look is one row in one layer in one decoding forward of
vanilla. *Words* are the positions of the answer up to its end-of-text, without the prompt before
and the fill behind; *open* ones are still masked. Intervals are bootstraps over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from coterie.engine.events import Result
from coterie.engine.observation import LayerObservation, moe_output, observe_forwards
from coterie.errors import CoterieError
from coterie.lab.study.context import StudyContext
from coterie.routing import needs_importance, parse_policy, route
from coterie.telemetry import routing_stats
from coterie.values import Routing, expert_mask

FloatArray = NDArray[np.float64]  # [.., columns]
ProgressCallback = Callable[[float], None]  # share of it done

MAX_LAYERS = 4  # of those that route, evenly spread: a large model's need not all be looked at
MAX_FORWARDS = 24  # of a row, from its first
SLOW_STEPS = 8  # forwards a block where steps are to be told apart: a sure model takes one or two
BOOTSTRAP_DRAWS = 1000
COLUMNS = (
    *("looks", "unique", "squared", "held", "votes", "hits", "choices", "loss", "cosine"),
    *("word_looks", "word_hits", "word_choices", "word_loss", "open_looks", "open_loss"),
)
COLUMN_INDEX = {name: place for place, name in enumerate(COLUMNS)}


class FidelityScores(TypedDict):
    """One policy; ``spread`` is the standard deviation of ``experts`` over looks.

    ``experts`` counts unique experts really used; ``mass`` votes for them (of all votes);
    ``loss`` |y - y_vanilla|^2 / |y_vanilla|^2 of the layer's output; ``cosine`` of the two.
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
    """A policy less the curve at the same number of experts, with its 95 % interval."""

    policy: str
    experts: float
    value: float  # of the policy
    curve: float  # of the curve there
    gap: float
    interval: list[float]


@dataclass(frozen=True)
class VanillaTrace:
    """Prompts that vanilla has answered once, so that later looks know where answers end."""

    prompts: tuple[str, ...]
    results: tuple[Result, ...]
    layers: tuple[int, ...]
    unmask: str

    @property
    def num_observations(self) -> int:
        """Rows in layers in forwards that ``see`` will be shown."""
        return sum(min(result.forwards, MAX_FORWARDS) for result in self.results) * len(self.layers)


@dataclass  # not frozen: it adds up
class FidelitySums:
    """Sums of every policy, prompt by prompt: [policies, prompts, columns]."""

    policies: tuple[str, ...]
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))


def trace_vanilla(context: StudyContext, *, slow: bool = False) -> VanillaTrace:
    """The lab's questions as the model is used, or ``slow``: in ``SLOW`` forwards a block."""
    prompts = context.questions()
    unmask = f"fixed:steps={SLOW_STEPS}" if slow else context.engine.generation.unmask
    results = observe_forwards(
        context.engine, prompts, lambda _: None, unmask=unmask, max_forwards=MAX_FORWARDS
    )
    if not any(result.forwards for result in results):
        raise CoterieError("no decoding forward was made")
    return VanillaTrace(tuple(prompts), tuple(results), sample_layers(context), unmask)


def sample_layers(context: StudyContext, count: int = MAX_LAYERS) -> tuple[int, ...]:
    """At most so many of the layers that route, the first and the last among them."""
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
    """Vanilla's forwards once more, shown to ``see``."""
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


def content_mask(trace: VanillaTrace, observation: LayerObservation) -> Tensor:
    """Bool [S, N]: positions of the answer, its end-of-text included."""
    position = torch.tensor(observation.starts)[:, None] + torch.arange(observation.x.shape[1])
    ends = torch.tensor([trace.results[row].new_tokens for row in observation.rows])[:, None]
    return ((position >= 0) & (position <= ends)).to(observation.x.device)


def compare_policies(
    context: StudyContext,
    trace: VanillaTrace,
    policies: Sequence[str],
    on_progress: ProgressCallback,
) -> FidelitySums:
    """Every policy on every look. Memory: one layer of one forward."""
    parsed = [parse_policy(policy) for policy in policies]
    if any(map(needs_importance, parsed)):
        raise CoterieError("importance is not watched: mc-moe cannot be compared here")
    sums = torch.zeros(len(policies), len(trace.prompts), len(COLUMNS), dtype=torch.float64)

    def on_layer(observation: LayerObservation) -> None:
        vanilla_output = moe_output(context.engine.model, observation, observation.routing)
        content = content_mask(trace, observation)
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
    """[S, columns] float64 of one policy in one layer; outputs are [S, N, H], words [S, N]."""
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
        raise RuntimeError("the engine tells how far decoding is")
    return progress.masked


def count_kept_experts(observation: LayerObservation, routing: Routing) -> Tensor:
    """[S, N]: how many of a token's own experts it still has."""
    shape = observation.scores.logits.shape
    in_use = expert_mask(routing.topk_ids, shape[-1])  # [T, E]
    return in_use.gather(-1, routing.vanilla_ids).sum(-1).view(shape[:2])


METRICS: Mapping[str, Callable[[FloatArray], FloatArray]] = {  # each from sums [.., columns]
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
    """One a policy, in their order."""
    totals, samples = fidelity.sums.sum(dim=1).numpy(), bootstrap(fidelity.sums)
    values_by_metric = {name: figure(totals) for name, figure in METRICS.items()}
    squares = _ratio(totals, "squared", "looks") - values_by_metric["experts"] ** 2
    intervals = {name: _interval(METRICS[name](samples)) for name in ("recall", "loss")}
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
    fidelity: FidelitySums, policies: Sequence[str], curve: Sequence[str], figure: str = "loss"
) -> list[CurveGap]:
    """How each policy's figure differs from a curve of policies, at the policy's own size.

    Between the curve's points it is taken as straight; a policy beyond its ends is left out.
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
        value, curve_value = _value_and_curve(totals, index, curve_indices, figure)
        gap = np.subtract(*_value_and_curve(samples, index, curve_indices, figure))
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


def bootstrap(sums: Tensor, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> FloatArray:
    """Bootstrap over prompts: [policies, prompts, C] -> [draws, policies, C]."""
    prompts = sums.shape[1]
    weights = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, size=draws)
    return np.einsum("dn,pnc->dpc", weights.astype(np.float64), sums.numpy())


def _value_and_curve(
    sums: FloatArray, index: int, curve_indices: Sequence[int], figure: str
) -> tuple[FloatArray, FloatArray]:
    """[draws] twice: the policy's figure, and the curve's at the policy's number of experts."""
    sizes, values = METRICS["experts"](sums), METRICS[figure](sums)
    order = np.argsort(sizes[:, curve_indices], axis=1, kind="stable")
    ends, heights = (
        np.take_along_axis(array[:, curve_indices], order, axis=1) for array in (sizes, values)
    )
    return values[:, index], interpolate(sizes[:, index], ends, heights)


def interpolate(size: FloatArray, ends: FloatArray, heights: FloatArray) -> FloatArray:
    """[draws]: at size [draws] on lines through (ends, heights) [draws, points], from left to
    right; the ends' heights go on beyond them."""
    right = (ends < size[:, None]).sum(axis=1).clip(1, ends.shape[1] - 1)[:, None]
    (x0, x1), (y0, y1) = (
        [np.take_along_axis(array, index, axis=1)[:, 0] for index in (right - 1, right)]
        for array in (ends, heights)
    )
    share = np.where(x1 > x0, (size - x0) / np.where(x1 > x0, x1 - x0, 1.0), 1.0)
    return y0 + share.clip(0.0, 1.0) * (y1 - y0)


def _masked_share(error: Tensor, total: Tensor, mask: Tensor) -> Tensor:
    """[S]: missed of whole [S, N] at some positions; 0 where there are none."""
    return (error * mask).sum(-1) / (total * mask).sum(-1).where(mask.any(-1), 1.0)


def _ratio(sums: FloatArray, numerator_name: str, denominator_name: str) -> FloatArray:
    """Where nothing was looked at, of choices: all kept; of losses: none."""
    denominator = sums[..., COLUMN_INDEX[denominator_name]]
    default = 1.0 if denominator_name in ("choices", "word_choices", "votes") else 0.0
    return np.where(
        denominator > 0,
        sums[..., COLUMN_INDEX[numerator_name]] / np.where(denominator > 0, denominator, 1.0),
        default,
    )


def _interval(samples: FloatArray) -> list[list[float]]:
    """[draws, n] -> n pairs: the middle 95 %."""
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    return [[float(a), float(b)] for a, b in zip(low, high, strict=True)]
