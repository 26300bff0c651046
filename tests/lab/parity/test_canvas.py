"""Two steps on random canvases equal the reference, and damaged cases are never a pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shared_data import golden

from coterie.errors import CheckpointError
from coterie.lab.parity.canvas import CASES, canvas_deviations

Cases = dict[str, Any]


def copied(tmp_path: Path, change: Callable[[Cases], object]) -> Path:
    """A copy of the golden folder with its cases changed."""
    source = golden("diffusion_gemma", "a")
    folder = shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
    folder.chmod(0o755)
    cases = json.loads((source / CASES).read_text())
    change(cases)
    (folder / CASES).write_text(json.dumps(cases))
    return folder


def failing(folder: Path) -> set[str]:
    return {d.name for d in canvas_deviations(folder) if not d.within_tolerance}


def test_both_steps_equal_the_reference() -> None:
    found = list(canvas_deviations(golden("diffusion_gemma", "a")))
    assert {d.name: d.max_error for d in found if not d.within_tolerance} == {}
    assert {"logits 1, prompt of 3", "logits 2, prompt of 20", "entropy"} <= {d.name for d in found}


@pytest.mark.parametrize("step", [1, 2])
def test_other_logits_fail(tmp_path: Path, step: int) -> None:
    def change(cases: Cases) -> None:
        cases["cases"][0][f"logits_{step}"][0][0] += 0.01

    assert f"logits {step}, prompt of 3" in failing(copied(tmp_path, change))


def test_other_kept_tokens_fail(tmp_path: Path) -> None:
    def change(cases: Cases) -> None:
        kept = cases["entropy_acceptance"]["accepted_by_bound"]["1.0"]
        kept[0] = 1 - kept[0]

    assert failing(copied(tmp_path, change)) == {"tokens kept otherwise, bound 1.0"}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("cases"),
        lambda c: c["cases"].append(3),
        lambda c: c["cases"][0].pop("logits_2"),
        lambda c: c["cases"][0]["prompt"].append(64),
        lambda c: c["cases"][0].update(prompt=[]),
        lambda c: c["cases"][0]["logits_1"].pop(),
        lambda c: c["cases"][0].update(temperature="hot"),
        lambda c: c["entropy_acceptance"]["accepted_by_bound"].update(much=[1]),
    ],
)
def test_damaged_cases_are_errors(tmp_path: Path, change: Callable[[Cases], object]) -> None:
    with pytest.raises(CheckpointError, match=CASES):
        failing(copied(tmp_path, change))
