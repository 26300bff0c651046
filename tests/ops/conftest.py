"""Kernels share even the smallest work among threads, so that small cases test this too."""

import pytest

from coterie.ops import threads


@pytest.fixture(autouse=True)
def many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MIN_SHARE", 1)
