"""Experts in two precisions, from two packed folders of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from coterie.checkpoints.manifest import MANIFEST
from coterie.checkpoints.quantization_error import quantization_errors
from coterie.checkpoints.source import find_folder
from coterie.checkpoints.verification import manifest_checksums
from coterie.errors import CoterieError
from coterie.families import ModelConfig, detect_family
from coterie.families.common import EXPERT_FORMAT_KEY, EXPERT_LAYOUT_KEY
from coterie.families.names import is_stacked, weight_map
from coterie.loading.disk_offload import build_disk_store, expert_file_spans
from coterie.loading.expert_memory import ExpertMemoryConfig, ExpertMemoryPlan
from coterie.loading.low_precision import LowPrecisionExperts, PrecisionSplit
from coterie.model.checkpoint import Checkpoint
from coterie.model.spec import ModelSpec
from coterie.model.weights import TensorTarget
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.mixed_precision_store import (
    HighPrecisionSource,
    MixedPrecisionStore,
    PrecisionErrors,
)
from coterie.offload.tiers import DiskTier
from coterie.ops.cpu.experts import allocate as allocate
from coterie.ops.packed_layout import slab_of_packed
from coterie.strict_json import read_object
from coterie.values import Slab

UNVOTED_SCORE = 1e-9  # votes of those for whom nobody has voted
PRECISION_KEYS = (EXPERT_FORMAT_KEY, EXPERT_LAYOUT_KEY)  # keys of a config that tell of a precision


@dataclass(frozen=True)
class PackedModel:
    """A folder whose experts can be read one by one."""

    checkpoint: Checkpoint
    targets: Mapping[str, TensorTarget]
    spec: ModelSpec

    @staticmethod
    def open(folder: Path) -> PackedModel:
        """Raises CoterieError for a folder whose experts are not packed."""
        config = ModelConfig.of(folder / "config.json")
        family = detect_family(config)
        spec = family.read_spec(config)
        if not spec.panels:
            raise CoterieError(
                f"{folder}: --coarse reads experts from a packed checkpoint; "
                "`coterie quantize MODEL OUT --experts int4` makes one"
            )
        checkpoint = Checkpoint.of(folder)
        targets = weight_map(family.tensor_names, spec, stacked=is_stacked(checkpoint.tensors))
        checkpoint.check(targets)
        return PackedModel(checkpoint, targets, spec)

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder


def build_mixed_store(
    high: PackedModel, plan: ExpertMemoryPlan, config: LowPrecisionExperts
) -> MixedPrecisionStore:
    """The store: the settled memory for both, its ``--warm`` votes for who is fine at first.

    Raises CoterieError for two folders that are not one model, and for memory that has no place
    for one of the two.
    """
    low = PackedModel.open(find_folder(config.folder))
    check_same_model(high, low)
    warm_votes = {} if plan.config.warm_start is None else plan.config.warm_start.by_layer()
    if not (warm_votes or config.precision_policy.most or config.precision_policy.mass):
        raise CoterieError(
            "--placement votes: --warm FILE says whose; `coterie trace --votes FILE` saves them"
        )
    spec = high.spec
    split = PrecisionSplit.of(
        plan.slots * plan.expert_bytes,
        config.precision_policy.share,
        experts=plan.experts,
        high_bytes=spec.expert_stride,
        low_bytes=low.spec.expert_stride,
    )

    def make_slab(buffer: Tensor, slot_of: Tensor) -> Slab:
        sizes = {"hidden": spec.hidden, "width": spec.expert_width}
        return slab_of_packed(buffer, spec.panel_kind, slot_of, **sizes)

    fetcher = ThreadedFetcher(DiskTier(expert_file_spans(high.checkpoint, high.targets)))
    source = HighPrecisionSource(fetcher, make_slab, allocate, spec.expert_stride, split.high_slots)
    low_memory = _low_precision_memory(plan.config, split)
    low_plan = replace(
        plan, config=low_memory, slots=split.low_slots, expert_bytes=low.spec.expert_stride
    )
    store = MixedPrecisionStore(
        source,
        build_disk_store(low.checkpoint, low.targets, low.spec, low_plan),
        config.precision_policy.most,
        config.precision_policy.mass,
        warm_votes=warm_votes,
        errors=precision_errors(high, low) or {},
        format_names=(spec.panel_kind, low.spec.panel_kind),
    )
    store.fill(spec.moe_layers)
    return store


def _low_precision_memory(config: ExpertMemoryConfig, split: PrecisionSplit) -> ExpertMemoryConfig:
    """The same for coarse experts: from the start those are there who are not fine then."""
    if config.warm_start is None:
        return config
    rows = []
    for votes in config.warm_start.votes:
        row = np.array(votes)
        top_ids = np.lexsort((np.arange(len(row)), -row))[: split.high_slots]
        row = row + UNVOTED_SCORE  # a place that is free is better filled
        row[top_ids] = 0.0
        rows.append(tuple(row.tolist()))
    return replace(config, warm_start=replace(config.warm_start, votes=tuple(rows)))


def precision_errors(high: PackedModel, low: PackedModel) -> dict[int, PrecisionErrors] | None:
    """By layer; None where a manifest does not tell."""
    errors = [
        quantization_errors(packed.checkpoint, packed.targets, packed.spec)
        for packed in (high, low)
    ]
    high_errors, low_errors = errors
    if high_errors is None or low_errors is None:
        return None
    return {layer: PrecisionErrors(high_errors[layer], low_errors[layer]) for layer in high_errors}


def check_same_model(high: PackedModel, low: PackedModel) -> None:
    """Raises CoterieError unless both are made of one model, and the coarse one weighs less."""
    high_config, low_config = (_shared_config(packed.folder) for packed in (high, low))
    for key in sorted({*high_config, *low_config}):
        if high_config.get(key) != low_config.get(key):
            raise CoterieError(
                f"{low.folder}: another model than {high.folder}: {key} is "
                f"{low_config.get(key)!r}, not {high_config.get(key)!r}"
            )
    if low.spec.expert_stride >= high.spec.expert_stride:
        raise CoterieError(
            f"{low.folder}: its experts ({low.spec.expert_storage}) are not smaller than those "
            f"of {high.folder} ({high.spec.expert_storage})"
        )
    if not _same_source(high.folder, low.folder):
        raise CoterieError(
            f"{low.folder}: not made of the same weights as {high.folder}; convert both from "
            "one folder"
        )


def _same_source(high: Path, low: Path) -> bool:
    """By the fingerprints of their sources; where one is not told, by the weights that they share,
    all but the experts."""
    fingerprints = [_fingerprint(folder) for folder in (high, low)]
    if None not in fingerprints:
        return fingerprints[0] == fingerprints[1]
    high_sums, low_sums = (
        {
            name: checksums["sha256"]
            for name, checksums in manifest_checksums(folder).items()
            if "sha256" in checksums
        }
        for folder in (high, low)
    )
    return high_sums == low_sums


def _fingerprint(folder: Path) -> object:
    source = read_object(folder / MANIFEST).get("source")
    return source.get("fingerprint") if isinstance(source, dict) else None


def _shared_config(folder: Path) -> dict[str, object]:
    values = ModelConfig.of(folder / "config.json").values
    return {key: value for key, value in values.items() if key not in PRECISION_KEYS}
