"""Votes of earlier runs in a small file, from which an expert cache can start warm."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.checkpoints.model_folder import ModelFolder
from coterie.errors import CheckpointError, ConfigError, CoterieError
from coterie.files import atomic_write, opened
from coterie.model.safetensors_file import read_chunks
from coterie.model.spec import ModelSpec
from coterie.strict_json import read_object

VOTES_FORMAT, VOTES_VERSION = "coterie votes", 1
VOTE_DIGITS = 6


@dataclass(frozen=True)
class SavedVotes:
    """Mean votes per forward for each expert of each MoE layer.

    ``router_checksum`` identifies the routers that cast them; quantization does not change it. It
    is "" if unknown.
    """

    model: str
    layers: tuple[int, ...]
    votes: tuple[tuple[float, ...], ...]  # [L, E]
    router_checksum: str = ""

    @staticmethod
    def of(
        model: str, layers: Iterable[int], votes: NDArray[np.float64], router_checksum: str = ""
    ):
        """The saved form of votes [L, E]."""
        rows = tuple(tuple(round(float(vote), VOTE_DIGITS) for vote in row) for row in votes)
        return SavedVotes(model, tuple(layers), rows, router_checksum)

    @property
    def label(self) -> str:
        """The model's name and a checksum of the votes."""
        return f"{self.model}, {zlib.crc32(repr(self.votes).encode()):08x}"

    def by_layer(self) -> dict[int, NDArray[np.float64]]:
        """The votes [E] of each layer."""
        return {layer: np.array(row) for layer, row in zip(self.layers, self.votes, strict=True)}

    def check(self, spec: ModelSpec, folder: Path) -> None:
        """Raises ConfigError for votes of another model than the one in this folder."""
        expected = (spec.moe_layers, spec.router.experts)
        if (self.layers, len(self.votes[0])) != expected:
            raise ConfigError(
                f"`warm_start`: votes of {self.model}, with {len(self.layers)} layers of "
                f"{len(self.votes[0])} experts; {folder} has {len(expected[0])} of {expected[1]}"
            )
        if self.router_checksum not in ("", router_checksum(folder)):
            raise ConfigError(
                f"`warm_start`: votes of {self.model}, which has other routers than {folder}; "
                "`coterie trace` saves votes of a model"
            )


def write_votes(path: Path, saved: SavedVotes) -> None:
    """Write one JSON object atomically; raises ConfigError if it cannot be written."""
    content = {
        "format": VOTES_FORMAT,
        "version": VOTES_VERSION,
        "model": saved.model,
        "routers": saved.router_checksum,
        "layers": list(saved.layers),
        "votes": [list(row) for row in saved.votes],
    }
    try:
        atomic_write(path, json.dumps(content).encode() + b"\n")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None


def read_votes(path: Path) -> SavedVotes:
    """Read a file of ``write_votes``; raises ConfigError for any other."""
    try:
        content = read_object(path)
    except CoterieError as error:
        raise ConfigError(
            f"`warm_start`: {error}; `coterie trace` saves votes, and a trace contains them too"
        ) from None
    if content.get("format") != VOTES_FORMAT or content.get("version") != VOTES_VERSION:
        raise ConfigError(
            f"{path}: has no votes (version {VOTES_VERSION}); `coterie trace` saves them"
        )
    try:
        votes = np.array(content["votes"], dtype=np.float64)
        layers = [int(layer) for layer in content["layers"]]  # type: ignore[union-attr]
        is_valid = votes.ndim == 2 and len(votes) == len(layers) > 0 and votes.shape[1] > 0
        is_valid = is_valid and bool(np.isfinite(votes).all() and (votes >= 0).all())
    except (KeyError, TypeError, ValueError):
        is_valid, votes, layers = False, np.zeros(0), []
    if not is_valid:
        raise ConfigError(f"{path}: its votes are not a row of numbers >= 0 for each layer")
    return SavedVotes.of(str(content.get("model")), layers, votes, str(content.get("routers", "")))


def router_checksum(folder: Path) -> str:
    """The checksum of all router weights in a model's files: eight hex digits."""
    gates = {
        weight: (file, entry)
        for weight, file, entry in ModelFolder.open(folder).tensors()
        if weight.endswith(".gate")
    }
    checksum = 0
    for _, (file, entry) in sorted(gates.items()):
        with opened(file) as descriptor:
            for piece in read_chunks(descriptor, entry):
                checksum = zlib.crc32(piece.numpy().data, checksum)
    return f"{checksum:08x}"
