"""The processes of peers, which the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from peer_process import PeerProcess


@pytest.fixture(scope="session")
def huggingface() -> Iterator[PeerProcess]:
    """Transformers and diffusers."""
    process = PeerProcess("transformers", Path(__file__).parent / "huggingface_worker.py")
    yield process
    process.close()
