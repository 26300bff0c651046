"""Training of the embedded model: from a seed to a checkpoint folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from coterie.checkpoints.source import find_folder
from coterie.errors import ConfigError
from coterie.files import atomic_write, atomic_write_json, read_file
from coterie.keys import keys_of, to_json
from coterie.lab.problems import PROBLEM_MAKERS
from coterie.lab.records import Measurement, make_record, write_record
from coterie.lab.training import vocabulary
from coterie.lab.training.data import Curriculum, DataMixture
from coterie.lab.training.loop import LOG_FILE, TrainingConfig, train
from coterie.lab.training.network import NetworkShape, TrainingNetwork
from coterie.strict_json import LISTING_FILE, read_object

DEFAULT_STEPS = 10_000
# Equations and copying, which are learned slowly.
FIRST_STAGE = DataMixture()
# More whole problems, operators weighted like numbers, and drills with one possible answer.
SECOND_STAGE = DataMixture(
    task_shares=(0.36, 0.18, 0.22, 0.24),
    drill_row_share=0.75,
    copy_share=0.0,
    code_phrase_share=0.6,
    operator_weight=3.0,
    result_masked_share=1.0,
)
# Equations in the wording of problems, with numbers that no problem combines.
THIRD_STAGE = replace(
    SECOND_STAGE,
    task_shares=(0.38, 0.16, 0.2, 0.26),
    drill_row_share=1.0,
    worked_steps_share=0.7,
    code_phrase_share=0.4,
)
RUN = "run"  # folder of the state and the log
RECORD_EVERY = 500  # steps between the log lines in a record


def make_config(
    *, steps: int = DEFAULT_STEPS, seed: int = 0, workers: int = 2, save_every: int = 100
) -> TrainingConfig:
    """The training run of the model in the package, or a shorter one of the same form.

    Raises ConfigError if ``workers`` do not divide the rows of a batch evenly.
    """
    if FIRST_STAGE.rows % workers:
        raise ConfigError(f"`workers` must divide {FIRST_STAGE.rows} rows evenly, not {workers}")
    vocabulary_size = vocabulary.build_tokenizer().get_vocab_size()
    return TrainingConfig(
        steps=steps,
        seed=seed,
        workers=workers,
        save_every=save_every,
        shape=replace(NetworkShape(), vocab_size=vocabulary_size),
        decay_fraction=0.5,
        task_names=(*PROBLEM_MAKERS, "drill"),
    )


def curriculum_stages(steps: int) -> dict[int, DataMixture]:
    """The data mixtures by their start step."""
    return {0: FIRST_STAGE, steps // 2: SECOND_STAGE, steps * 3 // 4: THIRD_STAGE}


def train_embedded(out: Path, config: TrainingConfig, **callbacks: Callable[..., None]) -> Path:
    """Train in ``out/run``, or resume there, and write a checkpoint to ``out/model``.

    The default number of steps takes about an hour on two cores. Batches depend on ``config.seed``
    and the step only. Returns the checkpoint folder. A record of the run is written to ``out``.
    ``callbacks`` are those of ``train``.
    """
    tokenizer = vocabulary.build_tokenizer()
    curriculum = Curriculum(tokenizer, curriculum_stages(config.steps), config.seed)
    network = train(curriculum, config, out / RUN, **callbacks)
    folder = out / "model"
    names = {"pad_token_id": vocabulary.END_OF_TEXT, "mask_token_id": vocabulary.MASK_TOKEN}
    token_ids = {key: tokenizer.get_vocab()[name] for key, name in names.items()}
    save_network(network, folder, **token_ids)
    vocabulary.save_tokenizer(tokenizer, folder)
    write_training_record(out, config)
    return folder


def write_training_record(out: Path, config: TrainingConfig) -> Path:
    """Write a record of the speed, the losses and the expert balance in the log.

    Lines that a power cut or a full disk damaged are left out.
    """
    log = map(_decode_entry, read_file(out / RUN / LOG_FILE, LISTING_FILE).splitlines())
    lines = list({entry["step"]: entry for entry in log if entry}.values())  # a step may come again
    speeds = tuple(float(line["speed"]) for line in lines)
    log_lines = [line for line in lines if line["step"] % RECORD_EVERY == 0 or line is lines[-1]]
    facts = {
        "config": to_json(config),
        "lessons": {
            step: asdict(mixture) for step, mixture in curriculum_stages(config.steps).items()
        },
        "log": log_lines,
    }
    command = ["coterie", *sys.argv[1:]]
    measurements = [Measurement("speed", "positions/s", speeds)] if speeds else []
    return write_record(out, make_record("Embedded training", command, measurements, facts=facts))


def _decode_entry(line: bytes) -> dict[str, Any]:
    """The losses of a step; empty for any other line."""
    with suppress(ValueError, RecursionError):
        entry = json.loads(line)
        names = ("step", "speed", "loss")
        if isinstance(entry, dict) and all(isinstance(entry.get(n), int | float) for n in names):
            return entry
    return {}


def save_network(network: TrainingNetwork, folder: Path, **token_ids: int) -> None:
    """Write ``config.json`` and ``model.safetensors``: bf16 weights and fp32 selection biases.

    ``token_ids`` are further keys of ``config.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: weight.to(torch.float32 if name.endswith("expert_bias") else torch.bfloat16).clone(
            memory_format=torch.contiguous_format
        )
        for name, weight in network.checkpoint_tensors().items()
    }
    atomic_write(folder / "model.safetensors", save(tensors, {"format": "pt"}))
    atomic_write_json(folder / "config.json", {**hf_config(network.shape), **token_ids})


def hf_config(shape: NetworkShape) -> dict[str, object]:
    """The official keys of ``config.json``, which omit the mask id."""
    config = read_object(find_folder(None, ()) / "config.json")  # of the embedded model
    del config["mask_token_id"]
    for attribute, key in keys_of(type(shape)).items():
        config |= dict.fromkeys(key.aliases, getattr(shape, attribute))
    rotary = int(shape.head_dim * shape.rotary_fraction)
    return {**config, "rotary_dim": rotary, "pad_token_id": shape.vocab_size - 1}
