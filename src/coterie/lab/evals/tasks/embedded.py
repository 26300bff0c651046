"""The four kinds of generated problems that the embedded model solves, as benchmarks."""

from __future__ import annotations

import random
import re
from functools import cache

from coterie.errors import TaskError
from coterie.lab.evals.task import QUESTION, Grade, Item, Task, TaskOptions
from coterie.lab.problems import PROBLEM_MAKERS, Problem, draw_problem
from coterie.lab.sandbox import require_backend, run_program

ANSWER_PATTERNS = {  # the last match in an output is its answer
    "words": re.compile(r"####\s*(-?\d+)"),
    "algebra": re.compile(r"\\boxed\{\s*(-?\d+)\s*\}"),
}

MAX_PROBLEMS = 100_000  # of one kind; all are drawn before the first is asked


def open_embedded(name: str, options: TaskOptions) -> Task:
    """``options.count`` held-out problems of one kind, generated from ``options.seed``.

    An id is "words/<seed>/<n>"; a larger count extends the items of a smaller one. The model is
    trained with the engine's defaults. Raises TaskError for options that the task does not have.
    """
    if not 1 <= options.count <= MAX_PROBLEMS:
        raise TaskError(f"{name}: {options.count} items; at least 1, at most {MAX_PROBLEMS:,}")
    options.require_zero_shot(name)
    pattern = ANSWER_PATTERNS.get(name)
    if pattern is None:
        require_backend(options.trust)
    about = {
        "split": "test",
        "seed": options.seed,
        "count": options.count,
        "shots": 0,
        "counts": "asserts pass" if pattern is None else pattern.pattern,
    }
    items = (
        Item(f"{name}/{options.seed}/{number}", problem.prompt, problem.gold)
        for number, problem in enumerate(_draw_problems(name, options.seed, options.count))
    )

    def grade_item(output: str, item: Item) -> Grade:
        return grade(name, output, item.gold, trust=options.trust)

    return Task(name, tuple(items), QUESTION, grade_item, about)


def grade(name: str, output: str, gold: str, *, trust: bool = False) -> Grade:
    """Grades an output of the kind ``name``; ``gold`` is a number, or asserts that follow the code.

    Raises TaskError for code if no sandbox works and ``trust`` is false.
    """
    if name in ANSWER_PATTERNS:
        matches = ANSWER_PATTERNS[name].findall(output)
        expected = gold_number(name, gold)
        return Grade(bool(matches) and matches[-1] == expected, matches[-1] if matches else None)
    return Grade(run_program(output, gold, trust=trust).passed, output)


def gold_number(name: str, gold: str) -> str:
    """The number of a gold answer: the bare number, or a text that ends like the task's answers.

    Raises TaskError if there is none.
    """
    matches = ANSWER_PATTERNS[name].findall(gold)
    number = matches[-1] if matches else gold.strip()
    if not re.fullmatch(r"-?\d+", number):
        raise TaskError(f"{gold!r} is no integer and does not end in one")
    return number


@cache
def _draw_problems(name: str, seed: int, count: int) -> tuple[Problem, ...]:
    rng = random.Random(f"{name}/{seed}")
    return tuple(draw_problem(PROBLEM_MAKERS[name], rng, "test") for _ in range(count))
