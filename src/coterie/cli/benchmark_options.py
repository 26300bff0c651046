"""The benchmark tasks and prompts of ``eval``, ``study``, ``calibrate`` and ``trace``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from coterie.checkpoints.model_info import inspect
from coterie.checkpoints.source import EMBEDDED
from coterie.cli import options as o
from coterie.cli.output import print_note
from coterie.errors import ConfigError
from coterie.lab.calibration import PromptSet, prompts_from_file, prompts_from_tasks
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import TASKS, check_task_name
from coterie.lab.problems import PROBLEM_MAKERS


@dataclass(frozen=True)
class PromptOptions:
    """The prompts of a calibration or a trace."""

    task: o.Tasks = None
    prompt_file: Annotated[
        Path | None,
        o.benchmark('File of prompts in place of --task: one a line, or JSONL with "prompt".'),
    ] = None
    num_problems: Annotated[
        int | None,
        o.benchmark("Prompts of each task (default: 40 for calibrate, 20 for trace).", min=1),
    ] = None
    seed: o.ProblemSeed = 1
    data: o.DataPath = None
    shots: o.NumShots = None

    def load(self, model: str | None, *, default_count: int, trust_code: bool = False) -> PromptSet:
        """The prompts; a note says where a benchmark would ask the same ones."""
        if self.task and self.prompt_file:
            raise ConfigError("--prompt-file replaces --task; give one of them")
        count = self.num_problems or default_count
        family = inspect(model).family.name
        options = TaskOptions(family, self.data, self.shots, count, self.seed, trust_code)
        if self.prompt_file is not None:
            return prompts_from_file(self.prompt_file)
        if not self.task and model not in (None, EMBEDDED):
            raise ConfigError(
                f"--task or --prompt-file is needed with --model; tasks: {', '.join(TASKS)}"
            )
        prompts = prompts_from_tasks(
            list(dict.fromkeys(self.task or PROBLEM_MAKERS)), count, options
        )
        if prompts.includes_test_items:
            print_note(
                "these are a benchmark's own items: an evaluation on them is no longer held out; "
                "--data or --prompt-file takes others"
            )
        return prompts


def task_names(
    requested: Sequence[str] | None,
    model: str | None,
    *,
    data: Path | None,
    num_problems: int | None = None,
) -> list[str]:
    """The tasks, each once; by default those of the package, for its own model.

    Raises for an option that none of them uses.
    """
    if not requested and model not in (None, EMBEDDED):
        raise ConfigError(f"--task is needed with a model; tasks: {', '.join(TASKS)}")
    names = list(dict.fromkeys(requested or PROBLEM_MAKERS))
    for name in names:
        check_task_name(name)
    generated = [name for name in names if name in PROBLEM_MAKERS]
    if num_problems is not None and not generated:
        raise ConfigError(
            f"--num-problems has no effect on {', '.join(names)}; --limit takes fewer items"
        )
    if data is not None and len(generated) == len(names):
        raise ConfigError(f"--data has no effect on {', '.join(names)}: their problems are drawn")
    return names
