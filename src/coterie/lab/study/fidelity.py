"""Fidelity of policies to vanilla: on the inputs of the same layers, and in first forwards.

In the first forward of a block, every position is masked and belongs to the answer. Every number
on layers is a mean over observations; an observation is one row in one layer in one decoding
forward of vanilla. In keys, ``word`` marks the tokens of the answer up to the end-of-text token,
without the prompt before them and the fill after them; ``open`` marks those still masked.
Intervals are bootstraps over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.engine.observation import LayerObservation, first_forward, moe_output, observe_forwards
from coterie.errors import CoterieError, TaskError
from coterie.lab.evals.stats import central_interval
from coterie.lab.study.experiment import Entry, StudyContext
from coterie.routing import needs_importance, parse_policy, route
from coterie.telemetry import TensorRecorder, routing_stats
from coterie.values import Policy, Routing, expert_mask

FloatArray = NDArray[np.float64]
Metric = Literal["experts", "mass", "recall", "loss", "word_recall", "word_loss", "open_loss"]

MAX_LAYERS = 4  # MoE layers observed, evenly spread over a large model
MAX_FORWARDS = 24  # forwards observed per row, from its first
BOOTSTRAP_DRAWS = 1000
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class FidelitySums:
    """Sums per policy and prompt: [policies, prompts, metrics, numerator and denominator]."""

    policies: tuple[str, ...]
    sums: Tensor

    @property
    def num_observations(self) -> int:
        return int(self.sums[0, :, METRICS.index("loss"), 1].sum())

    @cached_property
    def samples(self) -> FloatArray:
        """Sums over prompts, [1 + draws, ..]: over all of them, then over bootstrap samples."""
        prompts = self.sums.shape[1]
        rng = np.random.default_rng(0)
        draws = rng.multinomial(prompts, [1 / prompts] * prompts, size=BOOTSTRAP_DRAWS)
        return np.einsum("dn,pn...->dp...", np.vstack([np.ones(prompts), draws]), self.sums.numpy())

    def values(self, metric: Metric) -> FloatArray:
        """[1 + draws, policies]; without observations, 1 for shares kept and 0 for losses."""
        numerator, denominator = np.moveaxis(self.samples[:, :, METRICS.index(metric)], -1, 0)
        default = np.full_like(numerator, metric in ("mass", "recall", "word_recall"))
        return np.divide(numerator, denominator, out=default, where=denominator > 0)


def observe_vanilla(
    context: StudyContext, on_layer: Callable[[LayerObservation], None], **options: Any
) -> list[Result]:
    """Answer the study's prompts with vanilla; ``options`` are those of ``observe_forwards``."""
    results = observe_forwards(
        context.engine,
        context.questions(),
        on_layer,
        layers=sample_layers(context),
        max_forwards=MAX_FORWARDS,
        **options,
    )
    if not any(result.forwards for result in results):
        raise CoterieError("no decoding forward was made")
    return results


def sample_layers(context: StudyContext, count: int = MAX_LAYERS) -> tuple[int, ...]:
    """At most ``count`` of the MoE layers, with the first and the last."""
    moe_layers = context.engine.model.spec.moe_layers
    if len(moe_layers) <= count:
        return moe_layers
    indices = np.linspace(0, len(moe_layers) - 1, count).round().astype(int)
    return tuple(moe_layers[index] for index in indices)


def compare_policies(
    context: StudyContext, policies: Sequence[str], on_progress: Callable[[float], None]
) -> FidelitySums:
    """Measure every policy on every observation. Memory: one layer of one forward.

    Vanilla answers the prompts twice: the first time fixes where the answers end.
    """
    parsed = [parse_policy(policy) for policy in policies]
    if any(map(needs_importance, parsed)):
        raise CoterieError("mc-moe needs token importance, which is not recorded here")
    results = observe_vanilla(context, lambda _: None)
    num_forwards = sum(min(result.forwards, MAX_FORWARDS) for result in results)
    num_left = total = num_forwards * len(sample_layers(context))
    sums = torch.zeros(len(policies), len(results), len(METRICS), 2, dtype=torch.float64)

    def on_layer(observation: LayerObservation) -> None:
        nonlocal num_left
        vanilla_output = moe_output(context.engine.model, observation, observation.routing)
        content, rows = answer_mask(results, observation), torch.tensor(observation.rows)
        for number, policy in enumerate(parsed):
            routing = route(observation.scores, policy)
            output = moe_output(context.engine.model, observation, routing)
            ratios = measure_layer(observation, routing, output, vanilla_output, content)
            sums[number].index_add_(0, rows, ratios.cpu())
        num_left -= len(rows)
        on_progress(min(1.0, 1 - num_left / total))

    observe_vanilla(context, on_layer)
    return FidelitySums(tuple(policies), sums)


def answer_mask(results: Sequence[Result], observation: LayerObservation) -> Tensor:
    """Bool [S, N]: positions of the answer, including its end-of-text token."""
    position = torch.tensor(observation.starts)[:, None] + torch.arange(observation.x.shape[1])
    ends = torch.tensor([results[row].new_tokens for row in observation.rows])[:, None]
    return ((position >= 0) & (position <= ends)).to(observation.x.device)


def measure_layer(
    observation: LayerObservation,
    routing: Routing,
    output: Tensor,
    vanilla_output: Tensor,
    words: Tensor,
) -> Tensor:
    """Numerator and denominator of every metric for one policy in one layer: [S, metrics, 2].

    Outputs are [S, N, H]; ``words`` [S, N] are the positions of the answer.
    """
    progress = observation.scores.progress
    if progress is None or progress.masked is None:
        raise RuntimeError("the observation has no decoding progress")
    stats = routing_stats(observation.scores, routing)
    unique, _, votes_kept, votes, hits, choices = stats.unbind(-1)
    error = (output.double() - vanilla_output.double()).square().sum(-1)  # [S, N]
    norm = vanilla_output.double().square().sum(-1)
    kept_experts, k = count_kept_experts(observation, routing), observation.scores.router.k
    ratios: dict[Metric, tuple[Tensor, Tensor]] = {
        "experts": (unique, torch.ones_like(unique)),
        "mass": (votes_kept, votes),
        "recall": (hits, choices),
        "loss": _relative_loss(error, norm, torch.ones_like(words)),
        "word_recall": ((kept_experts * words).sum(-1), words.sum(-1) * k),
        "word_loss": _relative_loss(error, norm, words),
        "open_loss": _relative_loss(error, norm, words & progress.masked),
    }
    pairs = [torch.stack(ratios[metric], dim=-1) for metric in METRICS]
    return torch.stack(pairs, dim=1).double()


def _relative_loss(error: Tensor, norm: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[S] twice: error / norm [S, N] over ``mask``, and whether it has any position."""
    any_masked = mask.any(-1)
    return (error * mask).sum(-1) / (norm * mask).sum(-1).where(any_masked, 1.0), any_masked


def count_kept_experts(observation: LayerObservation, routing: Routing) -> Tensor:
    """[S, N]: how many of its own experts each token keeps."""
    shape = observation.scores.logits.shape
    in_use = expert_mask(routing.topk_ids, shape[-1])  # [T, E]
    return in_use.gather(-1, routing.vanilla_ids).sum(-1).view(shape[:2])


def fidelity_scores(fidelity: FidelitySums) -> list[Entry]:
    """The metrics of every policy, in order.

    ``experts`` counts unique experts in use, ``mass`` is their share of the votes, and ``loss`` is
    |y - y_vanilla|^2 / |y_vanilla|^2 of the layer's output y.
    """
    values = {metric: fidelity.values(metric) for metric in METRICS}
    return [
        {
            "policy": policy,
            **{metric: float(samples[0, index]) for metric, samples in values.items()},
            "recall_interval": central_interval(values["recall"][1:, index]),
            "loss_interval": central_interval(values["loss"][1:, index]),
        }
        for index, policy in enumerate(fidelity.policies)
    ]


def gaps_to_curve(
    fidelity: FidelitySums, policies: Sequence[str], curve: Sequence[str], metric: Metric
) -> list[Entry]:
    """Each policy's metric minus that of a curve of policies, at the policy's own size.

    The curve is linear between its points; a policy beyond its ends is omitted.
    """
    sizes, values = fidelity.values("experts"), fidelity.values(metric)
    points = [fidelity.policies.index(policy) for policy in curve]
    order = np.argsort(sizes[:, points], axis=1, kind="stable")
    ends, heights = (np.take_along_axis(of[:, points], order, axis=1) for of in (sizes, values))
    gaps = []
    for policy in policies:
        index = fidelity.policies.index(policy)
        if not ends[0, 0] <= sizes[0, index] <= ends[0, -1]:
            continue
        curve_values = np.array([*map(np.interp, sizes[:, index], ends, heights)])
        differences = values[:, index] - curve_values
        gaps.append(
            {
                "policy": policy,
                "experts": float(sizes[0, index]),
                "value": float(values[0, index]),
                "curve": float(curve_values[0]),
                "gap": float(differences[0]),
                "interval": central_interval(differences[1:]),
            }
        )
    return gaps


def compare_to_curve(gap: Entry, metric: Metric) -> int:
    """1 where the policy beats the curve beyond the interval, -1 where it loses, else 0."""
    sign = -1 if metric.endswith("loss") else 1
    low, high = sorted(sign * end for end in gap["interval"])
    return int(low > 0) - int(high < 0)


Prompt = tuple[int, ...]


@dataclass(frozen=True)
class BlockForward:
    """The first forward of one block under one policy, repeated in S rows."""

    trace: TensorRecorder
    block: slice  # its positions in the window
    hidden: Tensor  # [S, N, H], the input of the head
    logits: Tensor  # [S, N, vocabulary]

    @property
    def ids(self) -> Tensor:
        """[S, N]: the most likely tokens."""
        return self.logits.argmax(-1)


def prompts_at_block_start(engine: Engine, prompts: Sequence[str]) -> list[Prompt]:
    """Each prompt, extended by vanilla's answer up to the next block boundary.

    The block after the boundary holds answer tokens only. An answer that ends before it is
    omitted; raises TaskError where all do.
    """
    blocks = [_first_block(engine, prompt) for prompt in prompts]
    results = observe_forwards(
        engine, prompts, lambda _: None, max_new_tokens=engine.generation.block
    )
    extended = []
    for prompt, (start, stop), result in zip(prompts, blocks, results, strict=True):
        shared = stop if start < 0 else 0
        if shared < result.new_tokens or (
            shared == result.new_tokens and result.finish_reason == "length"
        ):
            extended.append((*engine.model.tokenizer.encode(prompt), *result.tokens[:shared]))
    if not extended:
        raise TaskError("every answer ends in the block of its prompt, so no block is all answer")
    return extended


@torch.inference_mode()
def run_first_forward(
    engine: Engine, prompt: Prompt, policy: str | Policy, rows: int = 1
) -> BlockForward:
    """The first block of the prompt under the policy, in ``rows`` equal rows."""
    first = first_forward(engine, [prompt] * rows, policy=policy)
    transformer = engine.model.transformer
    hidden = first.trace.outputs[-1][1].view(rows, -1, transformer.spec.hidden)
    logits = transformer.raw_logits(hidden)
    return BlockForward(first.trace, first.block, hidden, logits)


def _first_block(engine: Engine, prompt: str) -> tuple[int, int]:
    """Start and stop of the first block, counted from the first new token."""
    probe_engine = Engine(engine.model, generation=engine.generation)
    row = probe_engine.sequence(probe_engine.submit(prompt))
    return row.block.start - row.canvas.prompt_length, row.block.stop - row.canvas.prompt_length


def content_mask(engine: Engine, ids: Tensor) -> Tensor:
    """Bool [S, N] of tokens [S, N]: up to and including the first end-of-text token."""
    ends = torch.isin(ids, torch.tensor(engine.model.eos_ids, device=ids.device)).long()
    return ends.cumsum(-1) - ends == 0


def kl_divergence(vanilla: Tensor, other: Tensor) -> Tensor:
    """The Kullback-Leibler divergence in nats, [S, N] float64, of logits [1 or S, N, vocabulary].

    It is computed in float64, because rounding in float32 is as large as small divergences.
    """
    vanilla, rows = vanilla.expand(other.shape), []
    for vanilla_row, other_row in zip(vanilla, other, strict=True):
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (vanilla_row, other_row))
        rows.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0))
    return torch.stack(rows)


def relative_squared_error(vanilla: Tensor, other: Tensor) -> Tensor:
    """[S]: squared distance of hidden states [1 or S, N, H] to vanilla's, relative to vanilla's."""
    squared_error = (other.double() - vanilla.double()).square().sum((1, 2))
    return squared_error / vanilla.double().square().sum((1, 2))
