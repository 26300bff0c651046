"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from coterie.errors import TaskError
from coterie.lab.evals.task import Task, TaskOptions
from coterie.lab.evals.tasks import choices, embedded
from coterie.lab.evals.tasks.code_tasks import open_humaneval, open_mbpp
from coterie.lab.evals.tasks.gsm8k import open_gsm8k
from coterie.lab.evals.tasks.math500 import open_math500
from coterie.lab.problems import PROBLEM_MAKERS

TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "gsm8k": open_gsm8k,
    "humaneval": open_humaneval,
    "mbpp": open_mbpp,
    "math500": open_math500,
    choices.NAME: choices.open_choices,
    **{name: partial(embedded.open_embedded, name) for name in PROBLEM_MAKERS},
}


def open_tasks(names: Sequence[str], options: TaskOptions) -> list[Task]:
    """Opens each task once, in the order of ``names``, and reads its data.

    Raises TaskError for an unknown name, for data that cannot be read, and for a task that runs
    generated code where no sandbox works (unless ``options.trust``).
    """
    for name in names:
        check_task_name(name)
    published = [name for name in dict.fromkeys(names) if name not in PROBLEM_MAKERS]
    if len(published) > 1 and options.data is not None and options.data.is_file():
        tasks = " and ".join(published)
        raise TaskError(f"`data` is one file, {options.data}, for {tasks}; it must be a folder")
    return [TASKS[name](options) for name in dict.fromkeys(names)]


def check_task_name(name: str) -> None:
    """Raises TaskError for an unknown task name."""
    if name not in TASKS:
        raise TaskError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
