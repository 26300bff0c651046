"""On a GPU without Triton everything runs on PyTorch, which is logged once."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from coterie.ops import triton_ops


def test_a_missing_triton_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_ops, "find_spec", lambda name: None)
    triton_ops._kernels.cache_clear()
    with FakeTensorMode():
        on_gpu = torch.zeros(1, device="cuda")
    try:
        with caplog.at_level(logging.WARNING, logger="coterie"):
            assert [triton_ops.kernels_for(on_gpu) for _ in range(3)] == [None] * 3
            assert triton_ops.kernels_for(torch.zeros(1)) is None
        (record,) = caplog.records
        assert "Triton is not installed" in record.getMessage()
    finally:
        triton_ops._kernels.cache_clear()
