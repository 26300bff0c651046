"""What is measured: policies decoding to the end, and policies on vanilla's own forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from coterie.calibration.interval import drop_interval
from coterie.calibration.prompts import Question, Questions
from coterie.calibration.target import Kind, Reading
from coterie.engine.engine import Engine
from coterie.engine.event import Result
from coterie.engine.watch import Watched, moe_output, watch
from coterie.evals.stats import ratio_interval
from coterie.naming import CoterieError
from coterie.routing import needs_importance, parse_policy, route
from coterie.telemetry import figures
from coterie.values import Policy

See = Callable[[Watched, int], None]  # what was watched; where its row 0 stands among all prompts
Told = Callable[[str, int, int], None]  # what is run; prompts done of it, prompts in all
TOGETHER = 7  # policies measured in one pass over vanilla's forwards
VANILLA = "vanilla"
VANILLA_WEIGHED = "mc-moe:beta=0,protect=0"  # drops nothing, and has the importance computed


@dataclass(frozen=True)
class Run:
    """One policy decoding every prompt to its end; experts and forwards stand prompt by prompt."""

    experts: tuple[float, ...]  # unique experts a layer, summed over the forwards that count
    forwards: tuple[int, ...]
    right: tuple[bool, ...]  # empty where nothing is graded
    vote_mass_kept: float
    forwards_per_block: float

    def experts_reading(self) -> Reading:
        mean = sum(self.experts) / max(1, sum(self.forwards))
        return Reading(mean, ratio_interval(self.experts, self.forwards), len(self.experts), mean)

    def drop_reading(self, vanilla: Run) -> Reading:
        """Accuracy lost against ``vanilla`` on the same prompts."""
        n = len(self.right)
        lost = (sum(vanilla.right) - sum(self.right)) / n
        interval = drop_interval(vanilla.right, self.right)
        return Reading(lost, interval, n, self.experts_reading().value)


@dataclass(frozen=True)
class OnTrace:
    """One policy on the inputs of vanilla's decoding forwards: every layer read what vanilla
    gave it, so policies differ in nothing but their routing."""

    experts: Reading
    mass: Reading  # votes for experts used / all votes, as telemetry counts them
    loss: Reading | None  # |y - y_vanilla|^2 / |y_vanilla|^2 of a layer's output; None: not asked

    def reading(self, kind: Kind) -> Reading:
        """The one that a target is about; accuracy is none of them."""
        found = {"experts": self.experts, "mass": self.mass, "loss": self.loss}.get(kind)
        if found is None:
            raise ValueError(f"{kind} was not measured on the trace")
        return found


@dataclass  # not frozen: it remembers runs
class Bench:
    """One model and the prompts that all policies are measured on.

    Nothing of a forward is kept: figures of each prompt are added up as it is watched.
    ``options`` are fields of ``Generation`` that were asked for, over what a task usually wants.
    Where not all experts are in memory, ``rows`` is 1, and that memory is emptied before each.
    """

    engine: Engine
    questions: Questions
    options: Mapping[str, object] = field(default_factory=dict)
    rows: int = 16
    told: Told = lambda doing, done, whole: None
    _runs: dict[str, Run] = field(default_factory=dict)

    def run(self, policy: str) -> Run:
        """Decodes with ``policy`` (once: asked again, it is remembered)."""
        if policy not in self._runs:
            asked = self.questions.asked
            results = self._decode(policy, policy, None)
            graders = [question.right for question in asked] if self.questions.graded else []
            pairs = zip(graders, results, strict=False)
            self._runs[policy] = _summed(
                results, tuple(bool(right and right(result.text)) for right, result in pairs)
            )
        return self._runs[policy]

    def on_trace(self, policies: Sequence[str], *, losses: bool) -> list[OnTrace]:
        """Several policies in one pass over vanilla's decoding; ``losses`` runs their experts.

        Policies that prefer who is in memory are told who is there under vanilla. Raises where a
        loss would bring others there.
        """
        if losses and self.engine.model.rationed is not None:
            raise CoterieError(
                "a loss is computed with experts that the run does not use, so that all must be in "
                "memory; leave --expert-memory or --imagine-memory out"
            )
        parsed = [parse_policy(policy) for policy in policies]
        sums = torch.zeros(len(parsed), len(self.questions.asked), 5, dtype=torch.float64)

        def see(watched: Watched, first: int) -> None:
            rows = torch.tensor(watched.rows) + first
            vanilla = moe_output(self.engine.model, watched, watched.routing) if losses else None
            for place, policy in enumerate(parsed):
                sums[place].index_add_(0, rows, self._seen(watched, policy, vanilla))

        self.trace(see, f"{len(parsed)} policies on vanilla's forwards", parsed)
        return [_on_trace(found, losses) for found in sums]

    def trace(self, see: See, doing: str, policies: Sequence[Policy] = ()) -> None:
        """Vanilla's decoding forwards, one by one; with importance where a policy needs it."""
        weighed = any(map(needs_importance, policies))
        self._decode(VANILLA_WEIGHED if weighed else VANILLA, doing, see)

    def _seen(self, watched: Watched, policy: Policy, vanilla: Tensor | None) -> Tensor:
        """[S, 5]: unique experts, 1, votes kept, all votes, loss."""
        routing = route(watched.scores, policy)
        counted = figures(watched.scores, routing).cpu()
        loss = torch.zeros(len(counted), dtype=torch.float64)
        if vanilla is not None:
            other = moe_output(self.engine.model, watched, routing)
            lost, all_of_it = ((y.double() ** 2).sum((1, 2)) for y in (other - vanilla, vanilla))
            loss = (lost / all_of_it).cpu()
        return torch.stack(
            [counted[:, 0], torch.ones_like(loss), counted[:, 2], counted[:, 3], loss], dim=-1
        )

    def _decode(self, policy: str, doing: str, see: See | None) -> list[Result]:
        """Every prompt's result, in order; prompts of one generation share forwards."""
        found: list[Result] = []
        whole, model = len(self.questions.asked), self.engine.model

        def heard(_: Result) -> None:
            nonlocal done
            done += 1
            self.told(doing, done, whole)

        done = 0
        self.told(doing, done, whole)
        for generation, asked in self._alike():
            first = len(found)
            lent = Engine(model, generation=self.engine.generation.but(**generation))
            found += watch(
                lent,
                [question.prompt for question in asked],
                lambda watched, first=first: see and see(watched, first),
                policy=policy,
                rows=self.rows,
                fresh=model.rationed is not None,
                layers=() if see is None else None,
                heard=heard,
            )
        return found

    def _alike(self) -> Iterator[tuple[dict[str, object], list[Question]]]:
        for generation, asked in groupby(self.questions.asked, lambda asked: asked.generation):
            yield {**generation, **self.options}, list(asked)


def _summed(results: Sequence[Result], right: tuple[bool, ...]) -> Run:
    forwards = tuple(result.experts.forwards for result in results)
    weights = forwards if any(forwards) else (1,) * len(results)
    mass = sum(r.vote_mass_kept * w for r, w in zip(results, weights, strict=True))
    return Run(
        experts=tuple(result.experts.mean * result.experts.forwards for result in results),
        forwards=forwards,
        right=right,
        vote_mass_kept=mass / sum(weights),
        forwards_per_block=sum(r.forwards for r in results) / sum(r.blocks for r in results),
    )


def _on_trace(sums: Tensor, losses: bool) -> OnTrace:
    """From [prompts, 5], as ``_seen`` orders them."""
    experts, ones, kept, votes, lost = (column.tolist() for column in sums.unbind(-1))
    n, mean = len(ones), sum(experts) / max(1.0, sum(ones))

    def reading(parts: list[float], wholes: list[float]) -> Reading:
        value = sum(parts) / (sum(wholes) or 1.0)
        return Reading(value, ratio_interval(parts, wholes), n, mean)

    return OnTrace(
        experts=reading(experts, ones),
        mass=reading(kept, votes),
        loss=reading(lost, ones) if losses else None,
    )
