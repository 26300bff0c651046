"""What is finished of a folder in the making, so that what was killed goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import CoterieError

JOURNAL, MANIFEST = "quantising.jsonl", "manifest.json"

Checksums = dict[str, dict[str, object]]
"""By tensor: its sha256, or a crc32 for each expert in it."""


@dataclass(frozen=True)
class ConversionJournal:
    """The finished files of a folder, one JSON line each; locked while open."""

    file: Path
    descriptor: int
    finished: dict[str, Checksums]  # grows: by file

    @staticmethod
    def open(out: Path, identity: Mapping[str, object]) -> ConversionJournal:
        """Begins, or goes on with what the same source and format began here."""
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
        """On the disk when this returns."""
        self._write({"file": file, "tensors": checksums})
        self.finished[file] = checksums

    def remove(self) -> None:
        """The folder is whole; there is nothing to go on with."""
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
            raise CoterieError(f"{self.file.parent}: another process is writing it") from None
        complete, _, truncated = self.file.read_bytes().rpartition(b"\n")
        os.ftruncate(self.descriptor, os.fstat(self.descriptor).st_size - len(truncated))
        os.lseek(self.descriptor, 0, os.SEEK_END)
        records = [json.loads(record) for record in complete.splitlines()]
        if not records:
            self._write(identity)
        elif records[0] != identity:
            raise CoterieError(
                f"{self.file.parent}: holds the beginning of another model "
                f"({records[0].get('experts')}, of a source {str(records[0].get('source'))[:12]}..); "
                "name another folder, or remove this one"
            )
        self.finished.update({record["file"]: record["tensors"] for record in records[1:]})


def _check_output_folder(out: Path) -> None:
    """The folder is there then, and empty but for what an earlier run left."""
    if out.exists() and not out.is_dir():
        raise CoterieError(f"{out}: not a folder; name one that is new")
    out.mkdir(parents=True, exist_ok=True)
    if (out / JOURNAL).exists() or not any(out.iterdir()):
        return
    if (out / MANIFEST).exists():
        raise CoterieError(f"{out}: holds a finished model already; name another folder")
    raise CoterieError(f"{out}: is not empty; name a folder that is new")
