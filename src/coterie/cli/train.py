"""``coterie train``: trains the model in the package again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from coterie.cli.output import print_note, print_text, progress_bar
from coterie.lab.training import embedded

OUT_HELP = "Folder for the run and the checkpoint."


def train(
    out: Annotated[Path, typer.Option("--out", "-o", help=OUT_HELP)] = Path("runs/embedded"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = embedded.DEFAULT_STEPS,
    seed: Annotated[int, typer.Option(help="Seed of the data and the weights.", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="Number of processes.", min=1)] = 2,
) -> None:
    """Train the model in the package again; the same command continues a run that was stopped.

    Takes about an hour on two cores.

    \b
    coterie train --out runs/embedded
    coterie generate "..." --model runs/embedded/model
    """
    out.mkdir(parents=True, exist_ok=True)
    config = embedded.make_config(steps=steps, seed=seed, workers=workers)
    print_note(f"the log is {out / 'run' / 'log.jsonl'}")
    with progress_bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=steps)

        def on_step(log_entry: Mapping[str, object]) -> None:
            description = f"loss {log_entry['loss']:.3f}, {log_entry['speed']:,} positions/s"
            progress.update(task, completed=cast("int", log_entry["step"]), description=description)

        folder = embedded.train_embedded(out, config, on_log=on_step)
    print_text(str(folder))
