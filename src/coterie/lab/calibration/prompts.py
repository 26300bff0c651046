"""The prompts of a calibration: generated training problems, benchmark items, or a file."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coterie.errors import TaskError
from coterie.files import read_text
from coterie.lab.evals.task import Task, TaskOptions
from coterie.lab.evals.tasks import embedded, open_tasks
from coterie.lab.evals.text import read_texts
from coterie.lab.problems import PROBLEM_MAKERS, draw_problem
from coterie.strict_json import LISTING_FILE

SPLIT = "train"  # evaluations draw from "test"


@dataclass(frozen=True)
class CalibrationPrompt:
    """One prompt. ``is_correct`` grades an output; None if the right answer is unknown.

    ``generation`` has the ``GenerationConfig`` fields that its task sets. ``answer`` is a worked
    answer, if there is one.
    """

    id: str
    text: str
    is_correct: Callable[[str], bool] | None = None
    generation: Mapping[str, object] = field(default_factory=dict)
    answer: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order, and their source for the record."""

    prompts: tuple[CalibrationPrompt, ...]
    tasks: tuple[str, ...] = ()
    seed: int | None = None
    source: str | None = None  # a file of prompts
    includes_test_items: bool = False  # of a benchmark, which an evaluation would use too

    @property
    def is_graded(self) -> bool:
        return all(prompt.is_correct is not None for prompt in self.prompts)

    def to_dict(self) -> dict[str, object]:
        """The record of the prompts; ``sha256`` covers all texts in order."""
        digest = hashlib.sha256("\0".join(prompt.text for prompt in self.prompts).encode())
        return {
            "count": len(self.prompts),
            "tasks": list(self.tasks),
            "seed": self.seed,
            "split": SPLIT if self.tasks and set(self.tasks) <= set(PROBLEM_MAKERS) else None,
            "source": self.source,
            "exams_own": self.includes_test_items,
            "sha256": digest.hexdigest(),
        }


def prompts_from_tasks(names: Sequence[str], count: int, options: TaskOptions) -> PromptSet:
    """``count`` prompts of each task, sampled with ``options.seed``.

    Embedded tasks generate problems of the training split. A benchmark gives items of
    ``options.data``, or else its own items, which an evaluation would use too.
    """
    tasks = open_tasks(names, options)
    return PromptSet(
        tuple(prompt for task in tasks for prompt in _task_prompts(task, count, options.seed)),
        tuple(task.name for task in tasks),
        options.seed,
        None if options.data is None else str(options.data),
        options.data is None and any(task.name not in PROBLEM_MAKERS for task in tasks),
    )


def prompts_from_file(path: Path) -> PromptSet:
    """Prompts from a file with one per line, or from JSONL objects with "prompt".

    Skips blank lines. Raises CoterieError with the file and the line of a malformed prompt.
    """
    lines = read_text(path, LISTING_FILE).split("\n")
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise TaskError(f"{path}: holds no prompts")
    is_json = numbered[0][1].startswith("{")
    prompts = tuple(
        CalibrationPrompt(
            f"{path.name}/{number}", _parse_json_line(path, number, line) if is_json else line
        )
        for number, line in numbered
    )
    return PromptSet(prompts, source=str(path))


def prompts_from_texts(path: Path) -> PromptSet:
    """Each file of a folder, or the one file, for a target on the bits of text."""
    texts = read_texts(path)
    return PromptSet(tuple(CalibrationPrompt(*each) for each in texts), source=str(path))


def _task_prompts(task: Task, count: int, seed: int) -> list[CalibrationPrompt]:
    rng = random.Random(f"calibration/{task.name}/{seed}")
    if task.name in PROBLEM_MAKERS:
        return [_generated_prompt(task.name, rng, f"{SPLIT}/{seed}/{n}") for n in range(count)]
    items = list(task.items())
    return [
        CalibrationPrompt(
            item.id,
            task.prompt(item),
            lambda output, item=item: task.grade(output, item).correct,
            task.generation(),
        )
        for item in rng.sample(items, min(count, len(items)))
    ]


def _generated_prompt(name: str, rng: random.Random, number: str) -> CalibrationPrompt:
    problem = draw_problem(PROBLEM_MAKERS[name], rng, SPLIT)
    return CalibrationPrompt(
        f"{name}/{number}",
        problem.prompt,
        lambda output: embedded.grade(name, output, problem.gold).correct,
        answer=problem.answer,
    )


def _parse_json_line(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}, line {number}: not JSON ({error})") from None
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise TaskError(f'{path}, line {number}: no text under "prompt"')
    return prompt
