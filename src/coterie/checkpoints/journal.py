"""Output that survives a crash: files written atomically, and a journal of the finished ones."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

from coterie.checkpoints.manifest import MANIFEST, Checksums
from coterie.errors import CheckpointError

JOURNAL = "quantising.jsonl"


@dataclass(frozen=True)
class ConversionJournal:
    """The finished files of an output folder, one JSON line each. It is locked while open."""

    file: Path
    descriptor: int
    finished: dict[str, Checksums]  # by file; ``add`` extends it

    @staticmethod
    def open(out: Path, identity: Mapping[str, object]) -> ConversionJournal:
        """Start a journal in ``out``, or resume one with the same source and format.

        Raises CheckpointError if the folder is in use, or holds anything else.
        """
        _check_output_folder(out)
        file = out / JOURNAL
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            journal = ConversionJournal(file, descriptor, {})
            journal._resume(identity)
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    def add(self, file: str, checksums: Checksums) -> None:
        """Record a finished file. The record is on disk when this returns."""
        self._write({"file": file, "tensors": checksums})
        self.finished[file] = checksums

    def remove(self) -> None:
        """Delete the journal: the folder is complete."""
        self.file.unlink()

    def __enter__(self) -> ConversionJournal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def _write(self, record: Mapping[str, object]) -> None:
        unwritten = json.dumps(record).encode() + b"\n"
        while unwritten:
            unwritten = unwritten[os.write(self.descriptor, unwritten) :]
        os.fsync(self.descriptor)

    def _resume(self, identity: Mapping[str, object]) -> None:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{self.file.parent}: another process is writing it") from None
        complete, _, truncated = self.file.read_bytes().rpartition(b"\n")
        os.ftruncate(self.descriptor, os.fstat(self.descriptor).st_size - len(truncated))
        os.lseek(self.descriptor, 0, os.SEEK_END)
        records = [json.loads(record) for record in complete.splitlines()]
        if not records:
            self._write(identity)
        elif records[0] != identity:
            raise CheckpointError(
                f"{self.file.parent}: holds the unfinished conversion of another model "
                f"({records[0].get('experts')}, source {str(records[0].get('source'))[:12]}); "
                "name another folder, or remove this one"
            )
        self.finished.update({record["file"]: record["tensors"] for record in records[1:]})


@contextmanager
def atomic_writer(path: Path) -> Iterator[BufferedWriter]:
    """A file that appears under its name once it is complete and on disk, or not at all."""
    part = _partial_path(path)
    try:
        with part.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}); "
            "finished files are kept, and the same command resumes"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes) -> None:
    with atomic_writer(path) as sink:
        sink.write(content)


def atomic_write_json(path: Path, content: Mapping[str, object]) -> None:
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def remove_partial(path: Path) -> None:
    """Remove the partial file that a killed process left."""
    _partial_path(path).unlink(missing_ok=True)


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _check_output_folder(out: Path) -> None:
    """Create the folder. An existing one must be empty, or hold a journal."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: not a folder; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    if (out / JOURNAL).exists() or not any(out.iterdir()):
        return
    if (out / MANIFEST).exists():
        raise CheckpointError(f"{out}: holds a finished model already; name another folder")
    raise CheckpointError(f"{out}: is not empty; name a new folder")
