"""Votes of earlier runs, in a small file: who is worth having in memory before anybody asks."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.errors import CoterieError
from coterie.families import ModelConfig, detect_family
from coterie.families.names import is_stacked, weight_map
from coterie.model.checkpoint import Checkpoint
from coterie.model.safetensors_file import read_chunks
from coterie.model.spec import ModelSpec
from coterie.strict_json import read_object

VOTES_FORMAT, VOTES_VERSION = "coterie votes", 1
VOTE_DIGITS = 6


@dataclass(frozen=True)
class SavedVotes:
    """Votes of a forward, on average, for each expert of each layer that routes.

    ``routers`` is a checksum of the weights that cast them, the same for a model and what was
    quantised of it; "" where nobody noted it.
    """

    model: str
    layers: tuple[int, ...]
    votes: tuple[tuple[float, ...], ...]  # [L, E]
    router_checksum: str = ""

    @staticmethod
    def of(
        model: str, layers: Iterable[int], votes: NDArray[np.float64], router_checksum: str = ""
    ):
        """From votes [L, E]."""
        rows = tuple(tuple(round(float(vote), VOTE_DIGITS) for vote in row) for row in votes)
        return SavedVotes(model, tuple(layers), rows, router_checksum)

    @property
    def label(self) -> str:
        """Of the model and of these numbers, to know them again by."""
        return f"{self.model}, {zlib.crc32(repr(self.votes).encode()):08x}"

    def by_layer(self) -> dict[int, NDArray[np.float64]]:
        """[E] of each layer."""
        return {layer: np.array(row) for layer, row in zip(self.layers, self.votes, strict=True)}

    def check(self, spec: ModelSpec, folder: Path) -> None:
        """Raises CoterieError for votes of another model than the one in this folder."""
        expected = (spec.moe_layers, spec.router.experts)
        if (self.layers, len(self.votes[0])) != expected:
            raise CoterieError(
                f"--warm: votes of {self.model}, with {len(self.layers)} layers of "
                f"{len(self.votes[0])} experts; {folder} has {len(expected[0])} of {expected[1]}"
            )
        if self.router_checksum not in ("", router_checksum(folder)):
            raise CoterieError(
                f"--warm: votes of {self.model}, whose routers are not those of {folder}; "
                "`coterie trace --votes FILE` saves votes of a model"
            )


def write_votes(path: Path, saved: SavedVotes) -> None:
    """One JSON object, whole or not at all; raises CoterieError where it cannot be written."""
    content = {
        "format": VOTES_FORMAT,
        "version": VOTES_VERSION,
        "model": saved.model,
        "routers": saved.router_checksum,
        "layers": list(saved.layers),
        "votes": [list(row) for row in saved.votes],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CoterieError(f"{path}: cannot be written ({error.strerror})") from None


def read_votes(path: Path) -> SavedVotes:
    """What ``write_votes`` wrote; raises CoterieError for anything else."""
    try:
        content = read_object(path)
    except CoterieError as error:
        raise CoterieError(
            f"--warm: {error}; `coterie trace --votes FILE` saves votes, and a trace holds them too"
        ) from None
    if content.get("format") != VOTES_FORMAT or content.get("version") != VOTES_VERSION:
        raise CoterieError(
            f"{path}: holds no votes (version {VOTES_VERSION}); `coterie trace --votes FILE` saves them"
        )
    try:
        votes = np.array(content["votes"], dtype=np.float64)
        layers = [int(layer) for layer in content["layers"]]  # type: ignore[union-attr]
        is_valid = votes.ndim == 2 and len(votes) == len(layers) > 0 and votes.shape[1] > 0
        is_valid = is_valid and bool(np.isfinite(votes).all() and (votes >= 0).all())
    except (KeyError, TypeError, ValueError):
        is_valid, votes, layers = False, np.zeros(0), []
    if not is_valid:
        raise CoterieError(f"{path}: its votes are not a row of numbers >= 0 for each layer")
    return SavedVotes.of(str(content.get("model")), layers, votes, str(content.get("routers", "")))


def router_checksum(folder: Path) -> str:
    """Eight hex digits: a checksum of all gates as they are in a model's files."""
    config = ModelConfig.of(folder / "config.json")
    family, checkpoint = detect_family(config), Checkpoint.of(folder)
    stacked = is_stacked(checkpoint.tensors)
    targets = weight_map(family.tensor_names, family.read_spec(config), stacked=stacked)
    gates, checksum = {}, 0
    for file, entries in checkpoint.files.items():
        for name, entry in entries.items():
            if name in targets and targets[name].weight.endswith(".gate"):
                gates[targets[name].weight] = (file, entry)
    for _, (file, entry) in sorted(gates.items()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            for piece in read_chunks(descriptor, entry):
                checksum = zlib.crc32(piece.numpy().data, checksum)
        finally:
            os.close(descriptor)
    return f"{checksum:08x}"
