"""Kernels share even the smallest work among threads, so that small cases test this too."""

import pytest

from coterie.ops.cpu import library


@pytest.fixture(autouse=True)
def many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "MIN_SHARE", 1)
