"""Experts that stay in the files of a packed checkpoint, behind memory for some of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from coterie.engine.journal import MANIFEST
from coterie.engine.memory import Settled
from coterie.engine.verify import sums_of
from coterie.experts.couriers import Readers
from coterie.experts.offload import Offloaded
from coterie.experts.tiers import Blobs, OnDisk, Stamp
from coterie.model.checkpoint import Checkpoint
from coterie.model.spec import ModelSpec
from coterie.model.weights import Place, is_packed
from coterie.naming import CoterieError
from coterie.ops.cpu.kernels import memory as allocate
from coterie.ops.panels import in_panels
from coterie.values import Slab


def offloaded(
    checkpoint: Checkpoint, places: Mapping[str, Place], spec: ModelSpec, memory: Settled
) -> Offloaded:
    """The store, with memory for its slots and those in them who are there from the start.

    Raises CoterieError where that memory is not to be had, and for a checkpoint whose experts have
    no checksums.
    """

    def shown(held: Tensor, slot_of: Tensor) -> Slab:
        return in_panels(
            held, spec.panel_kind, slot_of, hidden=spec.hidden, width=spec.expert_width
        )

    store = Offloaded(
        Readers(OnDisk(blobs(checkpoint, places))),
        shown,
        allocate,
        experts=memory.experts,
        expert_bytes=memory.expert_bytes,
        capacity=memory.slots,
        rule=memory.asked.eviction,
        warm={} if memory.asked.warm is None else memory.asked.warm.by_layer(),
    )
    for layer in spec.moe_layers:
        store.resident(layer)
    return store


def blobs(checkpoint: Checkpoint, places: Mapping[str, Place]) -> dict[int, Blobs]:
    """Of each layer: where its packed experts lie, and their checksums."""
    sums, found = sums_of(checkpoint.folder), {}
    for file, entries in checkpoint.files.items():
        for name, entry in entries.items():
            target = places[name].target
            if not is_packed(target):
                continue
            listed = sums.get(name, {}).get("crc32")
            if not isinstance(listed, list) or len(listed) != entry.shape[0]:
                raise CoterieError(
                    f"{checkpoint.folder / MANIFEST}: has no checksums of the experts in {name}"
                )
            checksums = tuple(int(str(one), 16) for one in listed)
            layer, (_, size) = int(target.split(".")[1]), entry.shape
            found[layer] = Blobs(file, entry.start, size, checksums, Stamp.of(file))
    return found
