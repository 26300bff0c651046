"""Conversion of a published checkpoint: quantizes its experts, packs them for a CPU, or both.

A conversion can be resumed: files are written atomically, and a journal lists the finished ones.
``config.json`` is written last, and then the journal is removed.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coterie.checkpoints.fingerprint import FILE_LIMIT, sample_bytes
from coterie.checkpoints.journal import ConversionJournal
from coterie.checkpoints.manifest import MANIFEST, Checksums
from coterie.checkpoints.model_folder import ModelFolder
from coterie.checkpoints.output_files import (
    ConvertedShard,
    OutputFile,
    PackedLayer,
    header,
    total_bytes,
)
from coterie.checkpoints.source import MODEL_FILES, find_folder
from coterie.errors import CheckpointError, ConfigError
from coterie.families import ModelConfig
from coterie.families.common import (
    DENSE_FORMAT_KEY,
    EXPERT_FORMAT_KEY,
    EXPERT_LAYOUT_KEY,
    PANEL_LAYOUT,
)
from coterie.families.names import is_expert, layer_of, packed_name
from coterie.files import (
    OpenFiles,
    ProgressCallback,
    atomic_write,
    atomic_write_json,
    atomic_writer,
    opened,
    read_file,
    remove_partial,
    running_total,
)
from coterie.model.checkpoint import INDEX_FILE
from coterie.model.safetensors_file import TensorEntry
from coterie.model.spec import ModelSpec
from coterie.model.weights import TensorTarget, quant_format
from coterie.offload.capacity import format_bytes
from coterie.ops.packed_layout import LAYOUT_VERSION
from coterie.quantization import FORMATS, QuantFormat, parse_dense_format, parse_format
from coterie.strict_json import SMALL_FILE

CONFIG_FILE = "config.json"
BF16 = "bf16"
PLAIN_LAYOUT = "plain"
LAYOUTS = (PANEL_LAYOUT, PLAIN_LAYOUT)
RESUMABLE = "; finished files are kept, and the same command resumes"


@dataclass(frozen=True)
class ConversionTarget:
    """The format that a conversion writes experts in, and dense matrices."""

    expert_format: QuantFormat | None  # None: bf16
    packed: bool  # in the CPU kernels' layout
    dense_format: QuantFormat | None = None  # None: as stored

    @staticmethod
    def parse(
        expert_dtype: str,
        group_size: int | None = None,
        layout: str | None = None,
        dense_dtype: str | None = None,
    ) -> ConversionTarget:
        """The target with these names. By default experts are packed if the format allows it.

        Raises ConfigError for an unknown name, and for options that do not fit together.
        """
        if expert_dtype == BF16 and group_size is not None:
            raise ConfigError(
                f"`group_size` has no effect with `expert_dtype={BF16}`: bf16 has no scales"
            )
        if expert_dtype not in (BF16, *FORMATS):
            known = ", ".join((*FORMATS, BF16))
            raise ConfigError(f"unknown format {expert_dtype!r} for experts; known: {known}")
        if layout not in (None, *LAYOUTS):
            raise ConfigError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
        expert_format = None if expert_dtype == BF16 else parse_format(expert_dtype, group_size)
        packed = _can_pack(expert_format) if layout is None else layout == PANEL_LAYOUT
        dense_format = None if dense_dtype is None else parse_dense_format(dense_dtype)
        return ConversionTarget(expert_format, packed, dense_format)

    def __post_init__(self) -> None:
        if self.expert_format is None and not self.packed:
            raise ConfigError(
                f"`layout={PLAIN_LAYOUT}` leaves {BF16} experts unchanged; "
                f"`layout={PANEL_LAYOUT}` packs them"
            )
        if self.packed and not _can_pack(self.expert_format):
            supported = " and ".join(map(str, FORMATS.values()))
            raise ConfigError(
                f"packed experts are {supported}, not {self.expert_format}; "
                f"`layout={PLAIN_LAYOUT}` supports every format"
            )

    def __str__(self) -> str:
        dense = "" if self.dense_format is None else f"; dense matrices in {self.dense_format}"
        return f"{self.expert_format or BF16}{', packed' if self.packed else ''}{dense}"

    @property
    def manifest_entry(self) -> dict[str, object]:
        if self.expert_format is None:
            return {"format": BF16, "group": None}
        return self.expert_format.to_dict()

    @property
    def dense_entry(self) -> dict[str, object]:
        """The format of dense matrices under its key in ``config.json``; {} if they stay."""
        return {} if self.dense_format is None else {DENSE_FORMAT_KEY: self.dense_format.to_dict()}

    def converted_spec(self, spec: ModelSpec) -> ModelSpec:
        """The spec of the result, from that of the source."""
        dense_format = self.dense_format or spec.dense_format
        return replace(
            spec, expert_format=self.expert_format, panels=self.packed, dense_format=dense_format
        )


@dataclass(frozen=True)
class ConversionResult:
    """The output of a conversion."""

    folder: Path
    target: ConversionTarget
    bytes_before: int
    bytes_after: int
    files: int
    files_resumed: int  # finished by an earlier run

    def describe(self) -> str:
        before, after = format_bytes(self.bytes_before), format_bytes(self.bytes_after)
        resumed = f", {self.files_resumed} of them finished before" if self.files_resumed else ""
        sizes = f"{before} became {after} in {self.files} files{resumed}"
        return f"{self.folder}: experts in {self.target}; {sizes}"

    def to_dict(self) -> dict[str, object]:
        """The result as JSON."""
        entry = self.target.manifest_entry
        return {
            "folder": str(self.folder),
            "experts": entry["format"],
            "group": entry["group"],
            "group_size": entry["group"],
            "layout": PANEL_LAYOUT if self.target.packed else PLAIN_LAYOUT,
            "packed": self.target.packed,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "files": self.files,
            "found": self.files_resumed,
            "files_resumed": self.files_resumed,
            **self.target.dense_entry,
        }


def convert(
    name: str | Path,
    out: Path,
    target: ConversionTarget,
    on_progress: ProgressCallback | None = None,
    on_note: Callable[[str], None] = warnings.warn,
) -> ConversionResult:
    """Write the model ``name`` into the folder ``out``, with its experts in the ``target`` format.

    Needs little memory: one shard's header, or a few experts in fp32 to pack them. ``on_progress``
    gets (bytes read, total bytes), and ``on_note`` a line about a damaged journal. Raises
    CheckpointError if the model cannot be converted, the folder is in use, or the disk is full.
    """
    model = ModelFolder.open(find_folder(name))
    _check_source(model, target)
    files = list(_output_files(model, target))
    fingerprint = _fingerprint(model)
    layout = target.packed and LAYOUT_VERSION
    identity = {"source": fingerprint, "experts": str(target), "layout": layout}
    with ConversionJournal.open(out, identity, on_note) as journal:
        # Partial files of a killed run would count as used disk space.
        for file in files:
            remove_partial(out / file.name)
        _check_disk_space(out, files, journal.finished)
        files_resumed = len(journal.finished)
        _write(out, files, journal, on_progress)
        origin = {"name": str(name), "fingerprint": fingerprint, "bytes": model.checkpoint.bytes}
        _write_metadata(model.config, out, target, {"source": origin}, journal.finished)
        journal.remove()
    bytes_after = sum(map(total_bytes, files))
    return ConversionResult(
        out, target, model.checkpoint.bytes, bytes_after, len(files), files_resumed
    )


def _can_pack(expert_format: QuantFormat | None) -> bool:
    return expert_format is None or FORMATS[expert_format.name] == expert_format


def _check_source(model: ModelFolder, target: ConversionTarget) -> None:
    """bf16 experts can be converted to any target; quantized ones can only be packed."""
    spec = model.spec
    only_packs = target.packed and not spec.panels and spec.expert_format == target.expert_format
    if (spec.expert_format is not None or spec.panels) and not only_packs:
        raise CheckpointError(
            f"{model.path}: its experts are {spec.expert_storage} already; "
            f"{target} can only be made from the original model"
        )


def _output_files(model: ModelFolder, target: ConversionTarget) -> Iterator[OutputFile]:
    """One file per source file, or packed, one per MoE layer besides those without its experts."""
    source_files, converted_spec = model.checkpoint.files, target.converted_spec(model.spec)
    formats = {
        name: form
        for name, each in model.targets.items()
        if (form := quant_format(converted_spec, each.weight)) is not None
        and quant_format(model.spec, each.weight) is None
    }
    if not target.packed:
        for file, entries in source_files.items():
            yield ConvertedShard.for_source(file, entries, model.targets, formats)
        return
    experts: dict[int, list[tuple[Path, TensorEntry, TensorTarget]]] = {
        layer: [] for layer in model.spec.moe_layers
    }
    for file, entries in source_files.items():
        other_entries = {}
        for name, entry in entries.items():
            if is_expert(expert_target := model.targets[name]):
                experts[layer_of(expert_target)].append((file, entry, expert_target))
            else:
                other_entries[name] = entry
        if other_entries:
            yield ConvertedShard.for_source(file, other_entries, model.targets, formats)
    for layer, sources in experts.items():
        yield PackedLayer(packed_name(layer), layer, converted_spec, sources)


def _fingerprint(model: ModelFolder) -> str:
    """Identifies the source of a conversion: its config, and a sample of every tensor."""
    digest = hashlib.sha256(read_file(model.config.file, SMALL_FILE))
    for file, entries in model.checkpoint.files.items():
        with opened(file) as descriptor:
            for entry in entries.values():
                digest.update(f"{file.name} {entry.name} {entry.dtype} {entry.shape}".encode())
                digest.update(sample_bytes(descriptor, entry))
    return digest.hexdigest()


def _check_disk_space(
    out: Path, files: Sequence[OutputFile], finished: Mapping[str, Checksums]
) -> None:
    needed_bytes = sum(total_bytes(file) for file in files if file.name not in finished)
    free_bytes = shutil.disk_usage(out).free
    if needed_bytes > free_bytes:
        raise CheckpointError(
            f"{out}: needs {needed_bytes:,} bytes on the disk, {free_bytes:,} are free"
        )


def _write(
    out: Path,
    files: Sequence[OutputFile],
    journal: ConversionJournal,
    on_progress: ProgressCallback | None,
) -> None:
    on_bytes = running_total(sum(file.source_bytes for file in files), on_progress)
    with OpenFiles() as sources:
        for file in files:
            path = out / file.name
            is_finished = file.name in journal.finished and path.is_file()
            if is_finished and path.stat().st_size == total_bytes(file):
                on_bytes(file.source_bytes)
                continue
            with atomic_writer(path, RESUMABLE) as sink:
                sink.write(header(file))
                checksums = file.write(sink, sources, on_bytes)
            journal.add(file.name, checksums)


def _write_metadata(
    config: ModelConfig,
    out: Path,
    target: ConversionTarget,
    provenance: Mapping[str, object],
    finished: Mapping[str, Checksums],
) -> None:
    """Write the small files, ``config.json`` last: a folder with one is complete."""
    for name in MODEL_FILES:
        source = config.file.with_name(name)
        if name not in (CONFIG_FILE, INDEX_FILE, MANIFEST) and source.is_file():
            atomic_write(out / name, read_file(source, FILE_LIMIT))
    file_of_tensor = {tensor: file for file, checksums in finished.items() for tensor in checksums}
    size = sum((out / file).stat().st_size for file in finished)
    index = {"metadata": {"total_size": size}, "weight_map": file_of_tensor}
    atomic_write_json(out / INDEX_FILE, index)
    layout: dict[str, object] = {}
    if target.packed:
        layout = {EXPERT_LAYOUT_KEY: {"name": PANEL_LAYOUT, "version": LAYOUT_VERSION}}
    manifest = {
        "experts": target.manifest_entry,
        **target.dense_entry,
        **layout,
        **provenance,
        "bytes": size,
        "tensors": {
            tensor: {"file": file, **finished[file][tensor]}
            for tensor, file in file_of_tensor.items()
        },
    }
    atomic_write_json(out / MANIFEST, manifest)
    form = {} if target.expert_format is None else {EXPERT_FORMAT_KEY: target.manifest_entry}
    atomic_write_json(out / CONFIG_FILE, {**config.values, **form, **target.dense_entry, **layout})
