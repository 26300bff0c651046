"""What is measured: policies decoding to the end, and policies on vanilla's own forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.engine.observation import LayerObservation, moe_output, observe_forwards
from coterie.errors import CoterieError
from coterie.lab.calibration.interval import drop_interval
from coterie.lab.calibration.prompts import CalibrationPrompt, PromptSet
from coterie.lab.calibration.target import Estimate, TargetKind
from coterie.lab.evals.stats import ratio_interval
from coterie.routing import needs_importance, parse_policy, route
from coterie.telemetry import routing_stats
from coterie.values import Policy

LayerCallback = Callable[
    [LayerObservation, int], None
]  # what was watched; where its row 0 stands among all prompts
PromptProgressCallback = Callable[
    [str, int, int], None
]  # what is run; prompts done of it, prompts in all
POLICIES_PER_PASS = 7  # policies measured in one pass over vanilla's forwards
VANILLA = "vanilla"
VANILLA_WITH_IMPORTANCE = (
    "mc-moe:beta=0,protect=0"  # drops nothing, and has the importance computed
)


@dataclass(frozen=True)
class PolicyRun:
    """One policy decoding every prompt to its end; experts and forwards stand prompt by prompt."""

    experts: tuple[float, ...]  # unique experts a layer, summed over the forwards that count
    forwards: tuple[int, ...]
    correct: tuple[bool, ...]  # empty where nothing is graded
    vote_mass_kept: float
    forwards_per_block: float

    def experts_estimate(self) -> Estimate:
        mean = sum(self.experts) / max(1, sum(self.forwards))
        return Estimate(mean, ratio_interval(self.experts, self.forwards), len(self.experts), mean)

    def drop_estimate(self, vanilla: PolicyRun) -> Estimate:
        """Accuracy lost against ``vanilla`` on the same prompts."""
        n = len(self.correct)
        lost = (sum(vanilla.correct) - sum(self.correct)) / n
        interval = drop_interval(vanilla.correct, self.correct)
        return Estimate(lost, interval, n, self.experts_estimate().value)


@dataclass(frozen=True)
class TraceEstimates:
    """One policy on the inputs of vanilla's decoding forwards: every layer read what vanilla
    gave it, so policies differ in nothing but their routing."""

    experts: Estimate
    mass: Estimate  # votes for experts used / all votes, as telemetry counts them
    loss: Estimate | None  # |y - y_vanilla|^2 / |y_vanilla|^2 of a layer's output; None: not asked

    def estimate(self, kind: TargetKind) -> Estimate:
        """The one that a target is about; accuracy is none of them."""
        estimate = {"experts": self.experts, "mass": self.mass, "loss": self.loss}.get(kind)
        if estimate is None:
            raise ValueError(f"{kind} was not measured on the trace")
        return estimate


@dataclass  # not frozen: it remembers runs
class PolicyEvaluator:
    """One model and the prompts that all policies are measured on.

    Nothing of a forward is kept: figures of each prompt are added up as it is watched.
    ``options`` are fields of ``Generation`` that were asked for, over what a task usually wants.
    Where not all experts are in memory, ``rows`` is 1, and that memory is emptied before each.
    """

    engine: Engine
    prompt_set: PromptSet
    options: Mapping[str, object] = field(default_factory=dict)
    batch_size: int = 16
    on_progress: PromptProgressCallback = lambda doing, done, whole: None
    _runs: dict[str, PolicyRun] = field(default_factory=dict)

    def run(self, policy: str) -> PolicyRun:
        """Decodes with ``policy`` (once: asked again, it is remembered)."""
        if policy not in self._runs:
            prompts = self.prompt_set.prompts
            results = self._decode(policy, policy, None)
            is_correct = (
                [prompt.is_correct for prompt in prompts] if self.prompt_set.is_graded else []
            )
            pairs = zip(is_correct, results, strict=False)
            self._runs[policy] = _make_run(
                results, tuple(bool(grader and grader(result.text)) for grader, result in pairs)
            )
        return self._runs[policy]

    def estimate_on_trace(
        self, policies: Sequence[str], *, with_loss: bool
    ) -> list[TraceEstimates]:
        """Several policies in one pass over vanilla's decoding; ``losses`` runs their experts.

        Policies that prefer who is in memory are told who is there under vanilla. Raises where a
        loss would bring others there.
        """
        if with_loss and self.engine.model.store.traffic_log is not None:
            raise CoterieError(
                "a loss is computed with experts that the run does not use, so that all must be in "
                "memory; leave --expert-memory or --imagine-memory out"
            )
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
                sums[index].index_add_(0, rows, self._layer_figures(observation, policy, vanilla))

        self.observe_vanilla(on_layer, f"{len(parsed)} policies on vanilla's forwards", parsed)
        return [_make_trace_estimates(policy_sums, with_loss) for policy_sums in sums]

    def observe_vanilla(
        self, on_layer: LayerCallback, activity: str, policies: Sequence[Policy] = ()
    ) -> None:
        """Vanilla's decoding forwards, one by one; with importance where a policy needs it."""
        with_importance = any(map(needs_importance, policies))
        self._decode(VANILLA_WITH_IMPORTANCE if with_importance else VANILLA, activity, on_layer)

    def _layer_figures(
        self, observation: LayerObservation, policy: Policy, vanilla: Tensor | None
    ) -> Tensor:
        """[S, 5]: unique experts, 1, votes kept, all votes, loss."""
        routing = route(observation.scores, policy)
        counts = routing_stats(observation.scores, routing).cpu()
        loss = torch.zeros(len(counts), dtype=torch.float64)
        if vanilla is not None:
            other = moe_output(self.engine.model, observation, routing)
            lost, total = ((y.double() ** 2).sum((1, 2)) for y in (other - vanilla, vanilla))
            loss = (lost / total).cpu()
        return torch.stack(
            [counts[:, 0], torch.ones_like(loss), counts[:, 2], counts[:, 3], loss], dim=-1
        )

    def _decode(self, policy: str, activity: str, on_layer: LayerCallback | None) -> list[Result]:
        """Every prompt's result, in order; prompts of one generation share forwards."""
        results: list[Result] = []
        total, model = len(self.prompt_set.prompts), self.engine.model

        def on_result(_: Result) -> None:
            nonlocal num_done
            num_done += 1
            self.on_progress(activity, num_done, total)

        num_done = 0
        self.on_progress(activity, num_done, total)
        for generation, prompts in self._by_generation():
            first = len(results)
            engine = Engine(model, generation=self.engine.generation.replace(**generation))
            results += observe_forwards(
                engine,
                [prompt.text for prompt in prompts],
                lambda watched, first=first: on_layer and on_layer(watched, first),
                policy=policy,
                batch_size=self.batch_size,
                reset_cache=model.store.traffic_log is not None,
                layers=() if on_layer is None else None,
                on_result=on_result,
            )
        return results

    def _by_generation(self) -> Iterator[tuple[dict[str, object], list[CalibrationPrompt]]]:
        for generation, prompts in groupby(
            self.prompt_set.prompts, lambda prompts: prompts.generation
        ):
            yield {**generation, **self.options}, list(prompts)


def _make_run(results: Sequence[Result], correct: tuple[bool, ...]) -> PolicyRun:
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


def _make_trace_estimates(sums: Tensor, with_loss: bool) -> TraceEstimates:
    """From [prompts, 5], as ``_seen`` orders them."""
    experts, ones, votes_kept, votes, lost = (column.tolist() for column in sums.unbind(-1))
    n, mean = len(ones), sum(experts) / max(1.0, sum(ones))

    def estimate(parts: list[float], wholes: list[float]) -> Estimate:
        value = sum(parts) / (sum(wholes) or 1.0)
        return Estimate(value, ratio_interval(parts, wholes), n, mean)

    return TraceEstimates(
        experts=estimate(experts, ones),
        mass=estimate(votes_kept, votes),
        loss=estimate(lost, ones) if with_loss else None,
    )
