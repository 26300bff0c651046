"""A checkpoint with its experts in few bits, made of one with whole weights, shard by shard.

What is killed goes on where it stopped: a journal names every shard that is finished, and nothing
has its own name before it is whole. The journal goes last, ``config.json`` before it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from coterie.engine.source import ALL_PARTS, find_folder
from coterie.families import Config, recognise
from coterie.families.names import is_expert, is_stacked, quantised, weight_map
from coterie.families.reading import EXPERT_FORMAT
from coterie.model.checkpoint import INDEX, Checkpoint
from coterie.model.shard import DTYPES, Entry, bytes_of, rows_of
from coterie.model.weights import Place
from coterie.naming import CoterieError
from coterie.quant import Format, quantise

JOURNAL, MANIFEST, CONFIG = "quantising.jsonl", "manifest.json", "config.json"
WINDOW = 64  # bytes of each tensor that the source's fingerprint covers
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Told = Callable[[int, int], None]
Digests = dict[str, str]


@dataclass(frozen=True)
class Converted:
    """What came of it."""

    folder: Path
    form: Format
    bytes_before: int
    bytes_after: int
    files: int
    found: int  # files that an earlier run had finished


@dataclass(frozen=True)
class Shard:
    """One file of the source and what becomes of it: per tensor its parts, one or two."""

    source: Path
    entries: Mapping[str, Entry]
    held: Mapping[str, Mapping[str, tuple[tuple[int, ...], torch.dtype]]]

    @property
    def header(self) -> bytes:
        """As safetensors begins: a length, then JSON, filled up to eight bytes."""
        listed: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in self.parts():
            start, end = end, end + prod(shape) * dtype.itemsize
            listed[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(listed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def bytes(self) -> int:
        """Of the file to be written."""
        weights = sum(prod(shape) * dtype.itemsize for _, (shape, dtype) in self.parts())
        return len(self.header) + weights

    @property
    def bytes_before(self) -> int:
        return sum(entry.size for entry in self.entries.values())

    def parts(self) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
        for parts in self.held.values():
            yield from parts.items()


def convert(name: str | Path, out: Path, form: Format, told: Told | None = None) -> Converted:
    """Write the model ``name`` with its experts in ``form`` into the folder ``out``.

    Needs a few megabytes beside one shard's header. ``told`` hears (bytes read, bytes in all).
    Raises CoterieError for what cannot be converted, a folder in use, and a full disk.
    """
    folder = find_folder(name)
    config = Config.of(folder / CONFIG)
    family = recognise(config)
    spec = family.read(config)
    if spec.expert_format is not None:
        raise CoterieError(f"{folder}: its experts are {spec.expert_format} already")
    checkpoint = Checkpoint.of(folder)
    places = weight_map(family.names, spec, stacked=is_stacked(checkpoint.tensors))
    checkpoint.check(places)
    shards = [_shard(file, entries, places, form) for file, entries in checkpoint.files.items()]
    fingerprint = _fingerprint(config, checkpoint)
    with Journal.open(out, _identity(fingerprint, form)) as journal:
        _check_room(out, shards, journal.finished)
        found = len(journal.finished)
        _write_shards(out, shards, form, journal, told)
        origin = {"name": str(name), "fingerprint": fingerprint, "bytes": checkpoint.bytes}
        _write_around(
            folder, out, config, form, facts={"source": origin}, finished=journal.finished
        )
        journal.close()
    after = sum(shard.bytes for shard in shards)
    return Converted(out, form, checkpoint.bytes, after, len(shards), found)


@dataclass(frozen=True)
class Journal:
    """The finished shards of a folder in the making, one JSON line each; locked while open."""

    file: Path
    descriptor: int
    finished: dict[str, Digests]  # grows: file -> sha256 of each tensor in it

    @staticmethod
    def open(out: Path, identity: dict[str, object]) -> Journal:
        """Begins, or goes on with what the same source and format began here."""
        _check_place(out)
        file = out / JOURNAL
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            journal = Journal(file, descriptor, {})
            journal._resume(identity)
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    def add(self, line: dict[str, object]) -> None:
        """One line, on the disk when this returns."""
        left = json.dumps(line).encode() + b"\n"
        while left:
            left = left[os.write(self.descriptor, left) :]
        os.fsync(self.descriptor)

    def close(self) -> None:
        """The folder is whole; there is nothing to go on with."""
        self.file.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def _resume(self, identity: dict[str, object]) -> None:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CoterieError(f"{self.file.parent}: another process is writing it") from None
        whole, _, torn = self.file.read_bytes().rpartition(b"\n")
        os.ftruncate(self.descriptor, os.fstat(self.descriptor).st_size - len(torn))
        os.lseek(self.descriptor, 0, os.SEEK_END)
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            self.add(identity)
        elif lines[0] != identity:
            begun = f"{lines[0].get('experts')} in groups of {lines[0].get('group')}"
            raise CoterieError(
                f"{self.file.parent}: holds the beginning of another model ({begun}, of a source "
                f"{lines[0].get('source')}); name another folder, or remove this one"
            )
        self.finished.update({line["file"]: line["tensors"] for line in lines[1:]})


def _check_place(out: Path) -> None:
    """The folder is there then, and empty but for what an earlier run left."""
    if out.exists() and not out.is_dir():
        raise CoterieError(f"{out}: not a folder; name one that is new")
    out.mkdir(parents=True, exist_ok=True)
    if (out / JOURNAL).exists() or not any(out.iterdir()):
        return
    if (out / MANIFEST).exists():
        raise CoterieError(f"{out}: holds a finished model already; name another folder")
    raise CoterieError(f"{out}: is not empty; name a folder that is new")


def _identity(fingerprint: str, form: Format) -> dict[str, object]:
    return {"source": fingerprint, "experts": form.name, "group": form.group}


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


def _shard(
    file: Path, entries: Mapping[str, Entry], places: Mapping[str, Place], form: Format
) -> Shard:
    def parts(entry: Entry) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        place = places[entry.name]
        if not is_expert(place):
            return {entry.name: (entry.shape, entry.dtype)}
        stored = quantised(form, entry.name, place)
        return {name: (at.shape, at.dtype or entry.dtype) for name, at in stored}

    return Shard(file, entries, {name: parts(entry) for name, entry in entries.items()})


def _check_room(out: Path, shards: list[Shard], finished: Mapping[str, Digests]) -> None:
    needed = sum(shard.bytes for shard in shards if shard.source.name not in finished)
    free = shutil.disk_usage(out).free
    if needed > free:
        gib = 1 << 30
        raise CoterieError(f"{out}: needs {needed / gib:.2f} GiB, {free / gib:.2f} GiB are free")


def _write_shards(
    out: Path, shards: list[Shard], form: Format, journal: Journal, told: Told | None
) -> None:
    done, whole = 0, sum(shard.bytes_before for shard in shards)

    def heard(size: int) -> None:
        nonlocal done
        done += size
        if told is not None:
            told(done, whole)

    for shard in shards:
        to = out / shard.source.name
        if to.name in journal.finished and to.is_file() and to.stat().st_size == shard.bytes:
            heard(shard.bytes_before)
            continue
        digests: Digests = {}
        with shard.source.open("rb") as source, _rising(to) as sink:
            sink.write(shard.header)
            for entry in shard.entries.values():
                digests |= _write_tensor(sink, source.fileno(), entry, shard, form)
                heard(entry.size)
        journal.add({"file": to.name, "tensors": digests})
        journal.finished[to.name] = digests


def _write_tensor(
    sink: BufferedWriter, source: int, entry: Entry, shard: Shard, form: Format
) -> Digests:
    """One tensor as it is, or as its numbers and, after them, its scales."""
    names = tuple(shard.held[entry.name])
    sums = {name: hashlib.sha256() for name in names}
    try:
        for name, part in _parts(source, entry, names, form):
            memory = part.reshape(-1).view(torch.uint8).numpy().data
            sums[name].update(memory)
            sink.write(memory)
    except CoterieError as error:
        raise CoterieError(f"{shard.source}: {entry.name} {error}") from None
    return {name: found.hexdigest() for name, found in sums.items()}


def _parts(
    source: int, entry: Entry, names: tuple[str, ...], form: Format
) -> Iterator[tuple[str, Tensor]]:
    """What to write for a tensor, in pieces: its bytes, or all numbers and then all scales."""
    if len(names) == 1:
        yield from ((names[0], piece) for piece in bytes_of(source, entry))
        return
    numbers, scales = names
    waiting = []
    for _, rows in rows_of(source, entry):
        found = quantise(rows, form)
        waiting.append(found.scales)
        yield numbers, found.q
    yield from ((scales, piece) for piece in waiting)


def _write_around(
    folder: Path,
    out: Path,
    config: Config,
    form: Format,
    *,
    facts: Mapping[str, object],
    finished: Mapping[str, Digests],
) -> None:
    """The small files; a folder with a config is whole."""
    for name in ALL_PARTS:
        if "*" not in name and name not in (CONFIG, INDEX) and (folder / name).is_file():
            _put(out / name, (folder / name).read_bytes())
    owner = {tensor: file for file, digests in finished.items() for tensor in digests}
    size = sum((out / file).stat().st_size for file in finished)
    _put_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": owner})
    tensors = {
        tensor: {"file": file, "sha256": digest}
        for file, digests in finished.items()
        for tensor, digest in digests.items()
    }
    stated = {"format": form.name, "group": form.group}
    _put_json(out / MANIFEST, {"experts": stated, **facts, "bytes": size, "tensors": tensors})
    _put_json(out / CONFIG, {**config.values, EXPERT_FORMAT: stated})


def _put_json(path: Path, content: Mapping[str, object]) -> None:
    _put(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def _put(path: Path, content: bytes) -> None:
    with _rising(path) as sink:
        sink.write(content)


@contextmanager
def _rising(path: Path) -> Iterator[BufferedWriter]:
    """A file that gets its name when it is whole and on the disk, or leaves nothing."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CoterieError(
            f"{path}: cannot be written ({error.strerror}); "
            "what is finished stays, and the same command goes on with it"
        ) from None
    finally:
        part.unlink(missing_ok=True)
