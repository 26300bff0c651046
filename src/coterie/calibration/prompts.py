"""What a calibration asks: problems that no exam draws, a benchmark's, or prompts from a file."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coterie.evals.task import Item, Task, Wish
from coterie.evals.tasks import embedded, open_tasks
from coterie.naming import CoterieError
from coterie.problems import TASKS as EMBEDDED
from coterie.problems import draw

SPLIT = "train"  # exams draw from "test"


@dataclass(frozen=True)
class Question:
    """One prompt; ``right`` grades an answer, and is None where nobody knows what is right.

    ``generation`` holds the fields of ``Generation`` that its task is usually run with.
    """

    id: str
    prompt: str
    right: Callable[[str], bool] | None = None
    generation: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Questions:
    """Prompts in the order in which they are asked, and where they come from, for the record."""

    asked: tuple[Question, ...]
    tasks: tuple[str, ...] = ()
    seed: int | None = None
    source: str | None = None  # a file of prompts
    exams: bool = False  # some are a benchmark's own items, which an exam asks too

    @property
    def graded(self) -> bool:
        return all(question.right is not None for question in self.asked)

    def document(self) -> dict[str, object]:
        """``sha256`` is of every prompt in order, so that it can be told what was asked."""
        digest = hashlib.sha256("\0".join(q.prompt for q in self.asked).encode())
        return {
            "count": len(self.asked),
            "tasks": list(self.tasks),
            "seed": self.seed,
            "split": SPLIT if self.tasks and set(self.tasks) <= set(EMBEDDED) else None,
            "source": self.source,
            "exams_own": self.exams,
            "sha256": digest.hexdigest(),
        }


def from_tasks(names: Sequence[str], count: int, wish: Wish) -> Questions:
    """``count`` of each task, drawn by ``wish.seed``.

    Embedded tasks give problems of the training split: no exam can draw one. A benchmark gives its
    own items, or those of ``wish.data``; only in the first case are they the exam's.
    """
    tasks = open_tasks(names, wish)
    asked = [question for task in tasks for question in _of(task, count, wish.seed)]
    exams = wish.data is None and any(task.name not in EMBEDDED for task in tasks)
    data = None if wish.data is None else str(wish.data)
    return Questions(tuple(asked), tuple(task.name for task in tasks), wish.seed, data, exams)


def from_file(path: Path) -> Questions:
    """Prompts, one a line; or JSONL, each line an object with "prompt". Blank lines are skipped.

    Raises CoterieError that names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise CoterieError(f"{path}: not UTF-8 text") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise CoterieError(f"{path}: holds no prompts")
    told = _json_prompt if numbered[0][1].startswith("{") else _plain_prompt
    asked = tuple(Question(f"{path.name}/{n}", told(path, n, line)) for n, line in numbered)
    return Questions(asked, source=str(path))


def _of(task: Task, count: int, seed: int) -> list[Question]:
    rng = random.Random(f"calibration/{task.name}/{seed}")
    if task.name in EMBEDDED:
        return [_problem(task.name, rng, f"{SPLIT}/{seed}/{n}") for n in range(count)]
    items = list(task.items())
    chosen = rng.sample(items, min(count, len(items)))
    return [_item(task, item) for item in chosen]


def _problem(name: str, rng: random.Random, number: str) -> Question:
    problem = draw(EMBEDDED[name], rng, SPLIT)
    return Question(
        f"{name}/{number}",
        problem.prompt,
        lambda output: embedded.grade(name, output, problem.gold).correct,
    )


def _item(task: Task, item: Item) -> Question:
    return Question(
        item.id,
        task.prompt(item),
        lambda output: task.grade(output, item).correct,
        task.generation(),
    )


def _plain_prompt(path: Path, number: int, line: str) -> str:
    del path, number
    return line


def _json_prompt(path: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CoterieError(f"{path}, line {number}: not JSON ({error})") from None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise CoterieError(f'{path}, line {number}: no text under "prompt"')
    return prompt
