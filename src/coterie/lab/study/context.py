"""The context of an experiment: a model, tasks, sample sizes, records and accuracy runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from coterie.engine.engine import Engine
from coterie.errors import CoterieError, TaskError
from coterie.lab.evals.run import Answer, Variant, run_eval
from coterie.lab.evals.task import Task
from coterie.lab.records import is_record
from coterie.lab.study.results import VariantResult
from coterie.routing import update_policies_in_json
from coterie.strict_json import LISTING_FILE, read_object

T = TypeVar("T")
BATCH_SIZE = 64  # decoded together in accuracy runs


def interleave(lists: Iterable[Sequence[T]]) -> list[T]:
    """The items of all lists, alternating between the lists."""
    return [item for item in chain.from_iterable(zip_longest(*lists)) if item is not None]


def read_record(folder: Path, experiment: str) -> dict[str, Any] | None:
    """An experiment's record with its policies in the current spelling; None where none is whole.

    Its command and settings are unchanged.
    """
    try:
        content = read_object(folder / f"{experiment}.json", LISTING_FILE)
    except CoterieError:
        return None
    if not is_record(content):
        return None
    return update_policies_in_json(content, skip_keys=("command", "settings"))


@dataclass(frozen=True)
class StudyContext:
    """One study of one model.

    ``num_problems`` counts the problems per policy over all tasks; ``num_prompts`` counts the
    prompts of experiments that observe single forwards. ``answers`` is the folder of the answers
    (default: below ``folder``). ``used_records`` collects the records that the experiment has
    read; its own record is measured again when one of them changes.
    """

    engine: Engine
    tasks: Sequence[Task]
    folder: Path
    num_problems: int
    num_prompts: int
    seed: int
    on_progress: Callable[[float, str], None]  # share of the experiment done (0 .. 1), activity
    answers: Path | None = None
    used_records: dict[str, str] = field(default_factory=dict)  # experiment -> record's time

    def questions(self) -> list[str]:
        """The first ``num_prompts`` prompts, alternating between tasks."""
        n = self.num_prompts
        return interleave([[task.prompt(i) for i in task.items()[:n]] for task in self.tasks])[:n]

    def record(self, experiment: str) -> Any:
        """The facts of another experiment's record as JSON, None where it has not run."""
        content = read_record(self.folder / "records", experiment)
        if content is None:
            return None
        self.used_records[experiment] = content["when"]
        return content["facts"]

    def evaluate(
        self, variants: Sequence[Variant], progress_span: tuple[float, float] = (0.0, 1.0)
    ) -> list[VariantResult]:
        """The result of every variant on ``num_problems`` problems, equally many of each task.

        All experiments share the stored answers, so a variant is run once. ``progress_span`` are
        the shares of the experiment done before and after this call.
        """
        per_task = -(-self.num_problems // len(self.tasks))
        total = len(variants) * sum(min(per_task, len(task.items())) for task in self.tasks)
        num_answered = 0

        def on_answer(answer: Answer) -> None:
            nonlocal num_answered
            num_answered += 1
            first, last = progress_span
            share = min(1.0, num_answered / total)
            self.on_progress(first + (last - first) * share, answer.variant)

        eval_results = run_eval(
            self.engine,
            self.tasks,
            variants,
            self.answers or self.folder / "items",
            limit=per_task,
            batch_size=BATCH_SIZE,
            on_answer=on_answer,
        )
        for eval_result in eval_results:
            if eval_result.num_failed == len(eval_result.answers):
                reason = eval_result.answers[0].error
                raise TaskError(f"{eval_result.policy}: every item failed: {reason}")
        return [VariantResult.from_eval_result(eval_result) for eval_result in eval_results]
