"""What a chapter works with: a model, its questions, one size of effort, and the accuracy runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from coterie.engine.engine import Engine
from coterie.evals.task import Task


@dataclass(frozen=True)
class Lab:
    """One study of one model. ``items`` is n for each policy over all tasks; ``prompts`` how many
    questions the chapters look at that watch single forwards."""

    engine: Engine
    tasks: Sequence[Task]
    folder: Path
    items: int
    prompts: int
    seed: int
    tell: Callable[[float, str], None]  # share of the chapter done (0 .. 1), what is being done

    def questions(self) -> list[str]:
        """The first ``prompts`` questions, the tasks taking turns."""
        asked = [[task.prompt(i) for i in task.items()[: self.prompts]] for task in self.tasks]
        turns = chain.from_iterable(zip_longest(*asked))
        return [prompt for prompt in turns if prompt is not None][: self.prompts]

    def record(self, chapter: str) -> Mapping[str, object] | None:
        """The facts that another chapter has left, None where it has not run yet."""
        path = self.folder / "records" / f"{chapter}.json"
        return json.loads(path.read_text(encoding="utf-8"))["facts"] if path.is_file() else None
