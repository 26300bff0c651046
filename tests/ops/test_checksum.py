"""Checksums by a kernel are zlib's, whatever the size and wherever the bytes begin."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.ops import cpu

ISAS = cpu.available_isas() if cpu.is_available() else ("",)
CONTENT = torch.randint(256, (70_000,), dtype=torch.uint8)


@given(
    isa=st.sampled_from(ISAS),
    start=st.integers(0, 300),
    size=st.one_of(st.integers(0, 1100), st.integers(0, 69_000)),
    before=st.integers(0, 2**32 - 1),
)
@law(300)
def test_checksums_are_those_of_zlib(isa: str, start: int, size: int, before: int) -> None:
    content = CONTENT[start : start + size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_ISA", isa)
        assert cpu.crc32(content, before) == zlib.crc32(content.numpy().data, before)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_a_checksum_goes_on_from_another(parts: int) -> None:
    found = 0
    for piece in CONTENT.tensor_split(parts):
        found = cpu.crc32(piece, found)
    assert found == zlib.crc32(CONTENT.numpy().data)


def test_one_bit_changes_it() -> None:
    for place in (0, 255, 256, 4096, 69_999):
        other = CONTENT.clone()
        other[place] ^= 1
        assert cpu.crc32(other) != cpu.crc32(CONTENT)


def test_several_threads_may_ask_at_once() -> None:
    pieces = CONTENT.split(10_000)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(cpu.crc32, pieces * 20))
    assert found == [zlib.crc32(piece.numpy().data) for piece in pieces] * 20
