"""The application: its help, and the table of its commands."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import coterie
from coterie.cli import options as o
from coterie.errors import ConfigError
from coterie.routing import import_policies, load_installed_policies

# Name: "module.function" of this package, imported when the command is asked for.
COMMANDS = {
    "generate": "generate.generate", "chat": "chat.chat", "serve": "serve.serve",
    "compare": "compare.compare", "inspect": "inspect.inspect", "policies": "policies.policies",
    "eval": "eval.evaluate", "grade": "grade.grade", "calibrate": "calibrate.calibrate_command",
    "quantize": "quantize.quantize", "train": "train.train", "study": "study.study",
    "trace": "trace.trace", "replay": "replay.replay_command", "plan": "plan.plan_command",
    "doctor": "doctor.doctor_command", "bench": "bench.bench",
}  # fmt: skip

IMPORT_HELP = "Python file that registers routing policies (docs/adding.md); for any command."
PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


class LazyCommands(Mapping[str, TyperCommand | TyperGroup]):
    """Commands by name: those of ``COMMANDS``, and others that are made already."""

    def __init__(self, made: Mapping[str, TyperCommand | TyperGroup]) -> None:
        self._made = dict(made)

    def __getitem__(self, name: str) -> TyperCommand | TyperGroup:
        if name not in self._made:
            self._made[name] = _make_command(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS | self._made)

    def __len__(self) -> int:
        return len(COMMANDS | self._made)


def _make_command(name: str) -> Any:
    module, function = COMMANDS[name].split(".")
    command = getattr(import_module(f"coterie.cli.{module}"), function)
    if isinstance(command, typer.Typer):
        return typer.main.get_command(command)
    alone = typer.Typer(add_completion=False)
    o.add_command(alone, name, command)
    return typer.main.get_command(alone)


class LazyGroup(TyperGroup):
    """Imports a command when it is asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = LazyCommands(self.commands)


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=o.HELP_NAMES,
)


@app.callback(invoke_without_command=True)
def coterie_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    import_file: Annotated[list[Path] | None, typer.Option("--import", help=IMPORT_HELP)] = None,
) -> None:
    """Mixture-of-Experts diffusion language models, with one set of experts for each block.

    \b
    coterie generate "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
    coterie compare "..." --policy des-vote:beta=0.3 --policy random:beta=0.3
    coterie inspect inclusionAI/LLaDA2.0-mini
    coterie policies

    \b
    Without --model, a small model in the package answers. It only knows word
    problems, short Python functions and simple algebra.
    """
    load_installed_policies()
    for path in import_file or ():
        import_policies(path)
    if version:
        typer.echo(f"coterie {coterie.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("lm-eval", context_settings=PASS_THROUGH, add_help_option=False)
def lm_eval(context: typer.Context) -> None:
    r"""Run lm-evaluation-harness with `--model coterie`; all options are its own.

    \b
    coterie lm-eval --model coterie --model_args pretrained=FOLDER,policy=des-vote:beta=0.3
      --tasks gsm8k --apply_chat_template
    """
    try:
        from coterie.lab.evals.harness.adapter import run_harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("lm_eval", "tqdm"):
            raise
        raise ConfigError(
            "lm-evaluation-harness is not installed: pip install '.[harness]' in a clone of Coterie"
        ) from None
    run_harness(context.args)
