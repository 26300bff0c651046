"""``coterie train``: trains a model of the package again."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from coterie.cli.output import print_note, print_text, progress_bar
from coterie.errors import ConfigError, CoterieError
from coterie.lab.training import embedded, text
from coterie.lab.training.checkpoint import RUN, TrainingRun, train_checkpoint
from coterie.lab.training.loop import LOG_FILE, saved_step


def train(
    *,
    task: Literal["embedded", "text"] = "embedded",
    corpus: Path | None = None,
    out: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    workers: int = 2,
    save_every: int = 100,
) -> None:
    """Train a model in the package again; the same command continues a run that was stopped.

    The embedded model takes about an hour on two cores. The text model needs a corpus, takes some
    hours, and may be continued with more steps. Ctrl-C and SIGTERM save the run after the current
    step.

    \b
    coterie train --out runs/embedded
    coterie generate "..." --model runs/embedded/model
    """
    out = out or Path("runs") / task
    folder = out / RUN
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("making the vocabulary")
        settings = {"seed": seed, "workers": workers, "save_every": save_every}
        make = partial(_text_run, corpus, out) if task == "text" else _embedded_run
        training = make(settings if steps is None else settings | {"steps": steps})
        steps = training.config.steps
        progress.update(bar, total=steps)
        print_note(f"the log is {folder / LOG_FILE}")

        def on_log(entry: Mapping[str, object]) -> None:
            text = f"loss {entry['loss']:.3f}, {entry['speed']:,} positions/s"
            progress.update(bar, description=text)

        def on_step(step: int) -> None:
            progress.update(bar, completed=step, description="training" if not step else None)

        try:
            model = train_checkpoint(out, training, on_log=on_log, on_step=on_step)
        except BaseException:
            progress.stop()
            with suppress(CoterieError):
                step = saved_step(folder)
                print_note(f"{folder} keeps step {step} of {steps}; the same command goes on")
            raise
    print_text(str(model))


def _embedded_run(settings: Mapping[str, int]) -> TrainingRun:
    return embedded.embedded_run(embedded.make_config(**settings))


def _text_run(corpus: Path | None, out: Path, settings: Mapping[str, int]) -> TrainingRun:
    if corpus is None:
        raise ConfigError("the text model needs a --corpus: a folder with `train` and `held-out`")
    config = text.make_config(**settings)
    return text.text_run(text.TextCorpus.open(corpus, out, config.shape.vocab_size), config)
