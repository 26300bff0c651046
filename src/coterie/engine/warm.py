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

from coterie.families import Config, recognise
from coterie.families.names import is_stacked, weight_map
from coterie.model.checkpoint import Checkpoint
from coterie.model.shard import bytes_of
from coterie.model.spec import ModelSpec
from coterie.model.strictjson import read_object
from coterie.naming import CoterieError

FORMAT, VERSION = "coterie votes", 1
DIGITS = 6


@dataclass(frozen=True)
class SavedVotes:
    """Votes of a forward, on average, for each expert of each layer that routes.

    ``routers`` is a checksum of the weights that cast them, the same for a model and what was
    quantised of it; "" where nobody noted it.
    """

    model: str
    layers: tuple[int, ...]
    votes: tuple[tuple[float, ...], ...]  # [L, E]
    routers: str = ""

    @staticmethod
    def of(model: str, layers: Iterable[int], votes: NDArray[np.float64], routers: str = ""):
        """From votes [L, E]."""
        rows = tuple(tuple(round(float(one), DIGITS) for one in row) for row in votes)
        return SavedVotes(model, tuple(layers), rows, routers)

    @property
    def name(self) -> str:
        """Of the model and of these numbers, to know them again by."""
        return f"{self.model}, {zlib.crc32(repr(self.votes).encode()):08x}"

    def by_layer(self) -> dict[int, NDArray[np.float64]]:
        """[E] of each layer."""
        return {at: np.array(row) for at, row in zip(self.layers, self.votes, strict=True)}

    def check(self, spec: ModelSpec, folder: Path) -> None:
        """Raises CoterieError for votes of another model than the one in this folder."""
        ours = (spec.moe_layers, spec.router.experts)
        if (self.layers, len(self.votes[0])) != ours:
            raise CoterieError(
                f"--warm: votes of {self.model}, with {len(self.layers)} layers of "
                f"{len(self.votes[0])} experts; {folder} has {len(ours[0])} of {ours[1]}"
            )
        if self.routers not in ("", routers_of(folder)):
            raise CoterieError(
                f"--warm: votes of {self.model}, whose routers are not those of {folder}; "
                "`coterie trace --votes FILE` saves votes of a model"
            )


def write_votes(path: Path, saved: SavedVotes) -> None:
    """One JSON object, whole or not at all; raises CoterieError where it cannot be written."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": saved.model,
        "routers": saved.routers,
        "layers": list(saved.layers),
        "votes": [list(row) for row in saved.votes],
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(content) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise CoterieError(f"{path}: cannot be written ({error.strerror})") from None


def read_votes(path: Path) -> SavedVotes:
    """What ``write_votes`` wrote; raises CoterieError for anything else."""
    try:
        found = read_object(path)
    except CoterieError as error:
        raise CoterieError(
            f"--warm: {error}; `coterie trace --votes FILE` saves votes, and a trace holds them too"
        ) from None
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise CoterieError(
            f"{path}: holds no votes (version {VERSION}); `coterie trace --votes FILE` saves them"
        )
    try:
        votes = np.array(found["votes"], dtype=np.float64)
        layers = [int(layer) for layer in found["layers"]]  # type: ignore[union-attr]
        sound = votes.ndim == 2 and len(votes) == len(layers) > 0 and votes.shape[1] > 0
        sound = sound and bool(np.isfinite(votes).all() and (votes >= 0).all())
    except (KeyError, TypeError, ValueError):
        sound, votes, layers = False, np.zeros(0), []
    if not sound:
        raise CoterieError(f"{path}: its votes are not a row of numbers >= 0 for each layer")
    return SavedVotes.of(str(found.get("model")), layers, votes, str(found.get("routers", "")))


def routers_of(folder: Path) -> str:
    """Eight hex digits: a checksum of all gates as they are in a model's files."""
    config = Config.of(folder / "config.json")
    family, checkpoint = recognise(config), Checkpoint.of(folder)
    stacked = is_stacked(checkpoint.tensors)
    places = weight_map(family.names, family.read(config), stacked=stacked)
    gates, found = {}, 0
    for file, entries in checkpoint.files.items():
        for name, entry in entries.items():
            if name in places and places[name].target.endswith(".gate"):
                gates[places[name].target] = (file, entry)
    for _, (file, entry) in sorted(gates.items()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            for piece in bytes_of(descriptor, entry):
                found = zlib.crc32(piece.numpy().data, found)
        finally:
            os.close(descriptor)
    return f"{found:08x}"
