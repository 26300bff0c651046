"""The experiment on settled tokens: paired answers, and the positions that forwards computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import settled_tokens


def test_the_record_pairs_limits_and_counts_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settled_tokens, "POLICIES", ("vanilla",))
    monkeypatch.setattr(settled_tokens, "RULES", ("fixed:steps=8",))
    monkeypatch.setattr(settled_tokens, "LIMITS", (None, 1))
    assert settled_tokens.main(["--num-problems", "1", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "settled-tokens.json").read_text(encoding="utf-8"))["facts"]
    off, on = facts["fixed:steps=8"]["policies"]
    assert (off["policy"], on["policy"]) == ("vanilla", "vanilla skip_settled=1")
    assert (off["change"], off["accuracy"]["n"]) == (None, 4)
    assert on["change"]["gained"] - on["change"]["lost"] == round(
        4 * (on["accuracy"]["value"] - off["accuracy"]["value"])
    )
    assert (
        off["positions_per_forward"]
        == facts["fixed:steps=8"]["run"]["tasks"]["words"]["generation"]["block"]
    )
    assert on["positions_per_forward"] < off["positions_per_forward"]
    assert on["experts"] < off["experts"]
