"""``coterie train``: trains the model in the package again."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from coterie.cli.output import print_note, print_text, progress_bar
from coterie.errors import CoterieError
from coterie.lab.training import embedded
from coterie.lab.training.loop import LOG_FILE, saved_step


def train(
    *,
    out: Path = Path("runs/embedded"),
    steps: int = embedded.DEFAULT_STEPS,
    seed: int = 0,
    workers: int = 2,
    save_every: int = 100,
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
