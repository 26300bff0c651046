"""The result of a training run: a checkpoint folder in the official layout, and a record."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer

from coterie.checkpoints.source import find_folder
from coterie.files import atomic_write, atomic_write_json, read_file
from coterie.keys import from_json, keys_of, to_json
from coterie.lab.records import Measurement, make_record, write_record
from coterie.lab.training import vocabulary
from coterie.lab.training.feed import BatchFunction
from coterie.lab.training.loop import LOG_FILE, TrainingConfig, train
from coterie.lab.training.network import NetworkShape, TrainingNetwork
from coterie.strict_json import LISTING_FILE, read_object

RUN = "run"  # folder of the state and the log
RECORD_EVERY = 500  # steps between the log lines in a record


@dataclass(frozen=True)
class TrainingRun:
    """A training run: its settings, where its batches come from, and what its record states."""

    title: str
    config: TrainingConfig
    tokenizer: Tokenizer
    make_batch: BatchFunction
    chat_template: str = vocabulary.CHAT_TEMPLATE
    facts: Mapping[str, object] = field(default_factory=dict)
    measure: Callable[[TrainingNetwork], Mapping[str, object]] = lambda network: {}


def train_checkpoint(out: Path, run: TrainingRun, **callbacks: Callable[..., None]) -> Path:
    """Train in ``out/run``, or resume there, and write a checkpoint to ``out/model``.

    Batches depend on the seed and the step only. Returns the checkpoint folder. A record of the run
    is written to ``out``. ``callbacks`` are those of ``train``.
    """
    network = train(run.make_batch, run.config, out / RUN, **callbacks)
    folder = out / "model"
    names = {"pad_token_id": vocabulary.END_OF_TEXT, "mask_token_id": vocabulary.MASK_TOKEN}
    token_ids = {key: run.tokenizer.get_vocab()[name] for key, name in names.items()}
    save_network(network, folder, **token_ids)
    vocabulary.save_tokenizer(run.tokenizer, folder, run.chat_template)
    write_training_record(out, run.config, run.title, {**run.facts, **run.measure(network)})
    return folder


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


def load_network(folder: Path) -> TrainingNetwork:
    """The trainable model of a checkpoint folder that ``save_network`` wrote."""
    config = read_object(folder / "config.json")
    names = {name for key in keys_of(NetworkShape).values() for name in key.aliases}
    shape = from_json(NetworkShape, {name: config[name] for name in names & config.keys()})
    network, tensors = TrainingNetwork(shape), load_file(folder / "model.safetensors")
    for name, weight in network.checkpoint_tensors().items():
        weight.copy_(tensors[name])
    return network


def hf_config(shape: NetworkShape) -> dict[str, object]:
    """The official keys of ``config.json``, which omit the mask id."""
    config = read_object(find_folder(None, ()) / "config.json")  # of the embedded model
    del config["mask_token_id"]
    for attribute, key in keys_of(type(shape)).items():
        config |= dict.fromkeys(key.aliases, getattr(shape, attribute))
    rotary = int(shape.head_dim * shape.rotary_fraction)
    return {**config, "rotary_dim": rotary, "pad_token_id": shape.vocab_size - 1}


def write_training_record(
    out: Path, config: TrainingConfig, title: str, facts: Mapping[str, object]
) -> Path:
    """Write a record of the speed, the losses and the expert balance in the log.

    Lines that a power cut or a full disk damaged are left out.
    """
    log = map(_decode_entry, read_file(out / RUN / LOG_FILE, LISTING_FILE).splitlines())
    lines = list({entry["step"]: entry for entry in log if entry}.values())  # a step may come again
    speeds = tuple(float(line["speed"]) for line in lines)
    log_lines = [line for line in lines if line["step"] % RECORD_EVERY == 0 or line is lines[-1]]
    all_facts = {"config": to_json(config), **facts, "log": log_lines}
    command = ["coterie", *sys.argv[1:]]
    measurements = [Measurement("speed", "positions/s", speeds)] if speeds else []
    return write_record(out, make_record(title, command, measurements, facts=all_facts))


def _decode_entry(line: bytes) -> dict[str, Any]:
    """The losses of a step; empty for any other line."""
    with suppress(ValueError, RecursionError):
        entry = json.loads(line)
        names = ("step", "speed", "loss")
        if isinstance(entry, dict) and all(isinstance(entry.get(n), int | float) for n in names):
            return entry
    return {}
