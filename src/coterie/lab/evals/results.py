"""What is compared, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from coterie.engine.generation_config import GenerationConfig
from coterie.keys import by_key
from coterie.lab.evals.answer_log import Answer
from coterie.lab.evals.traffic import AnswerTraffic
from coterie.routing import format_policy, parse_policy


@dataclass(frozen=True)
class Variant:
    """One thing compared: a policy, and the fields of ``Generation`` that are this arm's own."""

    policy: str
    generation: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its spelling, then what it changes: ``des-vote:beta=0.3 block=16``."""
        changed = by_key(GenerationConfig, self.generation)
        overrides = [f"{name}={value}" for name, value in sorted(changed.items())]
        return " ".join([format_policy(parse_policy(self.policy)), *overrides])


@dataclass(frozen=True)
class EvalResult:
    """All answers of one arm, in the order of the items; the same order in every sheet of a run.

    Means over forwards weigh every answer by the decoding forwards that were counted in it.
    Answers that failed (``Answer.error``) count as wrong and have no figures.
    """

    variant: Variant
    answers: tuple[Answer, ...]

    @property
    def policy(self) -> str:
        """The arm's name."""
        return self.variant.name

    def for_task(self, task: str | None = None) -> list[Answer]:
        """The answers to one task's items, or all."""
        return [answer for answer in self.answers if task in (None, answer.task)]

    def correct(self, task: str | None = None) -> list[bool]:
        """Item by item, of one task or of all."""
        return [answer.correct for answer in self.for_task(task)]

    def other_metrics(self, task: str) -> dict[str, list[bool]]:
        """A task's other measures, item by item; an answer that lacks one counts as wrong."""
        answers = self.for_task(task)
        names = dict.fromkeys(name for answer in answers for name in answer.other_metrics)
        return {
            name: [answer.other_metrics.get(name, False) for answer in answers] for name in names
        }

    @property
    def num_failed(self) -> int:
        """Items without an output: the model gave NaN, or the prompt did not fit."""
        return sum(answer.error is not None for answer in self.answers)

    @property
    def experts(self) -> float:
        """Unique experts a forward, over layers, forwards and items."""
        return self._forward_mean(lambda answer: answer.experts)

    @property
    def vote_mass_kept(self) -> float:
        return self._forward_mean(lambda answer: answer.vote_mass_kept)

    @property
    def expert_bytes(self) -> float:
        """Bytes of experts a layer and forward."""
        return self._forward_mean(lambda answer: answer.expert_bytes)

    @property
    def traffic(self) -> AnswerTraffic | None:
        """Of all answers together; None where all experts are in memory."""
        parts = [answer.traffic for answer in self.answers if answer.traffic is not None]
        return sum(parts[1:], start=parts[0]) if parts else None

    @property
    def bytes_per_forward(self) -> float:
        """Bytes, laid on the forwards that denoise; those that only write keys move some too."""
        total_bytes = sum(
            answer.traffic.bytes_moved for answer in self.answers if answer.traffic is not None
        )
        return total_bytes / max(1, sum(answer.forwards for answer in self.answers))

    @property
    def forwards_per_block(self) -> float:
        """Denoising forwards; those that only write keys are not among them."""
        blocks = sum(answer.blocks for answer in self.answers)
        return sum(answer.forwards for answer in self.answers) / max(blocks, 1)

    @property
    def new_tokens(self) -> float:
        """A mean item's."""
        return fmean(answer.new_tokens for answer in self.answers)

    @property
    def seconds(self) -> float:
        """What this arm's generation took, grading left out, with the rows that ran together."""
        return sum(answer.seconds for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows together in a second of the wall clock."""
        tokens = sum(answer.new_tokens for answer in self.answers)
        return tokens / self.seconds if self.seconds > 0 else 0.0

    def _forward_mean(self, metric: Callable[[Answer], float]) -> float:
        answers = [answer for answer in self.answers if answer.error is None]
        if not answers:
            return 0.0
        counted = [answer.expert_forwards for answer in answers]
        # Where a plan looks at each block once, in a re-forward, no forward was the policy's.
        weights = counted if any(counted) else [1] * len(answers)
        return fmean(map(metric, answers), weights)
