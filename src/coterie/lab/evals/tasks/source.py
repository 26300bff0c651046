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

from coterie.errors import CoterieError

DATA_ENV_VAR = "COTERIE_DATA"  # the environment variable that names the usual folder

GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
TYPE_NAMES: dict[type, str] = {str: "text", int: "a whole number", list: "a list of texts"}

DataRow = Mapping[str, object]


@dataclass(frozen=True)
class BenchmarkFile:
    """One file of a benchmark: where it lies below a data folder, where on the hub, what is in it.

    ``keys`` are what every row must hold, as text, a whole number or a list of texts; ``unique``
    is the key that names a row, where one does. Several files of the hub are read as one.
    """

    path: str
    repository: str
    files: tuple[str, ...]
    keys: Mapping[str, type]
    unique_key: str | None = None

    @property
    def expected_form(self) -> str:
        """For errors: what a row should be."""
        columns = ", ".join(f"{key!r} ({TYPE_NAMES[kind]})" for key, kind in self.keys.items())
        return f"objects with {columns}"


@dataclass(frozen=True)
class BenchmarkData:
    """What was read: its name for people, the sha256 of the files' bytes, the rows in order.

    ``beside`` is the folder that the file lay in; None: it came from the hub.
    """

    name: str
    sha256: str
    rows: tuple[DataRow, ...]
    folder: Path | None = None

    def settings(self) -> dict[str, object]:
        """For the record: the same bytes under another path are the same source."""
        return {"data": self.name, "sha256": self.sha256, "rows": len(self.rows)}


def read_benchmark(benchmark: BenchmarkFile, data: Path | None) -> BenchmarkData:
    """Its rows, from ``data`` (a file, the benchmark's folder, or the one above), else from the
    folder that $COTERIE_DATA names, else from the hub.

    Raises CoterieError naming file, line and what was expected.
    """
    location = data or _default_folder()
    if location is None:
        return _read_from_hub(benchmark)
    path = _find_below(location.expanduser(), benchmark)
    return _read_files(path.name, [path], benchmark, folder=path.parent)


def text_list(row: DataRow, key: str) -> list[str]:
    """A list of texts, whose form has been checked."""
    value = row[key]
    return [str(part) for part in value] if isinstance(value, list) else []


def _default_folder() -> Path | None:
    folder = os.environ.get(DATA_ENV_VAR)
    return Path(folder) if folder else None


def _find_below(folder: Path, benchmark: BenchmarkFile) -> Path:
    if not folder.is_dir():
        if folder.exists():
            return folder
        raise CoterieError(f"{folder}: no such file or folder; it should hold {benchmark.path}")
    relative = Path(benchmark.path)
    for candidate in (folder / relative, folder / relative.name):
        if candidate.is_file():
            return candidate
    raise CoterieError(f"{folder}: neither {relative} nor {relative.name} is in this folder")


def _read_from_hub(benchmark: BenchmarkFile) -> BenchmarkData:
    paths = [_download(benchmark, file) for file in benchmark.files]
    return _read_files(benchmark.repository, paths, benchmark, folder=None)


def _download(benchmark: BenchmarkFile, file: str) -> Path:
    try:
        return Path(hf_hub_download(benchmark.repository, file, repo_type="dataset"))
    # The hub's library raises its own, the network library's and the system's errors.
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split()).split(". ")[0][:120]
        raise CoterieError(
            f"the hub did not deliver {file} of {benchmark.repository} "
            f"({type(error).__name__}: {reason}); give the data with --data, or a folder "
            f"that holds {benchmark.path} in ${DATA_ENV_VAR}"
        ) from None


def _read_files(
    name: str, paths: Sequence[Path], benchmark: BenchmarkFile, *, folder: Path | None
) -> BenchmarkData:
    digest = hashlib.sha256()
    rows: list[DataRow] = []
    for path in paths:
        content = path.read_bytes()
        digest.update(content)
        rows.extend(_checked_rows(benchmark, path, content))
    if benchmark.unique_key is not None:
        _check_unique(rows, benchmark.unique_key, paths[0])
    return BenchmarkData(name, digest.hexdigest(), tuple(rows), folder)


def _checked_rows(benchmark: BenchmarkFile, path: Path, content: bytes) -> Iterator[DataRow]:
    """Every row, or a CoterieError that names the first that is not as published."""
    empty = True
    for position, row in _parse_rows(path, content, benchmark):
        problem = _row_problem(row, benchmark.keys)
        if problem is not None:
            raise CoterieError(f"{path}, {position}: {problem}; expected {benchmark.expected_form}")
        assert isinstance(row, dict)
        empty = False
        yield row
    if empty:
        raise CoterieError(f"{path}: holds nothing; expected {benchmark.expected_form}")


def _row_problem(row: object, keys: Mapping[str, type]) -> str | None:
    if not isinstance(row, dict):
        return f"not an object but {type(row).__name__}"
    for key, kind in keys.items():
        if key not in row:
            return f"{key!r} is missing"
        value = row[key]
        is_text_list = isinstance(value, list) and all(isinstance(part, str) for part in value)
        if isinstance(value, bool) or not (
            is_text_list if kind is list else isinstance(value, kind)
        ):
            return f"{key!r} is not {TYPE_NAMES[kind]}"
    return None


def _parse_rows(
    path: Path, content: bytes, benchmark: BenchmarkFile
) -> Iterator[tuple[str, object]]:
    """(where, row) for every row of a JSONL, JSON or Parquet file, gzipped or not."""
    if content.startswith(GZIP_MAGIC):
        content = _decompress(path, content)
    if content.startswith(PARQUET_MAGIC):
        yield from _parquet_rows(path, content)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CoterieError(
            f"{path}, line {line}: not UTF-8; expected {benchmark.expected_form}"
        ) from None
    is_list = text.lstrip().startswith("[")
    yield from (_json_rows if is_list else _json_lines)(path, text, benchmark)


def _decompress(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise CoterieError(f"{path}: broken or cut off gzip ({error})") from None


def _json_lines(path: Path, text: str, benchmark: BenchmarkFile) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CoterieError(
                    f"{path}, line {number}: not JSON, or cut off ({error}); "
                    f"expected one a line: {benchmark.expected_form}"
                ) from None


def _json_rows(path: Path, text: str, benchmark: BenchmarkFile) -> Iterator[tuple[str, object]]:
    try:
        for number, row in enumerate(json.loads(text), start=1):
            yield f"item {number}", row
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise CoterieError(
            f"{path}, line {line}: not JSON, or cut off ({error}); "
            f"expected a list of {benchmark.expected_form}"
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


def _check_unique(rows: Sequence[DataRow], key: str, path: Path) -> None:
    names: set[object] = set()
    for row in rows:
        if row[key] in names:
            raise CoterieError(f"{path}: two rows with {key!r} {row[key]!r}")
        names.add(row[key])
