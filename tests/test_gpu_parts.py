"""What is measured on a GPU, walked through where there is none: tiny sizes, interpreted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from interpreting import quicken

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "scripts"), *sys.path])
    quicken(monkeypatch)


def test_routing_is_compared_and_timed_for_every_policy() -> None:
    from gpu_parts import routing

    found = routing.measure(torch.device("cpu"), dry=True)
    assert len(found.facts) == len(routing.TINY) * (len(routing.POLICIES) + 1)
    assert all(facts["agrees"] for facts in found.facts.values())
    assert len(found.measures) == 4 * len(found.facts)
