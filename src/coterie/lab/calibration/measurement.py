"""Measures policies: by decoding prompts, and on the inputs of vanilla's forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.engine.observation import LayerObservation, moe_output, observe_forwards
from coterie.errors import ConfigError
from coterie.lab.calibration.prompts import PromptSet
from coterie.lab.calibration.target import Estimate, TargetKind
from coterie.lab.evals.stats import paired_difference, ratio_interval
from coterie.lab.evals.text import relative_rise, score_text
from coterie.lab.journal import Journal
from coterie.lab.likelihood.estimator import LikelihoodEstimator, Passage, PassageScore
from coterie.lab.likelihood.passages import continuation_passage, split_text
from coterie.routing import needs_importance, parse_policy, route
from coterie.telemetry import routing_stats
from coterie.tokenizer.tokenizer import SubwordTokenizer
from coterie.values import Policy

Step = TypeVar("Step")
LayerCallback = Callable[[LayerObservation, int], None]  # and the prompt index of its row 0
PromptProgressCallback = Callable[[str, int, int], None]  # activity, finished prompts, all prompts
TraceEstimates = Mapping[TargetKind, Estimate]  # "experts", "mass" and maybe "loss"
POLICIES_PER_PASS = 7
VANILLA = "vanilla"
TEXT_SAMPLES = 4  # corruptions of each block
# Drops no expert, and makes the model compute each token's importance.
VANILLA_WITH_IMPORTANCE = "mc-moe:beta=0,protect=0"


@dataclass(frozen=True)
class PolicyRun:
    """One policy that decoded every prompt; tuples have one entry per prompt."""

    experts: tuple[float, ...]  # unique experts a layer, summed over the decode forwards
    forwards: tuple[int, ...]
    correct: tuple[bool, ...]  # empty if prompts are not graded
    vote_mass_kept: float
    forwards_per_block: float

    @staticmethod
    def of(results: Sequence[Result], correct: tuple[bool, ...]) -> PolicyRun:
        forwards = tuple(result.experts.forwards for result in results)
        weights = forwards if any(forwards) else (1,) * len(results)
        mass = sum(r.vote_mass_kept * w for r, w in zip(results, weights, strict=True))
        return PolicyRun(
            experts=tuple(result.experts.mean * result.experts.forwards for result in results),
            forwards=forwards,
            correct=correct,
            vote_mass_kept=mass / sum(weights),
            forwards_per_block=sum(r.forwards for r in results) / sum(r.blocks for r in results),
        )

    def describe(self) -> str:
        score = f", {sum(self.correct)} of {len(self.correct)} correct" if self.correct else ""
        experts, forwards = self.experts_estimate().value, self.forwards_per_block
        return f"{experts:.1f} experts a layer, {forwards:.2f} forwards a block{score}"

    def experts_estimate(self) -> Estimate:
        mean = sum(self.experts) / max(1, sum(self.forwards))
        return Estimate(mean, ratio_interval(self.experts, self.forwards), len(self.experts), mean)

    def drop_estimate(self, vanilla: PolicyRun) -> Estimate:
        """The accuracy lost against ``vanilla`` on the same prompts."""
        change = paired_difference(vanilla.correct, self.correct)
        low, high = change.interval
        drop, interval = (change.lost - change.gained) / change.n, (0.0 - high, 0.0 - low)
        return Estimate(drop, interval, change.n, self.experts_estimate().value)


@dataclass(frozen=True)
class PolicyEvaluator:
    """One model and the prompts that all policies are measured on.

    ``options`` override the ``GenerationConfig`` fields of the engine and of each task. If experts
    are offloaded, ``batch_size`` must be 1, and the expert cache is reset before each prompt.
    Nothing that is in ``journal`` is measured again.
    """

    engine: Engine
    prompt_set: PromptSet
    options: Mapping[str, object] = field(default_factory=dict)
    batch_size: int = 16
    on_progress: PromptProgressCallback = lambda activity, done, total: None
    journal: Journal = field(default_factory=lambda: Journal(None, {}))

    def run(self, policy: str) -> PolicyRun:
        """Decode all prompts under ``policy``."""
        if (step := f"decoding {policy}") not in self.journal.steps:
            results = self._decode(policy, policy, None)
            graders = [p.is_correct for p in self.prompt_set.prompts if self.prompt_set.is_graded]
            pairs = zip(graders, results, strict=False)
            correct = tuple(bool(grader and grader(result.text)) for grader, result in pairs)
            self.journal.add(step, asdict(PolicyRun.of(results, correct)))
        return _with_tuples(PolicyRun, self.journal.steps[step])

    def text_scores(self, policy: str) -> list[PassageScore]:
        """The likelihood of each prompt's worked answer, or of its text if it has none."""
        engine = Engine(
            self.engine.model, generation=self.engine.generation.replace(**self.options)
        )
        estimator = LikelihoodEstimator(engine, TEXT_SAMPLES, self.prompt_set.seed or 0)

        def on_score(done: int, total: int) -> None:
            self.on_progress(f"bits of {policy}", done, total)

        return score_text(
            estimator, self._passages(engine), [policy], self.journal,
            batch_size=self.batch_size, on_score=on_score,
        )[0]  # fmt: skip

    def bits_estimate(self, policy: str) -> Estimate:
        """By which share of vanilla's bits those of the same text rise."""
        scores = self.text_scores(policy)
        rise, interval = relative_rise(self.text_scores(VANILLA), scores)
        return Estimate(rise, interval, len(scores), _text_run(scores).experts_estimate().value)

    def text_run(self, policy: str) -> PolicyRun:
        """The forwards of ``text_scores`` as a run without answers."""
        return _text_run(self.text_scores(policy))

    def _passages(self, engine: Engine) -> list[Passage]:
        passages, tokenizer = list[Passage](), engine.model.tokenizer
        for prompt in self.prompt_set.prompts:
            if prompt.answer is None:
                passages += split_text(prompt.id, prompt.text, engine)
            elif isinstance(tokenizer, SubwordTokenizer):
                text = tokenizer.template.render([{"role": "user", "content": prompt.text}])
                pair = text, prompt.answer
                passages.append(continuation_passage(prompt.id, engine, *pair, templated=True))
            else:
                pair = prompt.text, prompt.answer
                passages.append(continuation_passage(prompt.id, engine, *pair))
        return passages

    def measure_on_trace(self, kind: TargetKind, policies: Sequence[str]) -> list[Estimate]:
        """One estimate per policy from ``estimate_on_trace``."""
        estimates = self.estimate_on_trace(policies, with_loss=kind == "loss")
        return [estimate[kind] for estimate in estimates]

    def estimate_on_trace(
        self, policies: Sequence[str], *, with_loss: bool
    ) -> list[TraceEstimates]:
        """Several policies on the layer inputs of one decoding under vanilla routing.

        ``mass`` is the share of votes for the experts used. ``loss`` is |y - y_vanilla|^2 over
        |y_vanilla|^2 of a layer's output. Policies that prefer cached experts see vanilla's cache.
        Raises ConfigError for ``with_loss`` if experts are offloaded.
        """
        if with_loss and self.engine.model.store.traffic_log is not None:
            raise ConfigError(
                "a loss also runs experts that vanilla does not use; "
                "leave `expert_memory` out, so that all experts are resident"
            )
        steps = {policy: f"on vanilla{' with loss' * with_loss} {policy}" for policy in policies}
        missing = [policy for policy in policies if steps[policy] not in self.journal.steps]
        measured = self._measure_on_vanilla(missing, with_loss=with_loss) if missing else []
        for policy, estimates in zip(missing, measured, strict=True):
            values = {kind: asdict(estimate) for kind, estimate in estimates.items()}
            self.journal.add(steps[policy], values)
        stored = [self.journal.steps[steps[policy]].items() for policy in policies]
        return [{kind: _with_tuples(Estimate, v) for kind, v in values} for values in stored]

    def _measure_on_vanilla(
        self, policies: Sequence[str], *, with_loss: bool
    ) -> list[TraceEstimates]:
        parsed = [parse_policy(policy) for policy in policies]
        sums = torch.zeros(len(parsed), len(self.prompt_set.prompts), 5, dtype=torch.float64)

        def on_layer(observation: LayerObservation, first_prompt: int) -> None:
            rows = torch.tensor(observation.rows) + first_prompt
            vanilla = (
                moe_output(self.engine.model, observation, observation.routing)
                if with_loss
                else None
            )
            for index, policy in enumerate(parsed):
                sums[index].index_add_(0, rows, self._layer_stats(observation, policy, vanilla))

        self.observe_vanilla(on_layer, f"{len(parsed)} policies on vanilla's forwards", parsed)
        return [_trace_estimates(policy_sums, with_loss) for policy_sums in sums]

    def observe_vanilla(
        self, on_layer: LayerCallback, activity: str, policies: Sequence[Policy] = ()
    ) -> None:
        """Observe vanilla's decode forwards, with importance if one of ``policies`` needs it."""
        with_importance = any(map(needs_importance, policies))
        self._decode(VANILLA_WITH_IMPORTANCE if with_importance else VANILLA, activity, on_layer)

    def _layer_stats(
        self, observation: LayerObservation, policy: Policy, vanilla: Tensor | None
    ) -> Tensor:
        """[S, 5]: unique experts, 1, votes kept, all votes, loss."""
        routing = route(observation.scores, policy)
        counts = routing_stats(observation.scores, routing).cpu()
        loss = torch.zeros(len(counts), dtype=torch.float64)
        if vanilla is not None:
            output = moe_output(self.engine.model, observation, routing)
            error, norm = ((y.double() ** 2).sum((1, 2)) for y in (output - vanilla, vanilla))
            loss = (error / norm).cpu()
        columns = [counts[:, 0], torch.ones_like(loss), counts[:, 2], counts[:, 3], loss]
        return torch.stack(columns, dim=-1)

    def _decode(self, policy: str, activity: str, on_layer: LayerCallback | None) -> list[Result]:
        """The result of every prompt, in order; prompts with equal options share forwards."""
        results: list[Result] = []
        num_done, total, model = 0, len(self.prompt_set.prompts), self.engine.model

        def on_result(_: Result) -> None:
            nonlocal num_done
            num_done += 1
            self.on_progress(activity, num_done, total)

        self.on_progress(activity, num_done, total)
        for options, prompts in groupby(self.prompt_set.prompts, lambda prompt: prompt.generation):
            first = len(results)
            generation = self.engine.generation.replace(**{**options, **self.options})
            results += observe_forwards(
                Engine(model, generation=generation),
                [prompt.text for prompt in prompts],
                lambda observation, first=first: on_layer and on_layer(observation, first),
                policy=policy,
                batch_size=self.batch_size,
                reset_cache=model.store.traffic_log is not None,
                layers=() if on_layer is None else None,
                on_result=on_result,
            )
        return results


def _text_run(scores: Sequence[PassageScore]) -> PolicyRun:
    forwards = tuple(score.forwards for score in scores)
    mass = sum(score.vote_mass_kept * score.forwards for score in scores)
    return PolicyRun(
        experts=tuple(score.experts * score.forwards for score in scores),
        forwards=forwards,
        correct=(),
        vote_mass_kept=mass / sum(forwards),
        forwards_per_block=float(TEXT_SAMPLES),
    )


def _with_tuples(cls: Callable[..., Step], values: Mapping[str, Any]) -> Step:
    """A dataclass from ``asdict`` after a round trip through JSON, which turns tuples to lists."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _trace_estimates(sums: Tensor, with_loss: bool) -> TraceEstimates:
    """The estimates from sums [prompts, 5] of ``_layer_stats``."""
    experts, ones, votes_kept, votes, loss = (column.tolist() for column in sums.unbind(-1))
    n, mean = len(ones), sum(experts) / max(1.0, sum(ones))

    def estimate(parts: list[float], wholes: list[float]) -> Estimate:
        value = sum(parts) / (sum(wholes) or 1.0)
        return Estimate(value, ratio_interval(parts, wholes), n, mean)

    estimates: dict[TargetKind, Estimate] = {
        "experts": estimate(experts, ones),
        "mass": estimate(votes_kept, votes),
    }
    return {**estimates, "loss": estimate(loss, ones)} if with_loss else estimates
