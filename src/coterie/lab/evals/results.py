"""The variants of an evaluation and their results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from coterie.engine.generation_config import GenerationConfig
from coterie.keys import by_key
from coterie.lab.evals.answer_log import Answer, AnswerTraffic
from coterie.routing import format_policy, parse_policy


@dataclass(frozen=True)
class Variant:
    """One compared configuration: a policy and overrides of ``GenerationConfig`` fields."""

    policy: str
    generation: Mapping[str, object] = field(default_factory=dict)

    @staticmethod
    def parse(name: str) -> Variant:
        """The variant with this name; values of the overrides stay texts."""
        policy, *options = name.split(" ")
        return Variant(policy, dict(option.split("=", 1) for option in options))

    @property
    def name(self) -> str:
        """The policy, then the overrides: ``des-vote:beta=0.3 block=16``."""
        overrides = by_key(GenerationConfig, self.generation)
        options = [f"{name}={value}" for name, value in sorted(overrides.items())]
        return " ".join([format_policy(parse_policy(self.policy)), *options])


@dataclass(frozen=True)
class EvalResult:
    """All answers of one variant, in the order of the items.

    Means over forwards weight each answer by its counted decoding forwards. Failed answers
    (``Answer.error``: the logits were not finite) count as wrong and are left out of these means.
    """

    variant: Variant
    answers: tuple[Answer, ...]

    @property
    def policy(self) -> str:
        """The variant's name."""
        return self.variant.name

    def for_task(self, task: str | None = None) -> list[Answer]:
        """The answers to one task's items, or all of them."""
        return [answer for answer in self.answers if task in (None, answer.task)]

    def correct(self, task: str | None = None) -> list[bool]:
        """Whether each answer to one task, or each of all, is correct."""
        return [answer.correct for answer in self.for_task(task)]

    def other_metrics(self, task: str) -> dict[str, list[bool]]:
        """A task's further metrics, item by item; an answer without a metric counts as wrong."""
        answers = self.for_task(task)
        names = dict.fromkeys(name for answer in answers for name in answer.other_metrics)
        return {
            name: [answer.other_metrics.get(name, False) for answer in answers] for name in names
        }

    @property
    def num_failed(self) -> int:
        """Items with non-finite logits."""
        return self.errors.total()

    @property
    def errors(self) -> Counter[str]:
        """How often each reason of a failure occurs."""
        return Counter(answer.error for answer in self.answers if answer.error is not None)

    @property
    def experts(self) -> float:
        """Mean unique experts per layer and forward."""
        return self._forward_mean(lambda answer: answer.experts)

    @property
    def vote_mass_kept(self) -> float:
        return self._forward_mean(lambda answer: answer.vote_mass_kept)

    @property
    def expert_bytes(self) -> float:
        """Mean bytes of experts per layer and forward."""
        return self._forward_mean(lambda answer: answer.expert_bytes)

    @property
    def traffic(self) -> AnswerTraffic | None:
        """The traffic of all answers; None if all experts are in memory."""
        parts = [answer.traffic for answer in self.answers if answer.traffic is not None]
        return sum(parts[1:], start=parts[0]) if parts else None

    @property
    def bytes_per_forward(self) -> float:
        """Bytes moved by all passes, divided by the number of denoising forwards."""
        moved = 0 if self.traffic is None else self.traffic.bytes_moved
        return moved / max(1, self._total("forwards"))

    @property
    def forwards_per_block(self) -> float:
        """Denoising forwards per block; passes that only write keys are not counted."""
        return self._total("forwards") / max(1, self._total("blocks"))

    @property
    def new_tokens(self) -> float:
        """Mean new tokens per item."""
        return fmean(answer.new_tokens for answer in self.answers)

    @property
    def seconds(self) -> float:
        """Generation time of this variant, without grading."""
        return self._total("seconds")

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences per second of wall clock."""
        return self._total("new_tokens") / self.seconds if self.seconds > 0 else 0.0

    def _total(self, name: str) -> float:
        return sum(getattr(answer, name) for answer in self.answers)

    def _forward_mean(self, metric: Callable[[Answer], float]) -> float:
        answers = [answer for answer in self.answers if answer.error is None]
        if not answers:
            return 0.0
        counts = [answer.expert_forwards for answer in answers]
        # A plan that processes each block once, in a refresh, has no forward under the policy.
        return fmean(map(metric, answers), counts if any(counts) else [1] * len(answers))
