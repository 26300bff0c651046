"""The placement with two precisions: both read from packed checkpoints of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coterie.checkpoints.manifest import MANIFEST
from coterie.checkpoints.model_folder import ModelFolder
from coterie.checkpoints.quantization_error import quantization_errors
from coterie.checkpoints.source import find_folder
from coterie.checkpoints.verification import manifest_checksums
from coterie.errors import CheckpointError, OffloadError, quote
from coterie.families.common import DENSE_FORMAT_KEY, EXPERT_FORMAT_KEY, EXPERT_LAYOUT_KEY
from coterie.files import ProgressCallback
from coterie.loading.disk_offload import disk_store, plan_disk_offload
from coterie.loading.expert_memory import ExpertMemoryConfig, ExpertMemoryPlan
from coterie.loading.low_precision import LowPrecisionExperts, split_slots
from coterie.loading.placement import LoadedModel
from coterie.loading.target import LoadTarget
from coterie.offload.capacity import format_bytes
from coterie.offload.eviction import ByVotes, FloatArray
from coterie.offload.mixed_precision_store import MixedPrecisionStore
from coterie.offload.precision_stats import PrecisionErrors
from coterie.strict_json import LISTING_FILE, read_object

UNVOTED_SCORE = 1e-9  # above 0, so that experts without votes fill the slots that are left
PRECISION_KEYS = (EXPERT_FORMAT_KEY, EXPERT_LAYOUT_KEY, DENSE_FORMAT_KEY)
"""The only keys that two configs differ in."""


@dataclass(frozen=True)
class MixedPrecision:
    """Experts in the files of two packed checkpoints, and a cache for each precision."""

    plan: ExpertMemoryPlan
    low_precision: LowPrecisionExperts
    high: ModelFolder
    low: ModelFolder
    high_slots: int  # per layer
    low_slots: int
    errors: Mapping[int, PrecisionErrors]  # by layer; empty if a manifest has none

    @staticmethod
    def of(
        config: ExpertMemoryConfig, low_precision: LowPrecisionExperts, target: LoadTarget
    ) -> MixedPrecision:
        """Raises CoterieError for two checkpoints that are not of one model, and for memory that
        has no slot for one of the two precisions."""
        plan, policy = plan_disk_offload(config, target), low_precision.precision_policy
        if plan.holds_all:
            raise OffloadError("`fallback_model` has no effect: all experts fit into free memory")
        low = open_packed(find_folder(low_precision.folder))
        check_same_model(target.model, low)
        if not (config.warm_votes or policy.most or policy.mass):
            raise OffloadError(
                "`precision_policy` static needs the votes of `warm_start`; `coterie trace` saves "
                "votes"
            )
        slots = split_slots(
            plan.slots * plan.expert_bytes,
            policy.share,
            experts=plan.experts,
            high_bytes=plan.expert_bytes,
            low_bytes=low.spec.expert_stride,
        )
        errors = precision_errors(target.model, low)
        return MixedPrecision(plan, low_precision, target.model, low, *slots, errors)

    def load(self, target: LoadTarget, on_progress: ProgressCallback | None) -> LoadedModel:
        weights = target.load_weights(
            on_progress, experts=False, absent_bytes=self.plan.absent_bytes
        )
        config, policy = self.plan.config, self.low_precision.precision_policy
        low_votes = {
            layer: self._low_precision_votes(votes) for layer, votes in config.warm_votes.items()
        }
        store = MixedPrecisionStore(
            disk_store(self.high, self.high_slots, ByVotes(), config.warm_votes),
            disk_store(self.low, self.low_slots, config.eviction, low_votes),
            policy.most,
            policy.mass,
            errors=self.errors,
            format_names=self._formats,
        )
        store.fill(target.spec.moe_layers)
        return LoadedModel(weights, store, self)

    def describe(self) -> tuple[str, ...]:
        plan, (high_format, low_format) = self.plan, self._formats
        low_bytes = self.low_slots * self.low.spec.expert_stride
        size = format_bytes((self.high_slots * plan.expert_bytes + low_bytes) * plan.layers)
        holds_all = self.high_slots + self.low_slots >= plan.experts
        on_disk = "" if holds_all else f", the others on disk in {low_format}"
        no_bound = "" if self.errors else "; a manifest has no quantization errors: no error bound"
        return (
            f"{self.high_slots} of {plan.experts} experts per layer in {high_format} and "
            f"{self.low_slots} in {low_format} in memory ({size}){on_disk}{no_bound}",
        )

    @property
    def _formats(self) -> tuple[str, str]:
        return self.high.spec.panel_kind, self.low.spec.panel_kind

    def _low_precision_votes(self, votes: FloatArray) -> FloatArray:
        """[E]: votes for the low-precision cache: 0 for the initial high-precision experts."""
        top_ids = np.lexsort((np.arange(len(votes)), -votes))[: self.high_slots]
        low_votes = votes + UNVOTED_SCORE
        low_votes[top_ids] = 0.0
        return low_votes


def open_packed(folder: Path) -> ModelFolder:
    """Raises CheckpointError for a checkpoint that is not packed."""
    model = ModelFolder.open(folder)
    if not model.spec.panels:
        raise CheckpointError(
            f"{folder}: `fallback_model` fetches single experts from a packed checkpoint; "
            "`coterie quantize` makes one"
        )
    return model


def precision_errors(high: ModelFolder, low: ModelFolder) -> dict[int, PrecisionErrors]:
    """Quantization errors by layer; empty if a manifest has none."""
    high_errors, low_errors = (quantization_errors(model) for model in (high, low))
    if high_errors is None or low_errors is None:
        return {}
    return {layer: PrecisionErrors(high_errors[layer], low_errors[layer]) for layer in high_errors}


def check_same_model(high: ModelFolder, low: ModelFolder) -> None:
    """Raises CheckpointError unless both were made from one model and ``low`` is smaller."""
    high_config, low_config = (_shared_config(model) for model in (high, low))
    for key in sorted({*high_config, *low_config}):
        if high_config.get(key) != low_config.get(key):
            raise CheckpointError(
                f"{low.path}: not the model of {high.path}: {key} is {quote(low_config.get(key))}, "
                f"not {quote(high_config.get(key))}"
            )
    if low.spec.expert_stride >= high.spec.expert_stride:
        raise CheckpointError(
            f"{low.path}: its experts ({low.spec.expert_storage}) are not smaller than those of "
            f"{high.path} ({high.spec.expert_storage})"
        )
    if not _same_source(high.path, low.path):
        raise CheckpointError(
            f"{low.path}: not made from the weights of {high.path}; convert both from one folder"
        )


def _same_source(high: Path, low: Path) -> bool:
    """Compares the fingerprints of the sources, or else the checksums of all other weights."""
    fingerprints = [_fingerprint(folder) for folder in (high, low)]
    if None not in fingerprints:
        return fingerprints[0] == fingerprints[1]
    high_sums, low_sums = (
        {name: one["sha256"] for name, one in manifest_checksums(folder).items() if "sha256" in one}
        for folder in (high, low)
    )
    return high_sums == low_sums


def _fingerprint(folder: Path) -> object:
    source = read_object(folder / MANIFEST, LISTING_FILE).get("source")
    return source.get("fingerprint") if isinstance(source, dict) else None


def _shared_config(model: ModelFolder) -> dict[str, object]:
    return {key: value for key, value in model.config.values.items() if key not in PRECISION_KEYS}
