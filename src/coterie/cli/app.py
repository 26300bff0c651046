"""The application: its help, and the table of its commands."""

from pathlib import Path
from typing import Annotated

import typer

import coterie
from coterie.cli import options as o
from coterie.cli.bench import bench
from coterie.cli.calibrate import calibrate_command
from coterie.cli.chat import chat
from coterie.cli.compare import compare
from coterie.cli.doctor import doctor_command
from coterie.cli.eval import evaluate
from coterie.cli.generate import generate
from coterie.cli.grade import grade
from coterie.cli.inspect import inspect
from coterie.cli.plan import plan_command
from coterie.cli.policies import policies
from coterie.cli.quantize import quantize
from coterie.cli.replay import replay_command
from coterie.cli.serve import serve
from coterie.cli.study import study
from coterie.cli.trace import trace
from coterie.cli.train import train
from coterie.errors import ConfigError
from coterie.routing import import_policies, load_installed_policies

COMMANDS = {
    "generate": generate, "chat": chat, "serve": serve, "compare": compare, "inspect": inspect,
    "policies": policies,
    "eval": evaluate, "grade": grade, "calibrate": calibrate_command, "quantize": quantize,
    "train": train, "study": study, "trace": trace, "replay": replay_command,
    "plan": plan_command, "doctor": doctor_command,
}  # fmt: skip

IMPORT_HELP = "Python file that registers routing policies (docs/adding.md); for any command."
PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

app = typer.Typer(
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=o.HELP_NAMES,
)
for name, command in COMMANDS.items():
    o.add_command(app, name, command)
app.add_typer(bench, name="bench")


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
