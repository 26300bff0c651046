"""The GPU suite on a CPU: tiny sizes, kernels interpreted."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asynchronous_device import World
from interpreter import quicken

from coterie.values import Policy, Routing, Scores
from experiments.gpu import experts, limits, suite
from experiments.gpu.report import PartReport

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quicken(monkeypatch)
    monkeypatch.setenv("COTERIE_CACHE", os.environ["COTERIE_CACHE"])  # a dry run sets it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_routing_is_compared_and_timed_for_each_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """For two policies; the dry run below takes all."""
    from experiments.gpu import routing

    monkeypatch.setattr(routing, "POLICIES", ("vanilla", routing.JUDGED))
    report = PartReport()
    routing.measure(CPU, report, dry=True)
    assert report.errors == []
    assert len(report.facts) == len(routing.TINY_ROUTERS) * (len(routing.POLICIES) + 1)
    assert all(facts["agrees"] for facts in report.facts.values())
    assert len(report.measures) == 4 * len(report.facts)


@pytest.mark.slow
def test_a_dry_run_executes_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--dry-run", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(records) == len(suite.PARTS)
    for record in records.values():
        assert "unfinished" not in record["facts"]
        assert not any(name.startswith("failed") for name in record["facts"])
        assert all(figure["name"] in table for figure in record["facts"]["figures"])
    checked = records["gpu-experts-checked-dry-run"]["facts"]["expert kernels"]
    assert (checked["cases"], checked["failures"]) == (4, [])
    layer = records["gpu-experts-dry-run"]["facts"]
    baselines = [facts for name, facts in layer.items() if name.endswith("torch grouped_mm")]
    assert len(baselines) == 3
    assert all(facts["distance from ours"] < 2e-2 for facts in baselines)
    forwards = records["gpu-forward-dry-run"]["facts"]
    assert all(forwards[name]["finite"] for name in forwards if name.startswith("forward "))


def test_a_part_that_raises_is_recorded_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(limits, "measure", broken)
    monkeypatch.setattr(experts, "check", lambda *args, **options: None)
    words = ["--dry-run", "--out", str(tmp_path), "--only", "limits", "--only", "experts checked"]
    assert suite.main(words) == 1
    facts = json.loads((tmp_path / "gpu-limits-dry-run.json").read_text())["facts"]
    assert "illegal memory access" in facts["failed: limits"]
    assert (tmp_path / "gpu-experts-checked-dry-run.json").is_file()


def test_only_a_required_figure_fails_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status(name: str, value: float, target: float, **options: bool) -> int:
        def measure(device: object, report: PartReport, *, dry: bool) -> None:
            report.add_figure(name, value, target, **options)

        monkeypatch.setattr(limits, "measure", measure)
        return suite.main(["--dry-run", "--out", str(tmp_path), "--only", "limits"])

    assert status("speed", 0.1, 1.0) == 0
    assert status("right", 1.0, 1.0, required=True) == 0
    assert status("right", 0.5, 1.0, required=True) == 1
    assert status("right", float("nan"), 0.0, at_most=True, required=True) == 1
    record = json.loads((tmp_path / "gpu-limits-dry-run.json").read_text())
    assert record["facts"]["figures"][0]["value"] == "nan"


def test_wrong_routing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.gpu import routing

    correct = routing.route_by_kernel

    def wrong(scores: Scores, policy: Policy) -> Routing:
        result = correct(scores, policy)
        return replace(result, topk_ids=result.topk_ids.flip(-1))

    monkeypatch.setattr(routing, "route_by_kernel", wrong)
    monkeypatch.setattr(routing, "POLICIES", ("vanilla", routing.JUDGED))
    report = PartReport()
    routing.measure(CPU, report, dry=True)
    assert len(report.failures) >= len(routing.POLICIES) - 1


@pytest.mark.slow
def test_a_stopped_part_ends_its_children_and_keeps_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.py").write_text(
        "import subprocess, sys, time, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_name = lambda *which: 'none'\n"
        "from experiments.gpu import limits, suite\n"
        "def measure(device, report, *, dry):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    time.sleep(2.1)\n"
        "    report.add_times('copy', [1.0, 2.0])\n"
        "    report.facts['child'] = child.pid\n"
        "    time.sleep(2.1)\n"
        "    report.add_times('product', [3.0])\n"
        "    time.sleep(600)\n"
        "limits.measure = measure\n"
        "suite.main(sys.argv[1:])\n"
    )
    paths = os.pathsep.join(str(suite.ROOT / folder) for folder in ("src", "."))
    monkeypatch.setenv("PYTHONPATH", paths)
    args = argparse.Namespace(out=tmp_path, dry_run=False)
    command = [sys.executable, str(tmp_path / "run.py"), "--part", "limits", "--out", str(tmp_path)]
    assert suite.run_process("limits", command, args, 30) == "stopped after 30 s"
    record = json.loads((tmp_path / "gpu-limits.json").read_text())
    assert [measure["name"] for measure in record["measures"]] == ["copy", "product"]
    assert record["facts"]["unfinished"] is True
    process = Path("/proc") / str(record["facts"]["child"]) / "stat"
    assert not process.is_file() or ") Z " in process.read_text()


def test_copies_into_slots_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated GPU, where every copy ends as soon as it starts."""
    from experiments.gpu import offload

    def allocate(count: int, size: int, device: torch.device) -> torch.Tensor:
        return torch.empty((count, size), dtype=torch.uint8)

    World(0, eager=1.0).install(monkeypatch)
    monkeypatch.setattr(offload, "has_own_memory", lambda device: True)
    monkeypatch.setattr(offload, "allocate_pinned", allocate)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    report = PartReport()
    offload.measure(CPU, report, dry=True)
    assert report.failures == []
    values = {figure.name: figure.value for figure in report.figures}
    for kind in offload.SLOTS:
        name = f"{kind}: slots against resident, distance"
        assert values[name] < offload.MAX_DISTANCE
        for policy in offload.POLICIES:
            facts = report.facts[f"{kind}, {policy}, slots"]
            assert facts["bytes a forward"] > 0
            assert facts["ms stalled a forward"] > 0


def test_a_config_that_computes_other_values_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coterie.ops.triton import tuning

    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    tuning._tuned_configs.cache_clear()
    layer = experts.Layer("bf16", CPU, dry=True)
    defaults = {
        tuning.default_config(gemm) for gemm in experts.experts.gemm_shapes(layer.x, layer.slab)
    }
    right = torch.ones(len(layer.x), layer.x.shape[1])

    def run_experts(*args: object, configs: tuple[tuning.TileConfig, ...]) -> torch.Tensor:
        return right if defaults >= set(configs) else right * float("nan")

    monkeypatch.setattr(experts.experts, "run_experts", run_experts)
    facts = layer.tune((4, 2), seconds=60)
    assert [fact["tried"] for fact in facts.values()] == [1, 1]
    tuning._tuned_configs.cache_clear()
