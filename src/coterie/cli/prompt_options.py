"""The prompts and tasks that a command takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.checkpoints import model_info
from coterie.checkpoints.source import EMBEDDED
from coterie.cli.options import TEXT_TASK
from coterie.cli.output import print_note
from coterie.errors import ConfigError
from coterie.lab.calibration import (
    PromptSet,
    prompts_from_file,
    prompts_from_tasks,
    prompts_from_texts,
)
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import TASKS, check_task_name
from coterie.lab.problems import PROBLEM_MAKERS


@dataclass(frozen=True)
class PromptOptions:
    """The prompts of a calibration or a trace."""

    task: list[str] | None = None
    prompt_file: Path | None = None
    num_problems: int | None = None
    seed: int = 1
    data: Path | None = None
    shots: int | None = None

    def load(self, model: str | None, *, default_count: int, trust_code: bool = False) -> PromptSet:
        """The prompts; a note says where a benchmark would ask the same ones."""
        if self.task and self.prompt_file:
            raise ConfigError("--prompt-file replaces --task; give one of them")
        count = self.num_problems or default_count
        family = model_info.inspect(model).family.name
        options = TaskOptions(family, self.data, self.shots, count, self.seed, trust_code)
        if self.prompt_file is not None:
            return prompts_from_file(self.prompt_file)
        if self.task == [TEXT_TASK] and self.data is not None:
            return prompts_from_texts(self.data)
        names = task_names(self.task, model, self.data, flags="--task or --prompt-file")
        prompts = prompts_from_tasks(names, count, options)
        if prompts.includes_test_items:
            print_note(
                "these are a benchmark's own items: an evaluation on them is no longer held out; "
                "--data or --prompt-file takes others"
            )
        return prompts


def task_names(
    requested: Sequence[str] | None,
    model: str | None,
    data: Path | None,
    count: int | None = None,
    *,
    flags: str = "--task",
) -> list[str]:
    """The tasks, by default those of the package; raises for an option that none of them uses."""
    if not requested and model not in (None, EMBEDDED):
        raise ConfigError(f"{flags} is needed with a model; tasks: {', '.join(TASKS)}")
    names = list(dict.fromkeys(requested or PROBLEM_MAKERS))
    for name in names:
        check_task_name(name)
    generated, text = [name for name in names if name in PROBLEM_MAKERS], ", ".join(names)
    if count is not None and not generated:
        raise ConfigError(f"--num-problems has no effect on {text}; --limit takes fewer items")
    if data is not None and len(generated) == len(names):
        raise ConfigError(f"--data has no effect on {text}: their problems are drawn")
    return names
