"""The offload experiment on a tiny model: its times mean nothing, its counts do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from offload_cases import needs_kernels, packed_checkpoint

from experiments.__main__ import main


@needs_kernels
def test_the_experiment_writes_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    words = ["offload", str(packed_checkpoint(tmp_path)), "--blocks", "2", "--threads", "1"]
    try:
        assert main([*words, "--out", str(tmp_path / "out")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "largest error of a predicted run" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "offload-on-a-cpu.json").read_text())
    assert record["command"][3:5] == ["offload", "packed"]
    runs, prediction = record["facts"]["runs"], record["facts"]["prediction"]
    assert set(prediction["runs"]) == set(runs)
    predicted = [abs(r["relative_error"]) for r in prediction["runs"].values() if not r["fitted"]]
    assert prediction["worst"] == max(predicted)
    assert 3 <= len(predicted) < len(runs)
    vanilla, voted = (
        runs[f"{policy}, 35% in memory"] for policy in ("vanilla", "des-vote:beta=0.1")
    )
    assert voted["experts"] < vanilla["experts"]
    assert 0 < voted["hit_rate"] < 1


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["beyond"]) == 2
    assert "gpu,offload" in capsys.readouterr().err
