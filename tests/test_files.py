"""Only regular files are read, within limits; written ones are whole or absent."""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
from functools import partial
from pathlib import Path

import pytest

import coterie
from coterie.errors import CheckpointError, ConfigError
from coterie.files import (
    LockedFile,
    atomic_write,
    atomic_writer,
    opened,
    read_file,
    read_text,
    remove_partial,
)

# Modules that read what no user names: the kernel's files, and files of the package or of a
# process that the module started itself.
OWN_READERS = {
    "files.py",
    "loading/free_memory.py",
    "lab/machine.py",
    "lab/records.py",
    "lab/sandbox/backends.py",
    "lab/sandbox/namespaces.py",
    "lab/sandbox/probe.py",
    "lab/sandbox/supervisor.py",
    "lab/bench/baselines.py",
    "lab/bench/worker.py",
    "offload/tiers.py",  # files that the loader has opened before
    "lab/evals/tasks/verifier.py",
    "cli/entry.py",
    "server/demo.py",
}
READS = re.compile(r"\.read_(bytes|text)\(|(?<![\w.])(?<!def )(os\.)?open\(|\.open\([\"'](rb|r|a)")
PACKAGE_FILE = re.compile(r"__file__|tomllib")


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


def test_every_file_that_a_user_names_is_read_so() -> None:
    package = Path(coterie.__file__).parent
    for source in package.rglob("*.py"):
        name = source.relative_to(package).as_posix()
        lines = [line for line in source.read_text("utf-8").splitlines() if READS.search(line)]
        others = [line for line in lines if not PACKAGE_FILE.search(line)]
        assert not others or name in OWN_READERS, f"{name}: {others}"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "loop", "urandom"])
def test_what_is_no_regular_file_is_neither_replaced_nor_appended_to(
    tmp_path: Path, kind: str
) -> None:
    path = special(tmp_path, kind)
    before = path.lstat().st_mode
    with pytest.raises(ConfigError, match=f"{kind}: cannot be written"):
        LockedFile(path)
    if kind != "loop":  # a name that leads nowhere may be given
        with pytest.raises(CheckpointError, match=f"{kind}: cannot be written"):
            atomic_write(path, b"1")
        assert path.lstat().st_mode == before


def test_a_locked_file_is_read_whole_though_the_system_reads_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 3), at))
    with LockedFile(tmp_path / "log") as file:
        file.append(b"one\ntwo\n")
        assert file.read() == b"one\ntwo\n"


def test_a_read_that_ends_too_early_is_an_error_and_no_end_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, whole = os.pread, b"one\ntwo\n"
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, size, at)[: 5 - at])
    with LockedFile(tmp_path / "log") as file:
        file.append(whole)
        with pytest.raises(ConfigError, match=r"log: cannot be read"):
            file.read()
    assert (tmp_path / "log").read_bytes() == whole
    monkeypatch.setattr(os, "fstat", lambda file: os.stat_result([0o100644, *[9] * 9]))
    with pytest.raises(CheckpointError, match=r"log: cannot be read .8 of 9 bytes"):
        read_file(tmp_path / "log", 1000)


@pytest.mark.parametrize("name", ["pread", "ftruncate", "write", "fsync"])
def test_a_locked_file_names_itself_where_the_system_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with LockedFile(tmp_path / "log") as file, monkeypatch.context() as patch:
        file.append(b"before")
        patch.setattr(os, name, fail)
        uses = {"pread": file.read, "ftruncate": file.truncate}
        use = uses.get(name, partial(file.append, b"1", sync=True))
        with pytest.raises(ConfigError, match=r"log: cannot be .*Input/output error"):
            use()
    content = (tmp_path / "log").read_bytes()
    assert content == b"before"


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
