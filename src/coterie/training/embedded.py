"""The embedded model, from nothing to a checkpoint folder, by one call and a seed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from coterie.naming import CoterieError
from coterie.problems import TASKS
from coterie.results import Measure, record, write_record
from coterie.training import export, vocabulary
from coterie.training.data import Course, Mixture
from coterie.training.loop import Config, Told, train
from coterie.training.network import Shape

STEPS = 10_000
# What is slow to start: tables and copying ...
FIRST = Mixture()
# ... and then whole problems, operators weighted like numbers, and drills without guessing.
SECOND = Mixture(
    shares=(0.36, 0.18, 0.22, 0.24),
    drills=0.75,
    copying=0.0,
    phrases=0.6,
    operator_weight=3.0,
    result_masked=1.0,
)
# ... and last the facts in the wording that uses them, for numbers never met together.
THIRD = replace(SECOND, shares=(0.38, 0.16, 0.2, 0.26), drills=1.0, steps=0.7, phrases=0.4)
TOLD = 500  # steps between the lines of the log that a record keeps


def configure(*, steps: int = STEPS, seed: int = 0, workers: int = 2) -> Config:
    """The run that made the weights in the package, or a shorter one of the same form.

    Raises CoterieError unless the rows of a batch can be shared evenly by ``workers``.
    """
    if FIRST.rows % workers:
        raise CoterieError(f"workers must divide {FIRST.rows} rows evenly; {workers} do not")
    words = vocabulary.build().get_vocab_size()
    return Config(
        steps=steps,
        seed=seed,
        workers=workers,
        shape=replace(Shape(), vocabulary=words),
        decay=0.5,
        tasks=(*TASKS, "drill"),
    )


def lessons(steps: int) -> dict[int, Mixture]:
    """From which step on each mixture is drawn."""
    return {0: FIRST, steps // 2: SECOND, steps * 3 // 4: THIRD}


def make(out: Path, config: Config, *, told: Told | None = None) -> Path:
    """Train into ``out/run`` (resuming what is there) and write the checkpoint to ``out/model``.

    Takes about an hour on two cores for the default number of steps. Batches depend on
    ``config.seed`` and the step alone. Returns the checkpoint's folder, which ``load`` reads; a
    record of the run lies beside it.
    """
    tokenizer = vocabulary.build()
    course = Course(tokenizer, lessons(config.steps), config.seed)
    network = train(course, config, out / "run", told=told)
    folder = out / "model"
    special = [tokenizer.token_to_id(name) for name in (vocabulary.END, vocabulary.MASK)]
    export.save(network, folder, pad=special[0], mask=special[1])
    vocabulary.save(tokenizer, folder)
    keep_record(out, config)
    return folder


def keep_record(out: Path, config: Config) -> Path:
    """Write what the log of ``out/run`` tells of speed, losses and balance."""
    with (out / "run" / "log.jsonl").open(encoding="utf-8") as log:
        lines = [line for line in map(json.loads, log) if "loss" in line]
    speed = Measure("speed", "positions/s", tuple(float(line["speed"]) for line in lines))
    kept = [line for line in lines if line["step"] % TOLD == 0 or line is lines[-1]]
    facts = {
        "config": asdict(config),
        "lessons": {step: asdict(mixture) for step, mixture in lessons(config.steps).items()},
        "log": kept,
    }
    command = ["coterie", "train", "--steps", str(config.steps), "--seed", str(config.seed)]
    return write_record(out, record("Embedded training", command, [speed], facts=facts))
