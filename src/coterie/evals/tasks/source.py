"""Where a benchmark's rows come from: a file, a folder laid out as published, or the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path

from huggingface_hub import hf_hub_download

from coterie.naming import CoterieError

FOLDER = "COTERIE_DATA"  # the environment variable that names the usual folder

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
KINDS: dict[type, str] = {str: "text", int: "a whole number", list: "a list of texts"}

Row = Mapping[str, object]


@dataclass(frozen=True)
class Published:
    """One file of a benchmark: where it lies below a data folder, where on the hub, what is in it.

    ``keys`` are what every row must hold, as text, a whole number or a list of texts; ``unique``
    is the key that names a row, where one does. Several files of the hub are read as one.
    """

    path: str
    repository: str
    files: tuple[str, ...]
    keys: Mapping[str, type]
    unique: str | None = None

    @property
    def form(self) -> str:
        """For errors: what a row should be."""
        said = ", ".join(f"{key!r} ({KINDS[kind]})" for key, kind in self.keys.items())
        return f"objects with {said}"


@dataclass(frozen=True)
class Source:
    """What was read: its name for people, the sha256 of the files' bytes, the rows in order.

    ``beside`` is the folder that the file lay in; None: it came from the hub.
    """

    name: str
    sha256: str
    rows: tuple[Row, ...]
    beside: Path | None = None

    def settings(self) -> dict[str, object]:
        """For the record: the same bytes under another path are the same source."""
        return {"data": self.name, "sha256": self.sha256, "rows": len(self.rows)}


def read(published: Published, data: Path | None) -> Source:
    """Its rows, from ``data`` (a file, the benchmark's folder, or the one above), else from the
    folder that $COTERIE_DATA names, else from the hub.

    Raises CoterieError naming file, line and what was expected.
    """
    place = data or _usual_folder()
    if place is None:
        return _from_hub(published)
    path = _below(place.expanduser(), published)
    return _source(path.name, [path], published, beside=path.parent)


def texts(row: Row, key: str) -> list[str]:
    """A list of texts, whose form has been checked."""
    value = row[key]
    return [str(part) for part in value] if isinstance(value, list) else []


def _usual_folder() -> Path | None:
    named = os.environ.get(FOLDER)
    return Path(named) if named else None


def _below(place: Path, published: Published) -> Path:
    if not place.is_dir():
        if place.exists():
            return place
        raise CoterieError(f"{place}: no such file or folder; it should hold {published.path}")
    wanted = Path(published.path)
    for candidate in (place / wanted, place / wanted.name):
        if candidate.is_file():
            return candidate
    raise CoterieError(f"{place}: neither {wanted} nor {wanted.name} is in this folder")


def _from_hub(published: Published) -> Source:
    paths = [_downloaded(published, file) for file in published.files]
    return _source(published.repository, paths, published, beside=None)


def _downloaded(published: Published, file: str) -> Path:
    try:
        return Path(hf_hub_download(published.repository, file, repo_type="dataset"))
    # The hub's library raises its own, the network library's and the system's errors.
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split()).split(". ")[0][:120]
        raise CoterieError(
            f"the hub did not deliver {file} of {published.repository} "
            f"({type(error).__name__}: {reason}); give the data with --data, or a folder "
            f"that holds {published.path} in ${FOLDER}"
        ) from None


def _source(
    name: str, paths: Sequence[Path], published: Published, *, beside: Path | None
) -> Source:
    digest = hashlib.sha256()
    rows: list[Row] = []
    for path in paths:
        content = path.read_bytes()
        digest.update(content)
        rows.extend(_checked(published, path, content))
    if published.unique is not None:
        _check_unique(rows, published.unique, paths[0])
    return Source(name, digest.hexdigest(), tuple(rows), beside)


def _checked(published: Published, path: Path, content: bytes) -> Iterator[Row]:
    """Every row, or a CoterieError that names the first that is not as published."""
    empty = True
    for place, row in _rows(path, content, published):
        fault = _fault(row, published.keys)
        if fault is not None:
            raise CoterieError(f"{path}, {place}: {fault}; expected {published.form}")
        assert isinstance(row, dict)
        empty = False
        yield row
    if empty:
        raise CoterieError(f"{path}: holds nothing; expected {published.form}")


def _fault(row: object, keys: Mapping[str, type]) -> str | None:
    if not isinstance(row, dict):
        return f"not an object but {type(row).__name__}"
    for key, kind in keys.items():
        if key not in row:
            return f"{key!r} is missing"
        value = row[key]
        listed = isinstance(value, list) and all(isinstance(part, str) for part in value)
        if isinstance(value, bool) or not (listed if kind is list else isinstance(value, kind)):
            return f"{key!r} is not {KINDS[kind]}"
    return None


def _rows(path: Path, content: bytes, published: Published) -> Iterator[tuple[str, object]]:
    """(where, row) for every row of a JSONL, JSON or Parquet file, gzipped or not."""
    if content.startswith(GZIP):
        content = _unzipped(path, content)
    if content.startswith(PARQUET):
        yield from _parquet_rows(path, content)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CoterieError(f"{path}, line {line}: not UTF-8; expected {published.form}") from None
    listed = text.lstrip().startswith("[")
    yield from (_json_rows if listed else _json_lines)(path, text, published)


def _unzipped(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise CoterieError(f"{path}: broken or cut off gzip ({error})") from None


def _json_lines(path: Path, text: str, published: Published) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CoterieError(
                    f"{path}, line {number}: not JSON, or cut off ({error}); "
                    f"expected one a line: {published.form}"
                ) from None


def _json_rows(path: Path, text: str, published: Published) -> Iterator[tuple[str, object]]:
    try:
        for number, row in enumerate(json.loads(text), start=1):
            yield f"item {number}", row
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise CoterieError(
            f"{path}, line {line}: not JSON, or cut off ({error}); "
            f"expected a list of {published.form}"
        ) from None


def _parquet_rows(path: Path, content: bytes) -> Iterator[tuple[str, object]]:
    """As most benchmarks lie on the hub; the library comes with lm-eval."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise CoterieError(
            f"{path}: Parquet, which needs pyarrow: pip install 'coterie[harness]', "
            "or give the data as JSONL with --data"
        ) from None
    try:
        rows = parquet.read_table(BytesIO(content)).to_pylist()
    # pyarrow has a tree of errors of its own.
    except Exception as error:
        raise CoterieError(f"{path}: broken or cut off Parquet ({error})") from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _check_unique(rows: Sequence[Row], key: str, path: Path) -> None:
    seen: set[object] = set()
    for row in rows:
        if row[key] in seen:
            raise CoterieError(f"{path}: two rows with {key!r} {row[key]!r}")
        seen.add(row[key])
