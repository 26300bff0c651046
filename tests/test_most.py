"""Coresets that never exceed a number, or the slots that their layer has."""

from __future__ import annotations

from coterie.experts.imagined import Imagined
from coterie.experts.store import Resident


def test_a_store_tells_how_many_experts_it_has_room_for() -> None:
    assert Resident({}).slots(0) is None
    assert Imagined(Resident({}), 8, 5).slots(0) == 5
