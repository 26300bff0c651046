"""`scripts/replay` walked through on few problems: what it counts adds up."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_part_is_walked_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "replay.py"))
    words = ["--dry-run", "--items", "1", "--prompts", "1", "--out", str(tmp_path)]
    assert script["main"](words) == 0
    records = {path.stem: json.loads(path.read_text())["facts"] for path in tmp_path.iterdir()}
    drawn = records["replay-drawn-mini"]["as read off"]
    assert {point["policy"] for point in drawn["points"]} == set(drawn["overlap"])
    assert all(0 <= one["means"]["step_jaccard"] <= 1 for one in drawn["overlap"].values())
    every = records["replay-embedded"]
    assert len(every) == 4
    assert every["decoding only"]["forwards"]["commit"] == 0
    runs = records["replay-against-runs"]
    vanilla, other = runs["policies"]
    assert (vanilla["saved"], vanilla["rule"], runs["items"]) == (0.0, "vanilla", 4)
    assert 0 < other["moved"] < vanilla["moved"] <= vanilla["used"]
    assert [duel["n"] for duel in runs["duels"]] == [4]
    assert "alike" in capsys.readouterr().out
