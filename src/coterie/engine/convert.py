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

from coterie.engine.journal import MANIFEST, Journal, Sums
from coterie.engine.rising import put, put_json, rising, sweep
from coterie.engine.source import ALL_PARTS, find_folder
from coterie.engine.written import OutFile, PackedLayer, Shard, Sources
from coterie.families import Config, recognise
from coterie.families.names import is_expert, is_stacked, layer_of, packed_name, weight_map
from coterie.families.reading import EXPERT_FORMAT, EXPERT_LAYOUT, PANELS
from coterie.model.checkpoint import INDEX, Checkpoint
from coterie.model.shard import Entry
from coterie.model.spec import ModelSpec
from coterie.model.weights import Place
from coterie.naming import CoterieError
from coterie.ops.panels import LAYOUT
from coterie.quant import FORMATS, Format, parse_format

CONFIG = "config.json"
WHOLE = "bf16"
PLAIN = "plain"
LAYOUTS = (PANELS, PLAIN)
WINDOW = 64  # bytes of each tensor that the source's fingerprint covers

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Aim:
    """What becomes of the experts: few bits (None: bf16), in panels or as matrices."""

    form: Format | None
    panels: bool

    @staticmethod
    def of(experts: str, group: int | None = None, layout: str | None = None) -> Aim:
        """As typed. Panels, unless matrices are asked for or no panels hold such groups."""
        if experts == WHOLE and group is not None:
            raise CoterieError(f"--group has no effect with --experts {WHOLE}: nothing is scaled")
        if experts not in (WHOLE, *FORMATS):
            known = ", ".join((*FORMATS, WHOLE))
            raise CoterieError(f"unknown format {experts!r} for experts; known: {known}")
        if layout not in (None, *LAYOUTS):
            raise CoterieError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
        form = None if experts == WHOLE else parse_format(experts, group)
        fits = form is None or FORMATS[form.name] == form
        return Aim(form, panels=fits if layout is None else layout == PANELS)

    def __post_init__(self) -> None:
        if self.form is None and not self.panels:
            raise CoterieError(
                f"--layout {PLAIN} leaves nothing to do for {WHOLE} experts; "
                f"--layout {PANELS} packs them"
            )
        if self.panels and self.form is not None and FORMATS[self.form.name] != self.form:
            held = " and ".join(map(str, FORMATS.values()))
            raise CoterieError(f"panels hold {held}, not {self.form}; --layout plain keeps any")

    def __str__(self) -> str:
        return f"{self.form or WHOLE}{', packed' if self.panels else ''}"

    @property
    def stated(self) -> dict[str, object]:
        """As the manifest says it."""
        return {"format": WHOLE, "group": None} if self.form is None else self.form.document()


@dataclass(frozen=True)
class Converted:
    """What came of it."""

    folder: Path
    aim: Aim
    bytes_before: int
    bytes_after: int
    files: int
    found: int  # files that an earlier run had finished


def convert(name: str | Path, out: Path, aim: Aim, told: Told | None = None) -> Converted:
    """Write the model ``name`` with its experts as the ``aim`` has them into the folder ``out``.

    Needs a few megabytes beside one shard's header and, to pack, a few experts in fp32. ``told``
    hears (bytes read, bytes in all). Raises CoterieError for what cannot be converted, a folder in
    use, and a full disk.
    """
    folder = find_folder(name)
    config = Config.of(folder / CONFIG)
    family = recognise(config)
    spec = family.read(config)
    _check_source(folder, spec, aim)
    checkpoint = Checkpoint.of(folder)
    places = weight_map(family.names, spec, stacked=is_stacked(checkpoint.tensors))
    checkpoint.check(places)
    files = list(_files(checkpoint, places, spec, aim))
    fingerprint = _fingerprint(config, checkpoint)
    identity = {"source": fingerprint, "experts": str(aim), "layout": aim.panels and LAYOUT}
    with Journal.open(out, identity) as journal:
        # What a kill left would count as room that is taken.
        for file in files:
            sweep(out / file.name)
        _check_room(out, files, journal.finished)
        found = len(journal.finished)
        _write(out, files, journal, told)
        origin = {"name": str(name), "fingerprint": fingerprint, "bytes": checkpoint.bytes}
        _write_around(folder, out, config, aim, facts={"source": origin}, finished=journal.finished)
        journal.close()
    after = sum(file.bytes for file in files)
    return Converted(out, aim, checkpoint.bytes, after, len(files), found)


def _check_source(folder: Path, spec: ModelSpec, aim: Aim) -> None:
    """Whole experts become anything; quantised ones can be packed as they are, and no more."""
    same = aim.panels and not spec.panels and spec.expert_format == aim.form
    if (spec.expert_format is not None or spec.panels) and not same:
        raise CoterieError(
            f"{folder}: its experts are {spec.experts_as} already; "
            f"{aim} can be made of the original only"
        )


def _files(
    checkpoint: Checkpoint, places: Mapping[str, Place], spec: ModelSpec, aim: Aim
) -> Iterator[OutFile]:
    """One for each file of the source; in panels, of the experts one for each layer."""
    if not aim.panels:
        for file, entries in checkpoint.files.items():
            yield Shard.of(file, entries, places, aim.form)
        return
    experts: dict[int, list[tuple[Path, Entry, Place]]] = {layer: [] for layer in spec.moe_layers}
    for file, entries in checkpoint.files.items():
        others = {}
        for name, entry in entries.items():
            if is_expert(places[name]):
                experts[layer_of(places[name])].append((file, entry, places[name]))
            else:
                others[name] = entry
        if others:
            yield Shard.of(file, others, places, None)
    kept = replace(spec, expert_format=aim.form, panels=True)
    for layer, sources in experts.items():
        yield PackedLayer(packed_name(layer), layer, kept, sources)


def _fingerprint(config: Config, checkpoint: Checkpoint) -> str:
    """Of the config, and of every tensor its name, type, shape and the bytes in its middle."""
    digest = hashlib.sha256(config.file.read_bytes())
    for file, entries in checkpoint.files.items():
        with file.open("rb") as handle:
            for entry in entries.values():
                digest.update(f"{file.name} {entry.name} {entry.dtype} {entry.shape}".encode())
                middle = entry.start + max(0, entry.size - WINDOW) // 2
                digest.update(os.pread(handle.fileno(), min(WINDOW, entry.size), middle))
    return digest.hexdigest()


def _check_room(out: Path, files: Sequence[OutFile], finished: Mapping[str, Sums]) -> None:
    needed = sum(file.bytes for file in files if file.name not in finished)
    free = shutil.disk_usage(out).free
    if needed > free:
        gib = 1 << 30
        raise CoterieError(f"{out}: needs {needed / gib:.2f} GiB, {free / gib:.2f} GiB are free")


def _write(out: Path, files: Sequence[OutFile], journal: Journal, told: Told | None) -> None:
    done, whole = 0, sum(file.reads for file in files)

    def heard(size: int) -> None:
        nonlocal done
        done += size
        if told is not None:
            told(done, whole)

    with Sources() as sources:
        for file in files:
            to = out / file.name
            if file.name in journal.finished and to.is_file() and to.stat().st_size == file.bytes:
                heard(file.reads)
                continue
            with rising(to) as sink:
                sink.write(file.header)
                sums = file.write(sink, sources, heard)
            journal.add(file.name, sums)


def _write_around(
    folder: Path,
    out: Path,
    config: Config,
    aim: Aim,
    *,
    facts: Mapping[str, object],
    finished: Mapping[str, Sums],
) -> None:
    """The small files; a folder with a config is whole."""
    for name in ALL_PARTS:
        if "*" not in name and name not in (CONFIG, INDEX, MANIFEST) and (folder / name).is_file():
            put(out / name, (folder / name).read_bytes())
    owner = {tensor: file for file, sums in finished.items() for tensor in sums}
    size = sum((out / file).stat().st_size for file in finished)
    put_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": owner})
    tensors = {
        tensor: {"file": file, **sum_}
        for file, sums in finished.items()
        for tensor, sum_ in sums.items()
    }
    layout = {EXPERT_LAYOUT: {"name": PANELS, "version": LAYOUT}} if aim.panels else {}
    content = {"experts": aim.stated, **layout, **facts, "bytes": size, "tensors": tensors}
    put_json(out / MANIFEST, content)
    form = {} if aim.form is None else {EXPERT_FORMAT: aim.stated}
    put_json(out / CONFIG, {**config.values, **form, **layout})
