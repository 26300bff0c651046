"""Experts that stay in the files of a packed checkpoint, behind memory for some of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from coterie.checkpoints.manifest import MANIFEST
from coterie.checkpoints.verification import manifest_checksums
from coterie.errors import CoterieError
from coterie.loading.expert_memory import ExpertMemoryPlan
from coterie.model.checkpoint import Checkpoint
from coterie.model.spec import ModelSpec
from coterie.model.weights import TensorTarget, is_packed
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.tiers import DiskTier, ExpertFileSpan, FileIdentity
from coterie.ops.cpu.experts import allocate as allocate
from coterie.ops.packed_layout import slab_of_packed
from coterie.values import Slab


def build_disk_store(
    checkpoint: Checkpoint,
    targets: Mapping[str, TensorTarget],
    spec: ModelSpec,
    plan: ExpertMemoryPlan,
) -> CachedExpertStore:
    """The store, with memory for its slots and those in them who are there from the start.

    Raises CoterieError where that memory is not to be had, and for a checkpoint whose experts have
    no checksums.
    """

    def make_slab(buffer: Tensor, slot_of: Tensor) -> Slab:
        return slab_of_packed(
            buffer, spec.panel_kind, slot_of, hidden=spec.hidden, width=spec.expert_width
        )

    store = CachedExpertStore(
        ThreadedFetcher(DiskTier(expert_file_spans(checkpoint, targets))),
        make_slab,
        allocate,
        experts=plan.experts,
        expert_bytes=plan.expert_bytes,
        capacity=plan.slots,
        eviction=plan.config.eviction,
        warm_votes={} if plan.config.warm_start is None else plan.config.warm_start.by_layer(),
    )
    for layer in spec.moe_layers:
        store.resident(layer)
    return store


def expert_file_spans(
    checkpoint: Checkpoint, targets: Mapping[str, TensorTarget]
) -> dict[int, ExpertFileSpan]:
    """Of each layer: where its packed experts lie, and their checksums."""
    checksums_by_tensor, spans = manifest_checksums(checkpoint.folder), {}
    for file, entries in checkpoint.files.items():
        for name, entry in entries.items():
            target = targets[name].weight
            if not is_packed(target):
                continue
            hex_checksums = checksums_by_tensor.get(name, {}).get("crc32")
            if not isinstance(hex_checksums, list) or len(hex_checksums) != entry.shape[0]:
                raise CoterieError(
                    f"{checkpoint.folder / MANIFEST}: has no checksums of the experts in {name}"
                )
            checksums = tuple(int(str(checksum), 16) for checksum in hex_checksums)
            layer, (_, size) = int(target.split(".")[1]), entry.shape
            spans[layer] = ExpertFileSpan(file, entry.start, size, checksums, FileIdentity.of(file))
    return spans
