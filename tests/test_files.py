"""Only regular files are read, within limits; written ones are whole or absent."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest

from coterie.errors import CheckpointError
from coterie.files import atomic_write, atomic_writer, opened, read_file, read_text, remove_partial


def special(folder: Path, kind: str) -> Path:
    path = folder / kind
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "socket":
            socket.socket(socket.AF_UNIX).bind(str(path))
        case "loop":
            path.symlink_to(path)
        case "zero" | "urandom" | "tty":
            path.symlink_to(f"/dev/{kind}")
    return path


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "zero", "urandom", "tty", "absent"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = special(tmp_path, kind)
    with pytest.raises(CheckpointError, match=f"{kind}: cannot be read"):
        read_file(path, 1000)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(CheckpointError, match="a: too large: 5 bytes"):
        read_file(tmp_path / "a", 4)
    os.truncate(tmp_path / "a", 1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="too large"):
        read_file(tmp_path / "a", 1000)


def test_text_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("ü".encode("latin-1"))
    with pytest.raises(CheckpointError, match="a: not UTF-8"):
        read_text(tmp_path / "a", 1000)


def test_errors_inside_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    for error in (OSError(5, "Input/output error"), CheckpointError("is damaged")):
        expected = pytest.raises(CheckpointError, match=r"a: .*(Input/output error|is damaged)")
        with expected, opened(tmp_path / "a"):
            raise error


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    atomic_write(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        expected = pytest.raises(CheckpointError, match=r"record\.json: cannot be .*; again")
        with expected, atomic_writer(path, "; again") as sink:
            sink.write(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
    assert path.read_bytes() == b"old"


def test_the_partial_file_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(b"1")
    remove_partial(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
