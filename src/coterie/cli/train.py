"""``coterie train``: trains the model in the package again."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from coterie.cli.output import print_note, print_text, progress_bar
from coterie.errors import CoterieError
from coterie.lab.training import embedded
from coterie.lab.training.loop import LOG_FILE, saved_step

SAVE_HELP = "Steps between saved states."
OUT_HELP = "Folder for the run and the checkpoint."


def train(
    out: Annotated[Path, typer.Option("--out", "-o", help=OUT_HELP)] = Path("runs/embedded"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = embedded.DEFAULT_STEPS,
    seed: Annotated[int, typer.Option(help="Seed of the data and the weights.", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="Number of processes.", min=1)] = 2,
    save_every: Annotated[int, typer.Option(help=SAVE_HELP, min=1)] = 100,
) -> None:
    """Train the model in the package again; the same command continues a run that was stopped.

    Takes about an hour on two cores. Ctrl-C and SIGTERM save the run after the current step.

    \b
    coterie train --out runs/embedded
    coterie generate "..." --model runs/embedded/model
    """
    folder = out / embedded.RUN
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("making the vocabulary", total=steps)
        config = embedded.make_config(
            steps=steps, seed=seed, workers=workers, save_every=save_every
        )
        print_note(f"the log is {folder / LOG_FILE}")

        def on_log(entry: Mapping[str, object]) -> None:
            text = f"loss {entry['loss']:.3f}, {entry['speed']:,} positions/s"
            progress.update(task, description=text)

        def on_step(step: int) -> None:
            progress.update(task, completed=step, description="training" if not step else None)

        try:
            model = embedded.train_embedded(out, config, on_log=on_log, on_step=on_step)
        except BaseException:
            progress.stop()
            with suppress(CoterieError):
                step = saved_step(folder)
                print_note(f"{folder} keeps step {step} of {steps}; the same command goes on")
            raise
    print_text(str(model))
