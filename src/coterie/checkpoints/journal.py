"""The journal of a conversion, from which it can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.checkpoints.manifest import MANIFEST, Checksums
from coterie.errors import CheckpointError
from coterie.files import LockedFile
from coterie.strict_json import parse_object

JOURNAL = "quantising.jsonl"


@dataclass(frozen=True)
class ConversionJournal:
    """The finished files of an output folder, one JSON line each. It is locked while open."""

    file: LockedFile
    finished: dict[str, Checksums]  # by file; ``add`` extends it

    @staticmethod
    def open(
        out: Path, identity: Mapping[str, object], on_note: Callable[[str], None]
    ) -> ConversionJournal:
        """Start a journal in ``out``, or resume one with the same source and format.

        ``on_note`` gets a line about damage. Raises CheckpointError if the folder is in use, or
        holds anything else.
        """
        _check_output_folder(out)
        journal = ConversionJournal(LockedFile(out / JOURNAL, CheckpointError), {})
        try:
            journal._resume(identity, on_note)
        except BaseException:
            journal.file.close()
            raise
        return journal

    def add(self, file: str, checksums: Checksums) -> None:
        """Record a finished file. The record is on disk when this returns."""
        self._append({"file": file, "tensors": checksums})
        self.finished[file] = checksums

    def remove(self) -> None:
        """Delete the journal: the folder is complete."""
        self.file.path.unlink()

    def __enter__(self) -> ConversionJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _append(self, record: Mapping[str, object]) -> None:
        self.file.append(json.dumps(record).encode() + b"\n", sync=True)

    def _resume(self, identity: Mapping[str, object], on_note: Callable[[str], None]) -> None:
        path, valid_bytes = self.file.path, 0
        for number, line in enumerate(self.file.read().splitlines(keepends=True), start=1):
            record = _parse_record(line)
            if record is None or (number > 1 and "file" not in record):
                if line.endswith(b"\n") or b"\0" in line:  # else a stop cut it off
                    on_note(f"{path}: line {number} is damaged: redone from there on")
                break
            if number > 1:
                self.finished[str(record["file"])] = record["tensors"]  # type: ignore[assignment]
            elif record != identity:
                raise CheckpointError(
                    f"{path.parent}: holds the unfinished conversion of another model "
                    f"({record.get('experts')}, source {str(record.get('source'))[:12]}); "
                    "name another folder, or remove this one"
                )
            valid_bytes += len(line)
        self.file.truncate(valid_bytes)
        if not valid_bytes:
            self._append(identity)


def _parse_record(line: bytes) -> dict[str, object] | None:
    """The record of a whole line, or None: a crash may leave part of a line, or zeros."""
    try:
        record = parse_object(line, "a record") if line.endswith(b"\n") else {}
    except CheckpointError:
        return None
    is_file = isinstance(record.get("file"), str) and isinstance(record.get("tensors"), dict)
    return record if is_file or "source" in record else None


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
