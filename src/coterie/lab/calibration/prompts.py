"""What a calibration asks: problems that no exam draws, a benchmark's, or prompts from a file."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coterie.errors import CoterieError
from coterie.lab.evals.task import Item, Task, TaskOptions
from coterie.lab.evals.tasks import embedded, open_tasks
from coterie.lab.problems import PROBLEM_MAKERS as EMBEDDED
from coterie.lab.problems import draw_problem

SPLIT = "train"  # exams draw from "test"


@dataclass(frozen=True)
class CalibrationPrompt:
    """One prompt; ``right`` grades an answer, and is None where nobody knows what is right.

    ``generation`` holds the fields of ``Generation`` that its task is usually run with.
    """

    id: str
    text: str
    is_correct: Callable[[str], bool] | None = None
    generation: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order in which they are asked, and where they come from, for the record."""

    prompts: tuple[CalibrationPrompt, ...]
    tasks: tuple[str, ...] = ()
    seed: int | None = None
    source: str | None = None  # a file of prompts
    includes_test_items: bool = False  # some are a benchmark's own items, which an exam asks too

    @property
    def is_graded(self) -> bool:
        return all(prompt.is_correct is not None for prompt in self.prompts)

    def to_dict(self) -> dict[str, object]:
        """``sha256`` is of every prompt in order, so that it can be told what was asked."""
        digest = hashlib.sha256("\0".join(prompt.text for prompt in self.prompts).encode())
        return {
            "count": len(self.prompts),
            "tasks": list(self.tasks),
            "seed": self.seed,
            "split": SPLIT if self.tasks and set(self.tasks) <= set(EMBEDDED) else None,
            "source": self.source,
            "exams_own": self.includes_test_items,
            "sha256": digest.hexdigest(),
        }


def prompts_from_tasks(names: Sequence[str], count: int, options: TaskOptions) -> PromptSet:
    """``count`` of each task, drawn by ``wish.seed``.

    Embedded tasks give problems of the training split: no exam can draw one. A benchmark gives its
    own items, or those of ``wish.data``; only in the first case are they the exam's.
    """
    tasks = open_tasks(names, options)
    prompts = [prompt for task in tasks for prompt in _task_prompts(task, count, options.seed)]
    includes_test_items = options.data is None and any(task.name not in EMBEDDED for task in tasks)
    data = None if options.data is None else str(options.data)
    return PromptSet(
        tuple(prompts), tuple(task.name for task in tasks), options.seed, data, includes_test_items
    )


def prompts_from_file(path: Path) -> PromptSet:
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
    parse_line = _parse_json_line if numbered[0][1].startswith("{") else _parse_plain_line
    prompts = tuple(
        CalibrationPrompt(f"{path.name}/{n}", parse_line(path, n, line)) for n, line in numbered
    )
    return PromptSet(prompts, source=str(path))


def _task_prompts(task: Task, count: int, seed: int) -> list[CalibrationPrompt]:
    rng = random.Random(f"calibration/{task.name}/{seed}")
    if task.name in EMBEDDED:
        return [_generated_prompt(task.name, rng, f"{SPLIT}/{seed}/{n}") for n in range(count)]
    items = list(task.items())
    sample = rng.sample(items, min(count, len(items)))
    return [_benchmark_prompt(task, item) for item in sample]


def _generated_prompt(name: str, rng: random.Random, number: str) -> CalibrationPrompt:
    problem = draw_problem(EMBEDDED[name], rng, SPLIT)
    return CalibrationPrompt(
        f"{name}/{number}",
        problem.prompt,
        lambda output: embedded.grade(name, output, problem.gold).correct,
    )


def _benchmark_prompt(task: Task, item: Item) -> CalibrationPrompt:
    return CalibrationPrompt(
        item.id,
        task.prompt(item),
        lambda output: task.grade(output, item).correct,
        task.generation(),
    )


def _parse_plain_line(path: Path, number: int, line: str) -> str:
    del path, number
    return line


def _parse_json_line(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CoterieError(f"{path}, line {number}: not JSON ({error})") from None
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise CoterieError(f'{path}, line {number}: no text under "prompt"')
    return prompt
