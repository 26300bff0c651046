"""The table of options, and the commands that it describes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from coterie.cli import options as o
from coterie.cli.app import app
from coterie.cli.engine_options import canonical_policy
from coterie.cli.study import QUICK_PROBLEMS, QUICK_PROMPTS
from coterie.errors import CoterieError
from coterie.lab.planner.request import DEFAULT_STEPS
from coterie.lab.study.study import EXPERIMENTS

OWN = ("lm-eval", "")  # the root and this command describe their options themselves
LISTS = {key: o.NameLists()[key] for key in o.NAME_LISTS}


def described() -> Iterator[tuple[str, Any]]:
    """Each command's name, and each of its parameters."""
    root: Any = typer.main.get_command(app)
    commands = {**root.commands}
    bench = commands.pop("bench")
    commands |= {f"bench {name}": command for name, command in bench.commands.items()}
    for name, command in commands.items():
        yield from ((name, each) for each in command.params if name not in OWN)


def help_of(command: str, parameter: str) -> str:
    return next(p.help for name, p in described() if (name, p.name) == (command, parameter))


def test_each_entry_describes_an_option() -> None:
    """The first section that names a parameter wins, so that a later one may be without use."""
    used = {(p.name, p.help) for _, p in described()}
    for section, panels in o.TABLE.items():
        for panel, entries in panels.items():
            for name, entry in entries.items():
                text = entry if isinstance(entry, str) else entry["help"]
                where = f"[{section}.{panel}] {name}"
                assert (name, text.format_map(LISTS)) in used, where


def test_each_option_says_what_it_does_and_has_the_flag_of_its_name() -> None:
    for command, parameter in described():
        assert parameter.help, f"{command}: {parameter.name}"
        flags = [flag for flag in parameter.opts if flag.startswith("--")]
        auto = f"--{parameter.name.replace('_', '-')}"
        if isinstance(parameter, typer.core.TyperOption) and auto not in flags:
            names = {"policies", "trust_code", "live", "rows", "verify_first"}
            assert parameter.name in names, f"{command}: {parameter.name}"


def test_defaults_in_the_texts_are_those_of_the_code() -> None:
    for number, command, parameter in (
        (o.DEFAULT_PROBLEMS, "eval", "num_problems"),
        (o.DEFAULT_BATCH_SIZE, "eval", "batch_size"),
        (DEFAULT_STEPS, "plan", "steps_per_block"),
        (QUICK_PROBLEMS, "study", "quick"),
        (QUICK_PROMPTS, "study", "quick"),
    ):
        assert str(number) in help_of(command, parameter).split("(default ")[-1]


def test_the_help_names_every_experiment() -> None:
    assert sorted(EXPERIMENTS) == o.EXPERIMENTS


@pytest.mark.parametrize("policy", ["topk:k=", "des-vote:beta=", "racing:m=", "\0", "unknown"])
def test_a_policy_too_long_for_a_file_name_is_refused(policy: str) -> None:
    with pytest.raises(CoterieError) as raised:
        canonical_policy(policy + "9" * 5000)
    assert "sys." not in str(raised.value)
