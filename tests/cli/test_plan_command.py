"""``coterie plan`` and ``--auto``: the printed document, its verification, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coterie.cli import engine_options
from coterie.cli import plan as plan_cli
from coterie.cli.entry import run
from coterie.lab.bench.cost_model import part_bytes
from coterie.lab.planner import request
from coterie.lab.planner.planned_model import PlannedModel
from coterie.lab.planner.rates import MachineRates
from coterie.lab.planner.request import Verification
from coterie.lab.replay.hardware_model import HardwareModel
from coterie.testing import write_checkpoint

FIT = {"t0": 1e-5, "b": 1e-6, "a": 1e-7, "r2": 1.0, "error": 0.0}
RATES = MachineRates(
    *(1e10, 1e11, 1e11, dict.fromkeys(("fp32", "bf16", "int8", "int4"), FIT)),
    *(0.5, 1e-4, HardwareModel(1e9)),
)
KEYS = {
    *(
        "schema",
        "model",
        "memory",
        "gpu_memory",
        "block",
        "steps_per_block",
        "commit_routing",
        "assumptions",
    ),
    *("warnings", "rates", "configurations"),
}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _fake_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "measure_rates", lambda *_, **__: RATES)


def document(capsys: Capture, *words: str) -> dict:
    assert run([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: Capture, *words: str) -> str:
    assert run(words) == 2
    return capsys.readouterr().err


def test_the_document_has_the_plan_and_what_it_assumes(capsys: Capture) -> None:
    found = document(capsys, "plan", "tiny", "-p", "vanilla", "--memory", "2GiB")
    assert set(found) == KEYS
    assert found["memory"] == 2 << 30
    assert [each["policy"] for each in found["configurations"]] == ["vanilla"] * 3
    assert "published" in found["assumptions"][0]
    assert set(found["rates"]) == {
        *("read", "matrix", "router", "experts", "overlap", "layer", "copies")
    }


def test_the_text_numbers_each_command(capsys: Capture) -> None:
    assert run(["plan", "tiny", "-p", "vanilla", "--expert-dtype", "int8"]) == 0
    printed = capsys.readouterr().out
    assert " 1 coterie bench generate --shape tiny --expert-dtype int8 --policy vanilla" in printed
    assert "Assumed: " in printed


def test_dense_matrices_in_8_bits_are_half_as_large(capsys: Capture) -> None:
    words = ["tiny", "-p", "vanilla", "--expert-dtype", "int8"]
    plain, dense = (
        document(capsys, "plan", *words, *more)["configurations"][0]
        for more in ([], ["--dense-dtype", "int8"])
    )
    assert "--dense-dtype int8" in dense["commands"][0]
    model = PlannedModel.find("tiny")
    before, after = (
        part_bytes(each.spec, torch.bfloat16) for each in (model, model.with_dense("int8"))
    )
    assert after["router"] == before["router"]
    quantised = after.keys() - {"router"}
    assert all(0.5 < after[part] / before[part] < 0.6 for part in quantised)
    assert dense["bytes_a_forward"] < plain["bytes_a_forward"]


def test_verify_adds_the_measurement(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cli, "verify", lambda result: Verification("a forward", 9.0, 10.0))
    found = document(capsys, "plan", "tiny", "--verify")
    assert found["verified"]["error"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("memory", "work"), [("2GiB", "a forward of 3 of 3 layers"), ("513MiB", "a layer of experts")]
)
def test_the_first_configuration_runs(memory: str, work: str, capsys: Capture) -> None:
    words = ["plan", "tiny", "--memory", memory, "--expert-dtype", "bf16", "-p", "vanilla"]
    found = document(capsys, *words, "--verify")
    assert found["verified"]["work"].startswith(work)
    assert found["verified"]["measured_ms"] > 0


def test_a_gpu_is_planned_beside_the_cpu(capsys: Capture) -> None:
    found = document(capsys, "plan", "tiny", "--gpu-memory", "1GiB", "--gpu-read", "1000GB/s")
    assert {each["device"] for each in found["configurations"]} == {"cpu", "cuda"}
    assert "1000 GB/s" in found["assumptions"][-1]


def test_a_trace_sets_experts_and_steps(capsys: Capture) -> None:
    trace = Path(__file__).parents[1] / "kept" / "words.trace"
    found = document(capsys, "plan", "--trace", str(trace), "-p", "vanilla")
    assert "as recorded" in found["assumptions"][0]
    assert "tiny has 4 of 32" in refusal(capsys, "plan", "tiny", "--trace", str(trace))


def test_what_has_no_effect_or_no_meaning_is_refused(capsys: Capture) -> None:
    assert "--memory" in refusal(capsys, "plan", "tiny", "--memory", "3")
    assert "--gpu-memory" in refusal(capsys, "plan", "tiny", "--link", "20GB/s")
    assert "--disk" in refusal(capsys, "plan", "tiny", "--disk", "fast")
    assert "known: fp32" in refusal(capsys, "plan", "--expert-dtype", "int8")
    assert "--unique-experts is 500" in refusal(capsys, "plan", "tiny", "--unique-experts", "500")


def test_auto_takes_what_runs_at_once(capsys: Capture, tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path, "llada2", seed=3))
    assert run(["generate", "5 17 33", "-m", model, "-n", "4", "--auto"]) == 0
    printed = capsys.readouterr()
    assert "planned: experts in fp32, 100% of them in memory" in printed.err
    assert printed.out.strip()


def test_auto_excludes_the_options_that_it_chooses(capsys: Capture) -> None:
    error = refusal(capsys, "generate", "hello", "--auto", "--expert-memory", "35%")
    assert "--expert-memory has no effect with --auto" in error


def test_auto_names_the_conversion_that_is_missing(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "usable_memory", lambda: 8 << 30)
    options = engine_options.EngineOptions(model="llada2-mini", device="cpu")
    with pytest.raises(ValueError, match="coterie quantize"):
        engine_options.planned_options(options, "vanilla")
