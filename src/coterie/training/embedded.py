"""The embedded model, from nothing to a checkpoint folder, by one call and a seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coterie.problems import TASKS
from coterie.training import export, vocabulary
from coterie.training.data import BatchMaker, Mixture
from coterie.training.loop import Config, Evaluate, train
from coterie.training.network import Shape

STEPS = 10_000
SHAPE = Shape()  # all but the vocabulary, which the tokenizer decides


def configure(*, steps: int = STEPS, seed: int = 0, workers: int = 2) -> Config:
    """The run that made the weights in the package, or a shorter one of the same form."""
    words = vocabulary.build().get_vocab_size()
    return Config(
        steps=steps,
        seed=seed,
        workers=workers,
        shape=replace(SHAPE, vocabulary=words),
        decay=0.5,
        tasks=(*TASKS, "drill"),
    )


def make(out: Path, config: Config, *, evaluate: Evaluate | None = None) -> Path:
    """Train into ``out/run`` (resuming what is there) and write the checkpoint to ``out/model``.

    Takes about 90 minutes on two cores for the default number of steps. Batches depend on
    ``config.seed`` and the step alone. Returns the checkpoint's folder, which ``load`` reads.
    """
    tokenizer = vocabulary.build()
    maker = BatchMaker(tokenizer, Mixture(), config.seed)
    network = train(maker, config, out / "run", evaluate=evaluate)
    folder = out / "model"
    export.save(network, folder, pad=tokenizer.token_to_id(vocabulary.END))
    vocabulary.save(tokenizer, folder)
    return folder
