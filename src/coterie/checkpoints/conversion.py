"""A checkpoint with its experts in few bits, or packed, or both, made of a published one.

What is killed goes on where it stopped: a journal names every file that is finished, and nothing
has its own name before it is whole. The journal goes last, ``config.json`` before it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coterie.checkpoints.atomic_write import (
    atomic_write,
    atomic_write_json,
    atomic_writer,
    remove_partial,
)
from coterie.checkpoints.manifest import MANIFEST, Checksums, ConversionJournal
from coterie.checkpoints.output_files import ConvertedShard, OutputFile, PackedLayer, SourceFiles
from coterie.checkpoints.source import MODEL_FILES, find_folder
from coterie.errors import CoterieError
from coterie.families import ModelConfig, detect_family
from coterie.families.common import EXPERT_FORMAT_KEY, EXPERT_LAYOUT_KEY, PANEL_LAYOUT
from coterie.families.names import is_expert, is_stacked, layer_of, packed_name, weight_map
from coterie.model.checkpoint import INDEX_FILE, Checkpoint
from coterie.model.safetensors_file import TensorEntry
from coterie.model.spec import ModelSpec
from coterie.model.weights import TensorTarget
from coterie.ops.packed_layout import LAYOUT_VERSION
from coterie.quantization import FORMATS, QuantFormat, parse_format

CONFIG_FILE = "config.json"
BF16 = "bf16"
PLAIN_LAYOUT = "plain"
LAYOUTS = (PANEL_LAYOUT, PLAIN_LAYOUT)
FINGERPRINT_BYTES = 64  # bytes of each tensor that the source's fingerprint covers

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class ConversionTarget:
    """What becomes of the experts: few bits (None: bf16), in panels or as matrices."""

    expert_format: QuantFormat | None
    packed: bool

    @staticmethod
    def parse(
        experts: str, group_size: int | None = None, layout: str | None = None
    ) -> ConversionTarget:
        """As typed. Panels, unless matrices are asked for or no panels hold such groups."""
        if experts == BF16 and group_size is not None:
            raise CoterieError(f"--group has no effect with --experts {BF16}: nothing is scaled")
        if experts not in (BF16, *FORMATS):
            known = ", ".join((*FORMATS, BF16))
            raise CoterieError(f"unknown format {experts!r} for experts; known: {known}")
        if layout not in (None, *LAYOUTS):
            raise CoterieError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
        expert_format = None if experts == BF16 else parse_format(experts, group_size)
        can_pack = expert_format is None or FORMATS[expert_format.name] == expert_format
        return ConversionTarget(
            expert_format, packed=can_pack if layout is None else layout == PANEL_LAYOUT
        )

    def __post_init__(self) -> None:
        if self.expert_format is None and not self.packed:
            raise CoterieError(
                f"--layout {PLAIN_LAYOUT} leaves nothing to do for {BF16} experts; "
                f"--layout {PANEL_LAYOUT} packs them"
            )
        if (
            self.packed
            and self.expert_format is not None
            and FORMATS[self.expert_format.name] != self.expert_format
        ):
            supported = " and ".join(map(str, FORMATS.values()))
            raise CoterieError(
                f"panels hold {supported}, not {self.expert_format}; --layout plain keeps any"
            )

    def __str__(self) -> str:
        return f"{self.expert_format or BF16}{', packed' if self.packed else ''}"

    @property
    def manifest_entry(self) -> dict[str, object]:
        """As the manifest says it."""
        return (
            {"format": BF16, "group": None}
            if self.expert_format is None
            else self.expert_format.to_dict()
        )


@dataclass(frozen=True)
class ConversionResult:
    """What came of it."""

    folder: Path
    target: ConversionTarget
    bytes_before: int
    bytes_after: int
    files: int
    files_resumed: int  # files that an earlier run had finished

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
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
        }


def convert(
    name: str | Path,
    out: Path,
    target: ConversionTarget,
    on_progress: ProgressCallback | None = None,
) -> ConversionResult:
    """Write the model ``name`` with its experts as the ``aim`` has them into the folder ``out``.

    Needs a few megabytes beside one shard's header and, to pack, a few experts in fp32. ``told``
    hears (bytes read, bytes in all). Raises CoterieError for what cannot be converted, a folder in
    use, and a full disk.
    """
    folder = find_folder(name)
    config = ModelConfig.of(folder / CONFIG_FILE)
    family = detect_family(config)
    spec = family.read_spec(config)
    _check_source(folder, spec, target)
    checkpoint = Checkpoint.of(folder)
    tensor_targets = weight_map(family.tensor_names, spec, stacked=is_stacked(checkpoint.tensors))
    checkpoint.check(tensor_targets)
    files = list(_output_files(checkpoint, tensor_targets, spec, target))
    fingerprint = _fingerprint(config, checkpoint)
    identity = {
        "source": fingerprint,
        "experts": str(target),
        "layout": target.packed and LAYOUT_VERSION,
    }
    with ConversionJournal.open(out, identity) as journal:
        # What a kill left would count as room that is taken.
        for file in files:
            remove_partial(out / file.name)
        _check_disk_space(out, files, journal.finished)
        files_resumed = len(journal.finished)
        _write(out, files, journal, on_progress)
        origin = {"name": str(name), "fingerprint": fingerprint, "bytes": checkpoint.bytes}
        _write_metadata(
            folder, out, config, target, provenance={"source": origin}, finished=journal.finished
        )
        journal.remove()
    bytes_after = sum(file.total_bytes for file in files)
    return ConversionResult(out, target, checkpoint.bytes, bytes_after, len(files), files_resumed)


def _check_source(folder: Path, spec: ModelSpec, target: ConversionTarget) -> None:
    """Whole experts become anything; quantised ones can be packed as they are, and no more."""
    only_packs = target.packed and not spec.panels and spec.expert_format == target.expert_format
    if (spec.expert_format is not None or spec.panels) and not only_packs:
        raise CoterieError(
            f"{folder}: its experts are {spec.expert_storage} already; "
            f"{target} can be made of the original only"
        )


def _output_files(
    checkpoint: Checkpoint,
    tensor_targets: Mapping[str, TensorTarget],
    spec: ModelSpec,
    target: ConversionTarget,
) -> Iterator[OutputFile]:
    """One for each file of the source; in panels, of the experts one for each layer."""
    if not target.packed:
        for file, entries in checkpoint.files.items():
            yield ConvertedShard.for_source(file, entries, tensor_targets, target.expert_format)
        return
    experts: dict[int, list[tuple[Path, TensorEntry, TensorTarget]]] = {
        layer: [] for layer in spec.moe_layers
    }
    for file, entries in checkpoint.files.items():
        other_entries = {}
        for name, entry in entries.items():
            if is_expert(tensor_targets[name]):
                experts[layer_of(tensor_targets[name])].append((file, entry, tensor_targets[name]))
            else:
                other_entries[name] = entry
        if other_entries:
            yield ConvertedShard.for_source(file, other_entries, tensor_targets, None)
    converted_spec = replace(spec, expert_format=target.expert_format, panels=True)
    for layer, sources in experts.items():
        yield PackedLayer(packed_name(layer), layer, converted_spec, sources)


def _fingerprint(config: ModelConfig, checkpoint: Checkpoint) -> str:
    """Of the config, and of every tensor its name, type, shape and the bytes in its middle."""
    digest = hashlib.sha256(config.file.read_bytes())
    for file, entries in checkpoint.files.items():
        with file.open("rb") as handle:
            for entry in entries.values():
                digest.update(f"{file.name} {entry.name} {entry.dtype} {entry.shape}".encode())
                middle = entry.start + max(0, entry.size - FINGERPRINT_BYTES) // 2
                digest.update(os.pread(handle.fileno(), min(FINGERPRINT_BYTES, entry.size), middle))
    return digest.hexdigest()


def _check_disk_space(
    out: Path, files: Sequence[OutputFile], finished: Mapping[str, Checksums]
) -> None:
    needed_bytes = sum(file.total_bytes for file in files if file.name not in finished)
    free_bytes = shutil.disk_usage(out).free
    if needed_bytes > free_bytes:
        gib = 1 << 30
        raise CoterieError(
            f"{out}: needs {needed_bytes / gib:.2f} GiB, {free_bytes / gib:.2f} GiB are free"
        )


def _write(
    out: Path,
    files: Sequence[OutputFile],
    journal: ConversionJournal,
    on_progress: ProgressCallback | None,
) -> None:
    done_bytes, total_bytes = 0, sum(file.source_bytes for file in files)

    def on_bytes(size: int) -> None:
        nonlocal done_bytes
        done_bytes += size
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)

    with SourceFiles() as sources:
        for file in files:
            path = out / file.name
            if (
                file.name in journal.finished
                and path.is_file()
                and path.stat().st_size == file.total_bytes
            ):
                on_bytes(file.source_bytes)
                continue
            with atomic_writer(path) as sink:
                sink.write(file.header)
                checksums = file.write(sink, sources, on_bytes)
            journal.add(file.name, checksums)


def _write_metadata(
    folder: Path,
    out: Path,
    config: ModelConfig,
    target: ConversionTarget,
    *,
    provenance: Mapping[str, object],
    finished: Mapping[str, Checksums],
) -> None:
    """The small files; a folder with a config is whole."""
    for name in MODEL_FILES:
        if (
            "*" not in name
            and name not in (CONFIG_FILE, INDEX_FILE, MANIFEST)
            and (folder / name).is_file()
        ):
            atomic_write(out / name, (folder / name).read_bytes())
    file_of_tensor = {tensor: file for file, checksums in finished.items() for tensor in checksums}
    total_bytes = sum((out / file).stat().st_size for file in finished)
    atomic_write_json(
        out / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": file_of_tensor}
    )
    tensors = {
        tensor: {"file": file, **checksum}
        for file, checksums in finished.items()
        for tensor, checksum in checksums.items()
    }
    layout = (
        {EXPERT_LAYOUT_KEY: {"name": PANEL_LAYOUT, "version": LAYOUT_VERSION}}
        if target.packed
        else {}
    )
    content = {
        "experts": target.manifest_entry,
        **layout,
        **provenance,
        "bytes": total_bytes,
        "tensors": tensors,
    }
    atomic_write_json(out / MANIFEST, content)
    format_entry = (
        {} if target.expert_format is None else {EXPERT_FORMAT_KEY: target.manifest_entry}
    )
    atomic_write_json(out / CONFIG_FILE, {**config.values, **format_entry, **layout})
