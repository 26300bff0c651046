"""Journals: what was finished is kept, what is damaged is named, and two at once are refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.errors import ConfigError
from coterie.files import LockedFile
from coterie.lab.journal import Journal

SAME = {"model": "tiny", "tokens": [3, 4]}
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=9,
)


@given(st.dictionaries(st.text(max_size=9), VALUES, min_size=1, max_size=6), st.data())
@law(60)
def test_a_cut_journal_has_the_steps_before_the_cut(tmp_path_factory, steps, data) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    with Journal(path, SAME) as journal:
        sizes = [path.stat().st_size]
        for name, value in steps.items():
            journal.add(name, value)
            sizes.append(path.stat().st_size)
    size = data.draw(st.integers(sizes[0], sizes[-1]))
    zeros = bytes(data.draw(st.sampled_from((0, 5))))  # a block that was not written
    path.write_bytes(path.read_bytes()[:size] + zeros)
    count = sum(end <= size for end in sizes[1:])
    with Journal(path, SAME) as journal:
        assert journal.steps == dict(list(steps.items())[:count])
        journal.add("after", 1)
    with Journal(path, SAME) as journal:
        assert list(journal.steps) == list(dict.fromkeys([*list(steps)[:count], "after"]))


def test_another_run_or_a_damaged_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, SAME) as journal:
        journal.add("one", 1)
        journal.add("two", 2)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"another run \(tokens differ\)"):
        Journal(path, {**SAME, "tokens": [3]})
    assert path.read_bytes() == before
    path.write_bytes(before.replace(b'"one"', b"\0\0\0\0\0"))
    with pytest.raises(ConfigError, match="j: line 2 is damaged"):
        Journal(path, SAME)


def test_a_journal_has_one_writer_and_leaves_nothing_empty(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, SAME) as journal, pytest.raises(ConfigError, match="another process"):
        Journal(path, SAME)
    assert journal.steps == {}
    assert not path.exists()
    with Journal(path, SAME) as journal:
        journal.add("one", 1)
        journal.remove()
    assert not path.exists()
    with pytest.raises(ConfigError, match="cannot be written"):
        LockedFile(tmp_path / "nowhere" / "j")


def test_a_full_disk_keeps_the_steps_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, content: bytes) -> int:
        os.pwrite(descriptor, content[:3], os.fstat(descriptor).st_size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "j"
    with Journal(path, SAME) as journal:
        journal.add("one", 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(ConfigError, match=r"j: cannot be written \(No space left"):
                journal.add("two", 2)
        journal.add("three", 3)
    assert Journal(path, SAME).steps == {"one": 1, "three": 3}
