"""`scripts/offload` walked through: a tiny model, times that mean nothing, counts that do."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from offload_cases import needs_kernels, packed_checkpoint

ROOT = Path(__file__).parents[2]


@needs_kernels
def test_every_part_is_walked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    script = runpy.run_path(str(ROOT / "scripts" / "offload.py"))
    threads = torch.get_num_threads()
    law = str(ROOT / "results" / "replay-drawn-mini.json")
    words = [str(packed_checkpoint(tmp_path)), "--blocks", "2", "--rounds", "1", "--threads", "1"]
    try:
        assert script["main"]([*words, "--law", law, "--out", str(tmp_path / "out")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "of those not learnt from" in capsys.readouterr().out
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    alone, whole = records["offload-on-a-cpu"], records["offload-whole-model"]
    for record in (alone, whole):
        assert record["command"][1] == "packed"
        assert all(run["loads_as_replayed"] for run in record["facts"]["runs"].values())
        judged = record["facts"]["foretelling"]
        assert {run["run"] for run in judged["runs"]} == set(record["facts"]["runs"])
        off = [abs(run["off_by"]) for run in judged["runs"] if not run["rates_learnt_from_it"]]
        assert judged["worst"] == max(off)
        assert 3 <= len(off) < len(judged["runs"])
    vanilla = whole["facts"]["runs"]["vanilla, 35% in memory"]
    voted = whole["facts"]["runs"]["des-vote:beta=0.1, 35% in memory"]
    assert vanilla["forwards"] == voted["forwards"] == {"decode": 16, "commit": 1}
    assert vanilla["bytes_moved_against_vanilla"] == 1.0 > voted["bytes_moved_against_vanilla"]
    everyone = records["offload-whole-model-resident"]["facts"]["runs"]
    assert all(run["bytes_moved_a_forward"] == 0 for run in everyone.values())
