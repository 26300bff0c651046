"""Experts in two precisions, from two packed folders of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from coterie.engine.coarse import Coarse, Split
from coterie.engine.distance import distances
from coterie.engine.journal import MANIFEST
from coterie.engine.memory import Memory, Settled
from coterie.engine.offloaded import blobs, offloaded
from coterie.engine.source import find_folder
from coterie.engine.verify import sums_of
from coterie.experts.couriers import Readers
from coterie.experts.mixed import Errors, Mixed, Source
from coterie.experts.tiers import OnDisk
from coterie.families import Config, recognise
from coterie.families.names import is_stacked, weight_map
from coterie.families.reading import EXPERT_FORMAT, EXPERT_LAYOUT
from coterie.model.checkpoint import Checkpoint
from coterie.model.spec import ModelSpec
from coterie.model.strictjson import read_object
from coterie.model.weights import Place
from coterie.naming import CoterieError
from coterie.ops.cpu.kernels import memory as allocate
from coterie.ops.panels import in_panels
from coterie.values import Slab

NOBODYS = 1e-9  # votes of those for whom nobody has voted
ITS_OWN = (EXPERT_FORMAT, EXPERT_LAYOUT)  # keys of a config that tell of a precision


@dataclass(frozen=True)
class Packed:
    """A folder whose experts can be read one by one."""

    checkpoint: Checkpoint
    places: Mapping[str, Place]
    spec: ModelSpec

    @staticmethod
    def of(folder: Path) -> Packed:
        """Raises CoterieError for a folder whose experts are not packed."""
        config = Config.of(folder / "config.json")
        family = recognise(config)
        spec = family.read(config)
        if not spec.panels:
            raise CoterieError(
                f"{folder}: --coarse reads experts from a packed checkpoint; "
                "`coterie quantize MODEL OUT --experts int4` makes one"
            )
        checkpoint = Checkpoint.of(folder)
        places = weight_map(family.names, spec, stacked=is_stacked(checkpoint.tensors))
        checkpoint.check(places)
        return Packed(checkpoint, places, spec)

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder


def mixed(fine: Packed, memory: Settled, asked: Coarse) -> Mixed:
    """The store: the settled memory for both, its ``--warm`` votes for who is fine at first.

    Raises CoterieError for two folders that are not one model, and for memory that has no place
    for one of the two.
    """
    coarse = Packed.of(find_folder(asked.folder))
    check_same(fine, coarse)
    warm = {} if memory.asked.warm is None else memory.asked.warm.by_layer()
    if not (warm or asked.placement.most or asked.placement.mass):
        raise CoterieError(
            "--placement votes: --warm FILE says whose; `coterie trace --votes FILE` saves them"
        )
    spec = fine.spec
    split = Split.of(
        memory.slots * memory.expert_bytes,
        asked.placement.share,
        experts=memory.experts,
        fine=spec.expert_stride,
        coarse=coarse.spec.expert_stride,
    )

    def shown(held: Tensor, slot_of: Tensor) -> Slab:
        sizes = {"hidden": spec.hidden, "width": spec.expert_width}
        return in_panels(held, spec.panel_kind, slot_of, **sizes)

    courier = Readers(OnDisk(blobs(fine.checkpoint, fine.places)))
    source = Source(courier, shown, allocate, spec.expert_stride, split.fine)
    others = _of_the_others(memory.asked, split)
    room = replace(memory, asked=others, slots=split.coarse, expert_bytes=coarse.spec.expert_stride)
    store = Mixed(
        source,
        offloaded(coarse.checkpoint, coarse.places, coarse.spec, room),
        asked.placement.most,
        asked.placement.mass,
        warm=warm,
        errors=errors_of(fine, coarse) or {},
        kinds=(spec.panel_kind, coarse.spec.panel_kind),
    )
    store.fill(spec.moe_layers)
    return store


def _of_the_others(asked: Memory, split: Split) -> Memory:
    """The same for coarse experts: from the start those are there who are not fine then."""
    if asked.warm is None:
        return asked
    rows = []
    for votes in asked.warm.votes:
        row = np.array(votes)
        best = np.lexsort((np.arange(len(row)), -row))[: split.fine]
        row = row + NOBODYS  # a place that is free is better filled
        row[best] = 0.0
        rows.append(tuple(row.tolist()))
    return replace(asked, warm=replace(asked.warm, votes=tuple(rows)))


def errors_of(fine: Packed, coarse: Packed) -> dict[int, Errors] | None:
    """By layer; None where a manifest does not tell."""
    found = [distances(one.checkpoint, one.places, one.spec) for one in (fine, coarse)]
    best, rough = found
    if best is None or rough is None:
        return None
    return {layer: Errors(best[layer], rough[layer]) for layer in best}


def check_same(fine: Packed, coarse: Packed) -> None:
    """Raises CoterieError unless both are made of one model, and the coarse one weighs less."""
    ours, theirs = (_config(one.folder) for one in (fine, coarse))
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            raise CoterieError(
                f"{coarse.folder}: another model than {fine.folder}: {key} is "
                f"{theirs.get(key)!r}, not {ours.get(key)!r}"
            )
    if coarse.spec.expert_stride >= fine.spec.expert_stride:
        raise CoterieError(
            f"{coarse.folder}: its experts ({coarse.spec.experts_as}) are not smaller than those "
            f"of {fine.folder} ({fine.spec.experts_as})"
        )
    if not _one_origin(fine.folder, coarse.folder):
        raise CoterieError(
            f"{coarse.folder}: not made of the same weights as {fine.folder}; convert both from "
            "one folder"
        )


def _one_origin(fine: Path, coarse: Path) -> bool:
    """By the fingerprints of their sources; where one is not told, by the weights that they share,
    all but the experts."""
    prints = [_fingerprint(folder) for folder in (fine, coarse)]
    if None not in prints:
        return prints[0] == prints[1]
    ours, theirs = (
        {name: told["sha256"] for name, told in sums_of(folder).items() if "sha256" in told}
        for folder in (fine, coarse)
    )
    return ours == theirs


def _fingerprint(folder: Path) -> object:
    source = read_object(folder / MANIFEST).get("source")
    return source.get("fingerprint") if isinstance(source, dict) else None


def _config(folder: Path) -> dict[str, object]:
    values = Config.of(folder / "config.json").values
    return {key: value for key, value in values.items() if key not in ITS_OWN}
