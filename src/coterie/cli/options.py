"""Commands from functions: their options are parameters, described in options.toml.

A parameter's name is the name of its flag. A group is a dataclass with one option for each field.
"""

import functools
import inspect
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

DEFAULT_PROBLEMS = 50  # problems that `coterie eval` draws of each task of the package
DEFAULT_BATCH_SIZE = 16
TEXT_TASK = "text"  # the likelihood of given text
HELP_NAMES = {"help_option_names": ["-h", "--help"]}
RoutingMode = Literal["vanilla", "policy"]
TEXTS = Path(__file__).parents[1] / "lab" / "study" / "texts"
SHARED_TEXTS = {"comparison", "summary"}  # all others are each of one experiment
EXPERIMENTS = sorted({path.stem for path in TEXTS.glob("*.toml")} - SHARED_TEXTS)


# Lists of names that texts of the table show, each by its place.
NAME_LISTS = {
    "baselines": "coterie.lab.bench.baselines.BASELINES",
    "evictions": "coterie.offload.eviction.EVICTIONS",
    "experiments": "coterie.cli.options.EXPERIMENTS",
    "kv_caches": "coterie.decoding.kv_schemes.KV_SCHEMES",
    "precision_policies": "coterie.loading.low_precision.PRECISION_POLICIES",
    "problems": "coterie.lab.problems.PROBLEM_MAKERS",
    "replay_evictions": "coterie.lab.replay.replay.EVICTION_NAMES",
    "rules": "coterie.decoding.refinements.ALL_RULES",
    "shapes": "coterie.lab.bench.shapes.SHAPES",
    "tasks": "coterie.lab.evals.tasks.TASKS",
}


class NameLists(dict[str, str]):
    """The lists as text, each imported when a text has it."""

    def __missing__(self, key: str) -> str:
        module, _, name = NAME_LISTS[key].rpartition(".")
        return ", ".join(getattr(import_module(module), name))


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
    settings["help"] = settings["help"].format_map(NameLists())
    if is_argument:
        return typer.Argument(**settings)
    flags = settings.pop("flags", [])
    if not any(flag.startswith("--") for flag in flags):
        flags = [f"--{name.replace('_', '-')}", *flags]
    return typer.Option(*flags, rich_help_panel=None if panel == NO_PANEL else panel, **settings)
