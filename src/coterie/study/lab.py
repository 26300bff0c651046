"""What a chapter works with: a model, its questions, one size of effort, and the accuracy runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
