"""Every published answer is graded right, and every altered one wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest
from shared_data import benchmark

from coterie.lab.evals.task import Item, Task, TaskOptions
from coterie.lab.evals.tasks import math500, open_tasks
from coterie.lab.evals.tasks.latex import normalize, possible_values
from coterie.lab.evals.tasks.source import read_benchmark

FORMS = ["#### {}", r"\boxed{{{}}}", "The answer is ${}.", "so it comes to {}", "{}",
         "#### {}\n\nQuestion: And 5 eggs?\nLet's think step by step\nAnswer: 5\n#### 77777",
         "```\n{}\n```", r"So \[\boxed{{\text{{{} in all}}}}\] That is 9 more than 2."]  # fmt: skip
BOXED = [r"\boxed{{{}}}", r"Thus $\boxed{{{}}}$. It follows from $x=3$ that 12 is too large.",
         "The final answer is ${}$. I hope it is correct.", "Answer: {}", "${}$",
         "```\n\\boxed{{{}}}\n```", "\\[\\boxed{{{}.}}\\]"]  # fmt: skip


SOME_OR_ALL = pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(6, id="some")]
)


@cache
def open_task(name: str) -> Task:
    return open_tasks([name], TaskOptions("llada2", data=benchmark(name).parent))[0]


def graded_wrong(task: Task, pairs: Sequence[tuple[str, Item]]) -> list[tuple[str, str]]:
    """(gold, output) of those that are not graded right."""
    return [(item.gold, out) for out, item in pairs if not task.grade(out, item).correct]


def graded_correct(task: Task, pairs: Sequence[tuple[str, Item]]) -> list[tuple[str, str]]:
    return [(item.gold, out) for out, item in pairs if task.grade(out, item).correct]


def bare(item: Item) -> str:
    return item.gold.rpartition("#### ")[2]


def test_all_1319_solutions_of_gsm8k_are_correct_by_every_metric():
    task = open_task("gsm8k")
    grades = [task.grade(item.gold, item) for item in task.items()]
    assert len(grades) == 1319
    assert all(grade.correct and grade.other_metrics["strict"] for grade in grades)
    assert sum(grade.other_metrics["flexible"] for grade in grades) == 1319


@pytest.mark.parametrize("form", FORMS)
@SOME_OR_ALL
def test_answers_of_gsm8k_are_correct_in_every_form_and_altered_ones_wrong(form, every):
    task = open_task("gsm8k")
    items = task.items()[::every]
    assert graded_wrong(task, [(form.format(bare(item)), item) for item in items]) == []
    for alter in (lambda n: n + 1, lambda n: n - 1, lambda n: -n, lambda n: 10 * n):
        values = [(int(bare(item).replace(",", "")), item) for item in items]
        altered = [(form.format(alter(n)), item) for n, item in values if alter(n) != n]
        assert graded_correct(task, altered) == []


def test_another_items_answer_of_gsm8k_is_wrong():
    task, rng = open_task("gsm8k"), random.Random(0)
    items = list(task.items())
    others = [(other.gold, item) for item in items for other in rng.sample(items, 3)
              if bare(other).replace(",", "") != bare(item).replace(",", "")]  # fmt: skip
    assert len(others) > 3800
    assert graded_correct(task, others) == []


def test_all_500_reference_solutions_of_math500_are_correct():
    task = open_task("math500")
    rows = read_benchmark(math500.TEST, benchmark("math500").parent).rows
    solutions = [(str(row["solution"]), item) for row, item in zip(rows, task.items(), strict=True)]
    assert len(solutions) == 500
    assert graded_wrong(task, solutions) == []


@pytest.mark.parametrize("form", BOXED)
@SOME_OR_ALL
def test_answers_of_math500_are_correct_in_every_form(form, every):
    task = open_task("math500")
    items = task.items()[::every]
    assert graded_wrong(task, [(form.format(item.gold), item) for item in items]) == []


@SOME_OR_ALL
def test_altered_numbers_of_math500_are_wrong(every):
    task = open_task("math500")
    altered = []
    for item in task.items()[::every]:
        for value in possible_values(normalize(item.gold)):
            for other in (value + 1, -value, value * 10, value / 2):
                if other != value and other * 100 != value:
                    altered.append((rf"\boxed{{{other}}}", item))
    assert len(altered) > 1000 / every
    assert graded_correct(task, altered) == []


@pytest.mark.slow
def test_another_items_answer_of_math500_is_wrong():
    task, rng = open_task("math500"), random.Random(0)
    items = list(task.items())
    values = {
        item.id: possible_values(normalize(item.gold)) or {normalize(item.gold)} for item in items
    }
    others = [(rf"\boxed{{{other.gold}}}", item) for item in items
              for other in rng.sample(items, 1)
              if not values[other.id] & values[item.id]]  # fmt: skip
    assert len(others) > 450
    assert graded_correct(task, others) == []


@SOME_OR_ALL
def test_altered_formulas_of_math500_are_wrong(every):
    """One more, less, or twice as much, of everything that has no plain value."""
    task = open_task("math500")
    altered = []
    for item in task.items()[::every]:
        if possible_values(normalize(item.gold)) or r"\text" in item.gold or "_" in item.gold:
            continue
        if not any(sign in item.gold for sign in (",", "=", r"\begin", r"\in", r"\pm")):
            altered += [(rf"\boxed{{{item.gold} + 1}}", item),
                        (rf"\boxed{{2({item.gold})}}", item)]  # fmt: skip
    assert len(altered) > 90 / every / 2
    assert graded_correct(task, altered) == []
