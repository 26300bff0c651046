"""A journal goes on from any damage; another model's is refused."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.checkpoints.journal import JOURNAL, ConversionJournal
from coterie.errors import CheckpointError

IDENTITY = {"source": "abc", "experts": "int8", "layout": False}
FILES = {f"file-{number}": {"w": {"sha256": str(number)}} for number in range(3)}


def written(folder: Path) -> Path:
    with ConversionJournal.open(folder, IDENTITY, pytest.fail) as journal:
        for file, checksums in FILES.items():
            journal.add(file, checksums)
    return folder / JOURNAL


def resumed(folder: Path) -> tuple[dict, list[str]]:
    notes: list[str] = []
    with ConversionJournal.open(folder, IDENTITY, notes.append) as journal:
        return dict(journal.finished), notes


def test_what_was_finished_is_known_again(tmp_path: Path) -> None:
    written(tmp_path)
    assert resumed(tmp_path) == (FILES, [])


# Without digits: one could turn the name of a file into that of another.
DAMAGE = sorted({*range(256)} - {*b"0123456789"})
damages = st.lists(st.sampled_from(DAMAGE), min_size=1, max_size=40)


@given(start=st.integers(0, 400), damage=damages.map(bytes))
def test_after_any_damage_a_prefix_of_the_files_is_finished(
    tmp_path_factory: pytest.TempPathFactory, start: int, damage: bytes
) -> None:
    folder = tmp_path_factory.mktemp("out")
    file = written(folder)
    content = file.read_bytes()
    file.write_bytes(content[:start] + damage + content[start + len(damage) :])
    try:
        finished, _ = resumed(folder)
    except CheckpointError:  # the damage made the first line that of another model
        assert start < len(content.split(b"\n")[0])
        return
    names = [name for name in finished if name in FILES]
    assert names == list(FILES)[: len(names)]
    assert resumed(folder) == (finished, [])  # nothing damaged is left


@pytest.mark.parametrize(
    "line",
    [bytes(60), b"[]", b"{}", b"7", b'{"file": 3, "tensors": {}}', b'{"file": "a"}', b"\xff"],
)
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_damaged_line_is_named_and_its_file_made_again(
    tmp_path: Path, line: bytes, number: int
) -> None:
    file = written(tmp_path)
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([*lines[: number - 1], line, *lines[number:], b""]))
    finished, notes = resumed(tmp_path)
    assert list(finished) == list(FILES)[: max(0, number - 2)]
    assert len(notes) == 1
    assert notes[0].startswith(f"{file}: line {number} is damaged")
    assert json.loads(file.read_bytes().splitlines()[0]) == IDENTITY


def test_a_line_that_a_stop_cut_off_needs_no_note(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    assert resumed(tmp_path) == ({name: FILES[name] for name in list(FILES)[:2]}, [])


def test_another_model_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(CheckpointError, match="unfinished conversion of another model"):
        ConversionJournal.open(tmp_path, IDENTITY | {"source": "xyz"}, pytest.fail)


def test_a_full_disk_names_the_journal(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ConversionJournal.open(tmp_path, IDENTITY, pytest.fail) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=f"{JOURNAL}: cannot be written"):
                journal.add("file", {"w" * 200: {}})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
