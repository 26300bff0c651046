"""What a chapter works with: a model, its questions, one size of effort, and the accuracy runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

from coterie.engine.engine import Engine
from coterie.evals.run import Answer, Arm, Sheet, run
from coterie.evals.task import Task
from coterie.naming import CoterieError

ROWS = 64  # decoded together in accuracy runs


@dataclass(frozen=True)
class Lab:
    """One study of one model. ``items`` is n for each policy over all tasks; ``prompts`` how many
    questions the chapters look at that watch single forwards.

    ``answers`` is where accuracy runs keep theirs (None: in ``folder``). ``read`` gathers what
    ``record`` gave to the chapter at work: its own record is made again when one of these is.
    """

    engine: Engine
    tasks: Sequence[Task]
    folder: Path
    items: int
    prompts: int
    seed: int
    tell: Callable[[float, str], None]  # share of the chapter done (0 .. 1), what is being done
    answers: Path | None = None
    read: dict[str, str] = field(default_factory=dict)  # chapter -> when its record was made

    def questions(self) -> list[str]:
        """The first ``prompts`` questions, the tasks taking turns."""
        asked = [[task.prompt(i) for i in task.items()[: self.prompts]] for task in self.tasks]
        turns = chain.from_iterable(zip_longest(*asked))
        return [prompt for prompt in turns if prompt is not None][: self.prompts]

    def record(self, chapter: str) -> Mapping[str, object] | None:
        """The facts that another chapter has left, None where it has not run yet."""
        path = self.folder / "records" / f"{chapter}.json"
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        self.read[chapter] = content["when"]
        return content["facts"]

    def sheets(self, arms: Sequence[Arm], part: tuple[float, float] = (0.0, 1.0)) -> list[Sheet]:
        """What every arm makes of ``items`` questions, the tasks in equal shares; in their order.

        Answers are kept in the study's folder and shared by all chapters: an arm is run once.
        ``part``: the share of the chapter before and after this, for the bar.
        """
        each = -(-self.items // len(self.tasks))
        total = len(arms) * sum(min(each, len(task.items())) for task in self.tasks)
        seen = 0

        def told(answer: Answer) -> None:
            nonlocal seen
            seen += 1
            first, last = part
            self.tell(first + (last - first) * min(1.0, seen / total), answer.arm)

        sheets = run(
            self.engine,
            self.tasks,
            arms,
            self.answers or self.folder / "items",
            limit=each,
            rows=ROWS,
            told=told,
        )
        for sheet in sheets:
            if sheet.failed == len(sheet.answers):
                raise CoterieError(
                    f"{sheet.policy}: no item got an answer: {sheet.answers[0].error}"
                )
        return sheets
