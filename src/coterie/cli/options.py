"""Commands from functions: their options are parameters, described in options.toml.

A parameter's name is the name of its flag. A group is a dataclass with one option for each field.
"""

import functools
import inspect
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from coterie.checkpoints import model_info
from coterie.checkpoints.source import EMBEDDED
from coterie.cli.output import print_note
from coterie.decoding.kv_schemes import KV_SCHEMES
from coterie.decoding.refinements import ALL_RULES
from coterie.errors import ConfigError
from coterie.lab.bench.baselines import BASELINES
from coterie.lab.bench.shapes import SHAPES
from coterie.lab.calibration import (
    PromptSet,
    prompts_from_file,
    prompts_from_tasks,
    prompts_from_texts,
)
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import TASKS, check_task_name
from coterie.lab.problems import PROBLEM_MAKERS
from coterie.lab.replay.replay import EVICTION_NAMES
from coterie.loading.low_precision import PRECISION_POLICIES
from coterie.offload.eviction import EVICTIONS

DEFAULT_PROBLEMS = 50  # problems that `coterie eval` draws of each task of the package
DEFAULT_BATCH_SIZE = 16
TEXT_TASK = "text"  # the likelihood of given text
HELP_NAMES = {"help_option_names": ["-h", "--help"]}
RoutingMode = Literal["vanilla", "policy"]
TEXTS = Path(__file__).parents[1] / "lab" / "study" / "texts"
SHARED_TEXTS = {"comparison", "summary"}  # all others are each of one experiment
EXPERIMENTS = sorted({path.stem for path in TEXTS.glob("*.toml")} - SHARED_TEXTS)


# Lists of names that texts of the table show.
NAMES = {
    "baselines": BASELINES,
    "evictions": EVICTIONS,
    "experiments": EXPERIMENTS,
    "kv_caches": KV_SCHEMES,
    "precision_policies": PRECISION_POLICIES,
    "problems": PROBLEM_MAKERS,
    "replay_evictions": EVICTION_NAMES,
    "rules": ALL_RULES,
    "shapes": SHAPES,
    "tasks": TASKS,
}
TABLE = tomllib.loads(Path(__file__).with_name("options.toml").read_text("utf-8"))
ARGUMENTS, NO_PANEL = "Arguments", "Options"  # panels of the table


def add_command(
    app: typer.Typer, name: str, command: Callable[..., object], group: str = ""
) -> None:
    """Adds the command; the table describes its parameters, and the fields of its groups.

    Positional parameters are arguments, all others are options.
    """
    sections = (f"{group} {name}".strip(), group, "shared")
    hints = get_type_hints(command)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        entries = [(parameter.name, hints[parameter.name], parameter.default)]
        is_argument = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        if (cls := groups.get(parameter.name)) is not None:
            types = get_type_hints(cls)
            entries = [(field.name, types[field.name], field.default) for field in fields(cls)]
        for key, hint, default in entries:
            described = Annotated[hint, _description(sections, key, hint, is_argument=is_argument)]
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(key, kind, default=default, annotation=described))

    @functools.wraps(command)
    def run_command(**values: object) -> object:
        for key, cls in groups.items():
            values[key] = cls(**{field.name: values.pop(field.name) for field in fields(cls)})
        return command(**values)

    run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {each.name: each.annotation for each in parameters}
    app.command(name)(run_command)


def _description(sections: Sequence[str], name: str, hint: object, *, is_argument: bool) -> Any:
    """What typer needs to know of a parameter: the first entry for it in these sections."""
    panels = (item for section in sections for item in TABLE.get(section, {}).items())
    panel, entry = next(
        (panel, entries[name])
        for panel, entries in panels
        if name in entries and (panel == ARGUMENTS) == is_argument
    )
    settings: dict[str, Any] = {"help": entry} if isinstance(entry, str) else dict(entry)
    names = {key: ", ".join(names) for key, names in NAMES.items()}
    settings["help"] = settings["help"].format_map(names)
    if is_argument:
        return typer.Argument(**settings)
    flags = settings.pop("flags", [])
    if not any(flag.startswith("--") for flag in flags):
        flags = [f"--{name.replace('_', '-')}", *flags]
    return typer.Option(*flags, rich_help_panel=None if panel == NO_PANEL else panel, **settings)


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
