"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coterie.errors import CoterieError
from coterie.lab.evals.task import Task, TaskOptions
from coterie.lab.evals.tasks import embedded
from coterie.lab.evals.tasks.gsm8k import open_gsm8k
from coterie.lab.evals.tasks.humaneval import open_humaneval
from coterie.lab.evals.tasks.math500 import open_math500
from coterie.lab.evals.tasks.mbpp import open_mbpp
from coterie.lab.problems import PROBLEM_MAKERS as DRAWN

TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "gsm8k": open_gsm8k,
    "humaneval": open_humaneval,
    "mbpp": open_mbpp,
    "math500": open_math500,
    "words": embedded.task_opener("words"),
    "docstring": embedded.task_opener("docstring"),
    "sentence": embedded.task_opener("sentence"),
    "algebra": embedded.task_opener("algebra"),
}


def open_tasks(names: Sequence[str], options: TaskOptions) -> list[Task]:
    """Each once, in the order of ``names``; fails here, not after hours, when data are missing.

    Raises CoterieError for an unknown name, for data that cannot be read, and for a task that runs
    generated code where nothing can fence it in (unless ``wish.trust``).
    """
    for name in names:
        check_task_name(name)
    published = [name for name in dict.fromkeys(names) if name not in DRAWN]
    if len(published) > 1 and options.data is not None and options.data.is_file():
        raise CoterieError(
            f"{options.data} is one file, for {' and '.join(published)}; give a folder"
        )
    return [TASKS[name](options) for name in dict.fromkeys(names)]


def check_task_name(name: str) -> None:
    """Raises for a name that no task has."""
    if name not in TASKS:
        raise CoterieError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
