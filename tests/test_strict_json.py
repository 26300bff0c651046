"""Strict JSON: what is valid comes back; all else is one line with the file and the place."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import CheckpointError
from coterie.strict_json import MAX_DEPTH, parse_object, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(content=st.dictionaries(st.text(), VALUES), indent=st.sampled_from([None, 1]))
def test_an_object_comes_back(content: dict, indent: int | None) -> None:
    assert parse_object(json.dumps(content, indent=indent).encode(), "a JSON file") == content


@given(content=st.binary())
def test_any_bytes_are_an_object_or_an_error(content: bytes) -> None:
    with suppress(CheckpointError):
        assert isinstance(parse_object(content, "a JSON file"), dict)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{\n "a": 1,\n "b" 2\n}', "no valid JSON at line 3 column 6"),
        ("[]", "not an object"),
        ('{"a": {"k": 1, "j": 2, "k": 3}}', "k is listed twice"),
        (f'{{"a": {"9" * 101}}}', "more than 100 digits"),
        (f'{{"a": [-{"9" * 4000}]}}', "more than 100 digits"),
        (f'{{"a": {"9" * 10_000}}}', "more than 100 digits"),
        (f'{{"a": {"[" * MAX_DEPTH}{"]" * MAX_DEPTH}}}', "deep"),
        (f'{{"a": {"[" * 100_000}', "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
    ],
)
def test_damage_is_named_with_the_file(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=problem) as raised:
        read_object(tmp_path / "config.json")
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert len(str(raised.value)) < 300


def test_many_keys_cost_no_more_than_their_number() -> None:
    """300,000 keys took minutes where each was searched for among the others."""
    keys = [f'"k{number}": 1' for number in range(300_000)]
    content = "{" + ",".join([*keys, '"k299999": 2']) + "}"
    with pytest.raises(CheckpointError, match="k299999 is listed twice"):
        parse_object(content.encode(), "a JSON file")


def test_not_more_than_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": "b" * 100}))
    with pytest.raises(CheckpointError, match="too large"):
        read_object(tmp_path / "a.json", 100)
