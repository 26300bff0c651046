"""Benchmark data: read from a file, a folder with the published layout, or the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

from coterie.errors import TaskError
from coterie.files import read_file
from coterie.strict_json import describe_json_error

DATA_ENV_VAR = "COTERIE_DATA"  # names the default data folder

GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
MAX_BYTES = 1 << 30  # of a decompressed file
TYPE_NAMES: dict[type, str] = {str: "text", int: "an integer", list: "a list of texts"}

DataRow = Mapping[str, object]


@dataclass(frozen=True)
class BenchmarkFile:
    """One file of a benchmark: its path in a data folder, its files on the hub, and its columns.

    ``keys`` are the required columns with their types; ``unique_key`` identifies a row. Several hub
    files are read as one.
    """

    path: str
    repository: str
    files: tuple[str, ...]
    keys: Mapping[str, type]
    unique_key: str | None = None

    @property
    def expected_form(self) -> str:
        """The expected form of the rows, for error messages."""
        columns = ", ".join(f"{key!r} ({TYPE_NAMES[kind]})" for key, kind in self.keys.items())
        return f"objects with {columns}"


@dataclass(frozen=True)
class BenchmarkData:
    """Rows with the sha256 of their files; ``folder`` is None for data from the hub."""

    name: str
    sha256: str
    rows: tuple[DataRow, ...]
    folder: Path | None = None

    def settings(self) -> dict[str, object]:
        """The identity of the data, for records; it does not depend on the path."""
        return {"data": self.name, "sha256": self.sha256, "rows": len(self.rows)}


def read_benchmark(benchmark: BenchmarkFile, data: Path | None) -> BenchmarkData:
    """Reads ``data`` (a file, the benchmark's folder or its parent), $COTERIE_DATA or the hub.

    Raises TaskError with the file, the line and the expected form.
    """
    location = data or os.environ.get(DATA_ENV_VAR)
    if not location:
        paths = [_download(benchmark, file) for file in benchmark.files]
        return _read_files(benchmark.repository, paths, benchmark, folder=None)
    path = _find_below(Path(location).expanduser(), benchmark)
    return _read_files(path.name, [path], benchmark, folder=path.parent)


def text_list(row: DataRow, key: str) -> list[str]:
    """A checked column that is a list of texts."""
    value = row[key]
    return [str(part) for part in value] if isinstance(value, list) else []


def decode_text(content: bytes, source: str, expected: str) -> str:
    """UTF-8 text without a byte order mark; raises TaskError with the line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TaskError(f"{source}, line {line}: not UTF-8; expected {expected}") from None


def json_lines(text: str, source: str, expected: str) -> Iterator[tuple[int, object]]:
    """Number and value of each line that is not blank; raises TaskError with the line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse_json(line, source, number, expected)


def _find_below(folder: Path, benchmark: BenchmarkFile) -> Path:
    if not folder.is_dir():
        if folder.exists():
            return folder
        raise TaskError(f"{folder}: no such file or folder; expected {benchmark.path} in it")
    relative = Path(benchmark.path)
    for candidate in (folder / relative, folder / relative.name):
        if candidate.is_file():
            return candidate
    raise TaskError(f"{folder}: neither {relative} nor {relative.name} is in this folder")


def _download(benchmark: BenchmarkFile, file: str) -> Path:
    from coterie.checkpoints import hub  # slow to import, and rarely needed

    try:
        with hub.hub_requests(benchmark.repository):
            return Path(hub.hf_hub_download(benchmark.repository, file, repo_type="dataset"))
    # The library raises its own errors, the network library's and the system's.
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split()).split(". ")[0][:120]
        raise TaskError(
            f"cannot download {file} of {benchmark.repository} "
            f"({type(error).__name__}: {reason}); set `data` or ${DATA_ENV_VAR} to a folder with "
            f"{benchmark.path}"
        ) from None


def _read_files(
    name: str, paths: Sequence[Path], benchmark: BenchmarkFile, *, folder: Path | None
) -> BenchmarkData:
    digest = hashlib.sha256()
    rows: list[DataRow] = []
    for path in paths:
        content = read_file(path, MAX_BYTES)
        digest.update(content)
        rows.extend(_checked_rows(benchmark, path, content))
    if benchmark.unique_key is not None:
        _check_unique(rows, benchmark.unique_key, paths[0])
    return BenchmarkData(name, digest.hexdigest(), tuple(rows), folder)


def _checked_rows(benchmark: BenchmarkFile, path: Path, content: bytes) -> Iterator[DataRow]:
    """All rows; raises TaskError for the first row that has not the expected form."""
    position = ""
    for position, row in _parse_rows(path, content, benchmark):
        if problem := _row_problem(row, benchmark.keys):
            raise TaskError(f"{path}, {position}: {problem}; expected {benchmark.expected_form}")
        assert isinstance(row, dict)
        yield row
    if not position:
        raise TaskError(f"{path}: empty; expected {benchmark.expected_form}")


def _row_problem(row: object, keys: Mapping[str, type]) -> str | None:
    if not isinstance(row, dict):
        return f"not an object but {type(row).__name__}"
    for key, kind in keys.items():
        if key not in row:
            return f"{key!r} is missing"
        value = row[key]
        parts = value if isinstance(value, list) else ()
        has_type = isinstance(value, kind) and not isinstance(value, bool)
        if not (has_type and all(isinstance(part, str) for part in parts)):
            return f"{key!r} is not {TYPE_NAMES[kind]}"
    return None


def _parse_rows(
    path: Path, content: bytes, benchmark: BenchmarkFile
) -> Iterator[tuple[str, object]]:
    """(position, row) of all rows of a JSONL, JSON or Parquet file, gzipped or not."""
    if content.startswith(GZIP_MAGIC):
        content = _decompress(path, content)
    form = benchmark.expected_form
    if content.startswith(PARQUET_MAGIC):
        kind, rows = "row", _parquet_rows(path, content)
    else:
        text = decode_text(content, str(path), form)
        if not text.lstrip().startswith("["):
            for number, row in json_lines(text, str(path), f"one per line: {form}"):
                yield f"line {number}", row
            return
        kind, rows = "item", _parse_json(text, str(path), 1, f"a list of {form}")
    for number, row in enumerate(rows, start=1):
        yield f"{kind} {number}", row


def _parse_json(text: str, source: str, first_line: int, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        problem = describe_json_error(error)
        raise TaskError(
            f"{source}, line {line}: invalid or truncated JSON ({problem}); expected {expected}"
        ) from None


def _decompress(path: Path, content: bytes) -> bytes:
    try:
        with gzip.open(BytesIO(content)) as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{path}: broken or truncated gzip ({error})") from None
    if len(text) > MAX_BYTES:
        raise TaskError(f"{path}: holds more than {MAX_BYTES >> 30} GiB")
    return text


def _parquet_rows(path: Path, content: bytes) -> list[object]:
    """Rows of a Parquet file, the usual format on the hub."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise TaskError(
            f"{path}: Parquet needs pyarrow: pip install '.[harness]' in a clone, or set `data` to "
            "JSONL"
        ) from None
    try:
        return parquet.read_table(BytesIO(content)).to_pylist()
    # pyarrow raises many types.
    except Exception as error:
        raise TaskError(f"{path}: broken or truncated Parquet ({error})") from None


def _check_unique(rows: Sequence[DataRow], key: str, path: Path) -> None:
    (name, count), *_ = Counter(row[key] for row in rows).most_common(1)
    if count > 1:
        raise TaskError(f"{path}: two rows with {key!r} {name!r}")
