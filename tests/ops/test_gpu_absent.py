"""On a GPU without Triton everything runs on PyTorch, and that is said once."""

from __future__ import annotations

import logging

import pytest

from coterie.ops import triton_ops


def test_a_missing_triton_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_ops, "find_spec", lambda name: None)
    triton_ops.is_available.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="coterie"):
            assert [triton_ops.is_available() for _ in range(3)] == [False] * 3
        (record,) = caplog.records
        assert "Triton is not installed" in record.getMessage()
    finally:
        triton_ops.is_available.cache_clear()
