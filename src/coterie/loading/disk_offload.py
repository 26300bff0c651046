"""The placement of a CPU: experts stay in a packed checkpoint's files, and some are cached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coterie.checkpoints.manifest import MANIFEST
from coterie.checkpoints.model_folder import ModelFolder
from coterie.checkpoints.verification import manifest_checksums
from coterie.errors import CheckpointError, OffloadError
from coterie.files import ProgressCallback
from coterie.loading.expert_memory import ExpertMemoryConfig, ExpertMemoryPlan, plan_expert_memory
from coterie.loading.free_memory import free_memory
from coterie.loading.placement import LoadedModel
from coterie.loading.target import LoadTarget
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.eviction import Eviction, FloatArray
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.tiers import DiskTier, ExpertFileSpan, FileIdentity
from coterie.ops.cpu.experts import allocate as allocate_panels


@dataclass(frozen=True)
class DiskOffload:
    """Experts in the files of a packed checkpoint, and a cache of some in memory."""

    plan: ExpertMemoryPlan

    def load(self, target: LoadTarget, on_progress: ProgressCallback | None) -> LoadedModel:
        plan, model = self.plan, target.model
        weights = target.load_weights(on_progress, experts=False, absent_bytes=plan.absent_bytes)
        config = plan.config
        store = disk_store(model, plan.slots, config.eviction, config.warm_votes)
        for layer in model.spec.moe_layers:
            store.layer_cache(layer)
        return LoadedModel(weights, store, self)

    def describe(self) -> tuple[str, ...]:
        others = ", the others on disk" if self.plan.absent_bytes else ""
        return (f"{self.plan.summary} ({self.plan.slots_size}){others}",)


def plan_disk_offload(config: ExpertMemoryConfig, target: LoadTarget) -> ExpertMemoryPlan:
    """Raises OffloadError unless a CPU can fetch single experts, and for options of a GPU."""
    if not target.spec.panels:
        raise OffloadError(
            f"{target.model.path}: `expert_memory` fetches single experts from a packed checkpoint "
            "for the CPU kernels; `coterie quantize` makes one, and `simulated` needs none"
        )
    if config.host_memory is not None:
        raise OffloadError(
            "`host_memory` has no effect on a CPU: `expert_memory` is host memory there; on a GPU "
            "it is a cache between the disk and the GPU"
        )
    if config.cpu_experts is not None:
        raise OffloadError("`cpu_experts` has no effect on a CPU, which computes all experts")
    return plan_expert_memory(
        config,
        target.spec,
        target.dtype,
        expert_bytes=target.spec.expert_stride,
        free_bytes=free_memory(target.device),
    )


def disk_store(
    model: ModelFolder, slots: int, eviction: Eviction, warm_votes: Mapping[int, FloatArray]
) -> CachedExpertStore:
    """A cache over a packed checkpoint; raises CheckpointError if it has no expert checksums."""
    return CachedExpertStore(
        ThreadedFetcher(DiskTier(expert_file_spans(model))),
        model.packed_slab,
        allocate_panels,
        experts=model.spec.router.experts,
        expert_bytes=model.spec.expert_stride,
        capacity=slots,
        eviction=eviction,
        warm_votes=warm_votes,
    )


def expert_file_spans(model: ModelFolder) -> dict[int, ExpertFileSpan]:
    """Where each layer's packed experts are, with their checksums."""
    checksums_by_tensor, spans = manifest_checksums(model.path), {}
    for layer, file, entry in model.packed_experts():
        experts, size = entry.shape
        checksums = checksums_by_tensor.get(entry.name, {}).get("crc32")
        if not isinstance(checksums, list) or len(checksums) != experts:
            raise CheckpointError(
                f"{model.path / MANIFEST}: has no checksums of the experts in {entry.name}"
            )
        numbers = tuple(int(str(checksum), 16) for checksum in checksums)
        spans[layer] = ExpertFileSpan(file, entry.start, size, numbers, FileIdentity.of(file))
    return spans
