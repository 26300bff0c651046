"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coterie.evals.task import Task, Wish
from coterie.evals.tasks import embedded
from coterie.evals.tasks.gsm8k import open_gsm8k
from coterie.evals.tasks.humaneval import open_humaneval
from coterie.evals.tasks.math500 import open_math500
from coterie.evals.tasks.mbpp import open_mbpp
from coterie.naming import CoterieError
from coterie.problems import TASKS as DRAWN

TASKS: dict[str, Callable[[Wish], Task]] = {
    "gsm8k": open_gsm8k,
    "humaneval": open_humaneval,
    "mbpp": open_mbpp,
    "math500": open_math500,
    "words": embedded.opener("words"),
    "docstring": embedded.opener("docstring"),
    "sentence": embedded.opener("sentence"),
    "algebra": embedded.opener("algebra"),
}


def open_tasks(names: Sequence[str], wish: Wish) -> list[Task]:
    """Each once, in the order of ``names``; fails here, not after hours, when data are missing.

    Raises CoterieError for an unknown name, for data that cannot be read, and for a task that runs
    generated code where nothing can fence it in (unless ``wish.trust``).
    """
    for name in names:
        check_name(name)
    published = [name for name in dict.fromkeys(names) if name not in DRAWN]
    if len(published) > 1 and wish.data is not None and wish.data.is_file():
        raise CoterieError(f"{wish.data} is one file, for {' and '.join(published)}; give a folder")
    return [TASKS[name](wish) for name in dict.fromkeys(names)]


def check_name(name: str) -> None:
    """Raises for a name that no task has."""
    if name not in TASKS:
        raise CoterieError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
