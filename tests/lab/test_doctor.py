"""The doctor: what it says of kernels that are missing, broken, held back, or sound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coterie.cli.entry import run
from coterie.lab import doctor
from coterie.lab.doctor import CheckResult, answer_check, kernel_checks, kernel_test
from coterie.ops.cpu import build
from coterie.ops.cpu.library import KernelLibrary

KEYS = {
    *("schema", "processor", "memory", "gpu", "read_bytes_per_second", "disk_bytes_per_second"),
    *("versions", "checks", "broken"),
}
ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "avx512bf16": 3}


def library(*isas: str) -> KernelLibrary:
    return KernelLibrary(None, {isa: ISAS[isa] for isa in isas})


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(doctor, "measure_disk_bandwidth", lambda folder: 1e9)


def test_the_doctor_finds_this_installation_sound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    assert run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == KEYS
    assert document["broken"] is False
    names = [check["name"] for check in document["checks"]]
    assert {"processor", "memory", "disk", "GPU", "CPU kernels", "Triton", "model"} < set(names)
    assert all(set(f) == {"name", "value", "state", "remedy"} for f in document["checks"])


def test_something_broken_ends_with_status_1_and_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(
        doctor, "answer_check", lambda: CheckResult("model", "no", "broken", "mend")
    )
    assert run(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "BROKEN" in printed
    assert "model: mend" in printed


def test_a_missing_library_is_slow_and_a_wrong_one_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(build, "LIBRARY_PATH", tmp_path / "none.so")
    (missing,) = kernel_checks("no compiler was available at installation")
    assert (missing.state, "build.py" in (missing.remedy or "")) == ("note", True)
    (tmp_path / "none.so").write_bytes(b"not a library")
    (wrong,) = kernel_checks("the library is of another version; reinstall")
    assert wrong.state == "broken"


def test_without_a_compiler_the_remedy_names_one(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (check,) = kernel_checks("no compiler was available at installation")
    assert "install a C++ compiler" in (check.remedy or "")


@pytest.mark.parametrize(
    ("forced", "isas", "reason"),
    [
        (None, ("portable", "avx2"), "the processor lacks avx512"),
        (None, ("portable", "avx2", "avx512", "avx512bf16"), ""),
        ("avx2", ("portable", "avx2", "avx512"), "COTERIE_ISA=avx2 rules out avx512"),
    ],
)
def test_the_reason_against_better_kernels_is_said(
    monkeypatch: pytest.MonkeyPatch, forced: str | None, isas: tuple[str, ...], reason: str
) -> None:
    monkeypatch.setattr(build, "ISA_FLAGS", dict.fromkeys(ISAS, ""))
    monkeypatch.setattr(build, "is_stale", lambda: False)
    if forced is None:
        monkeypatch.delenv("COTERIE_ISA", raising=False)
    else:
        monkeypatch.setenv("COTERIE_ISA", forced)
    (check,) = kernel_checks(library(*isas))
    assert check.value.endswith(reason)
    assert check.state == ("ok" if forced is None else "note")


def test_an_unsupported_instruction_set_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTERIE_ISA", "avx1024")
    (check,) = kernel_checks(library("portable", "avx2"))
    assert (check.state, check.remedy) == ("broken", "unset COTERIE_ISA")


def test_an_old_library_is_noted_with_its_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTERIE_ISA", raising=False)
    monkeypatch.setattr(build, "is_stale", lambda: True)
    *_, check = kernel_checks(library("portable", "avx2"))
    assert (check.name, check.state) == ("library", "note")


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_kernels_that_compute_something_else_are_broken(
    monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    monkeypatch.setattr(doctor, "layer_error", lambda name: error)
    assert kernel_test("int8").state == "broken"


def test_kernels_that_raise_are_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> float:
        raise OSError("no such symbol")

    monkeypatch.setattr(doctor, "layer_error", fail)
    assert "no such symbol" in kernel_test("bf16").value


def test_a_wrong_answer_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER", "an answer that it does not give")
    assert answer_check().state == "broken"


def test_a_cache_that_cannot_be_examined_stands_for_its_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "HF_HUB_CACHE", str(tmp_path / ("x" * 300) / "hub"))
    assert doctor.cache_folder() == tmp_path
