"""What a chapter works with: a model, its questions, one size of effort, and the accuracy runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.lab.evals.run import Answer, EvalResult, Variant, run_eval
from coterie.lab.evals.task import Task

BATCH_SIZE = 64  # decoded together in accuracy runs


@dataclass(frozen=True)
class StudyContext:
    """One study of one model. ``items`` is n for each policy over all tasks; ``prompts`` how many
    questions the chapters look at that watch single forwards.

    ``answers`` is where accuracy runs keep theirs (None: in ``folder``). ``read`` gathers what
    ``record`` gave to the chapter at work: its own record is made again when one of these is.
    """

    engine: Engine
    tasks: Sequence[Task]
    folder: Path
    num_problems: int
    num_prompts: int
    seed: int
    on_progress: Callable[
        [float, str], None
    ]  # share of the chapter done (0 .. 1), what is being done
    answers: Path | None = None
    used_records: dict[str, str] = field(
        default_factory=dict
    )  # chapter -> when its record was made

    def questions(self) -> list[str]:
        """The first ``prompts`` questions, the tasks taking turns."""
        prompts_by_task = [
            [task.prompt(i) for i in task.items()[: self.num_prompts]] for task in self.tasks
        ]
        interleaved = chain.from_iterable(zip_longest(*prompts_by_task))
        return [prompt for prompt in interleaved if prompt is not None][: self.num_prompts]

    def record(self, experiment: str) -> Mapping[str, object] | None:
        """The facts that another chapter has left, None where it has not run yet."""
        path = self.folder / "records" / f"{experiment}.json"
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        self.used_records[experiment] = content["when"]
        return content["facts"]

    def evaluate(
        self, variants: Sequence[Variant], progress_span: tuple[float, float] = (0.0, 1.0)
    ) -> list[EvalResult]:
        """What every arm makes of ``items`` questions, the tasks in equal shares; in their order.

        Answers are kept in the study's folder and shared by all chapters: an arm is run once.
        ``part``: the share of the chapter before and after this, for the bar.
        """
        per_task = -(-self.num_problems // len(self.tasks))
        total = len(variants) * sum(min(per_task, len(task.items())) for task in self.tasks)
        num_answered = 0

        def on_answer(answer: Answer) -> None:
            nonlocal num_answered
            num_answered += 1
            first, last = progress_span
            self.on_progress(
                first + (last - first) * min(1.0, num_answered / total), answer.variant
            )

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
                raise CoterieError(
                    f"{eval_result.policy}: no item got an answer: {eval_result.answers[0].error}"
                )
        return eval_results
