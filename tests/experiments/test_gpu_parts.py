"""What is measured on a GPU, walked through where there is none: tiny sizes, interpreted."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asynchronous_device import World
from gpu_compilation import compiled
from interpreter import quicken

from coterie.values import Policy, Routing, Scores

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts can be imported, and torch uses one thread: what is done here is tiny."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "scripts"), *sys.path])
    quicken(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_routing_is_compared_and_timed_for_every_policy() -> None:
    from gpu_parts import routing

    found = routing.measure(torch.device("cpu"), dry=True)
    assert len(found.facts) == len(routing.TINY) * (len(routing.POLICIES) + 1)
    assert all(facts["agrees"] for facts in found.facts.values())
    assert len(found.measures) == 4 * len(found.facts)


def test_everything_is_walked_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "gpu.py"))
    assert gpu["main"](["--dry-run", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(records) == len(gpu["PARTS"])
    for record in records.values():
        assert "unfinished" not in record["facts"]
        assert not any(name.startswith("failed") for name in record["facts"])
        assert all(figure["name"] in table for figure in record["facts"]["figures"])
    checked = records["gpu-experts-checked-dry-run"]["facts"]["expert kernels"]
    assert (checked["cases"], checked["failures"]) == (4, [])
    layer = records["gpu-experts-dry-run"]["facts"]
    large = [facts for name, facts in layer.items() if name.endswith("fused for large batches")]
    assert len(large) == 3
    assert all(facts["distance from ours"] < 2e-2 for facts in large)
    forwards = records["gpu-forward-dry-run"]["facts"]
    assert all(forwards[name]["finite"] for name in forwards if name.startswith("forward "))


def test_what_ours_is_compared_with_compiles_for_a_gpu() -> None:
    kernels = compiled(
        """
import sys, torch
sys.path.insert(0, "scripts")
from gpu_parts import large_batches
from coterie.values import Routing

x = torch.zeros(32, 2048, dtype=torch.bfloat16)
ids = torch.zeros(32, 8, dtype=torch.int64)
weight = [torch.zeros(4, *shape, dtype=torch.bfloat16) for shape in ((1024, 2048), (2048, 512))]
large_batches.run_experts(x, Routing(ids, ids.float(), ids[0] > 0, ids), *weight)
"""
    )
    assert len(kernels) == 2
    assert all(kernel.stack == 0 for kernel in kernels)


def test_a_part_that_breaks_is_recorded_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_parts import limits

    def broken(*asked: object, **how: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(limits, "measure", broken)
    gpu = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "gpu.py"))
    words = ["--dry-run", "--out", str(tmp_path), "--only", "limits", "--only", "tests"]
    assert gpu["main"](words) == 1
    record = json.loads((tmp_path / "gpu-limits-dry-run.json").read_text())
    assert (
        record["facts"]["failed: limits"]
        == "RuntimeError: an illegal memory access was encountered"
    )
    assert (tmp_path / "gpu-tests-dry-run.json").is_file()


def test_what_is_slow_is_told_and_what_is_wrong_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_parts import limits
    from gpu_parts.found import Figure, Found

    gpu = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "gpu.py"))

    def status(*figures: Figure) -> int:
        def measured(device: object, *, dry: bool, found: Found) -> None:
            for figure in figures:
                found.judge(figure)

        monkeypatch.setattr(limits, "measure", measured)
        return gpu["main"](["--dry-run", "--out", str(tmp_path), "--only", "limits"])

    assert status(Figure("speed", 0.1, 1.0), Figure("right", 1.0, 1.0, must=True)) == 0
    assert status(Figure("right", 0.5, 1.0, must=True)) == 1
    assert status(Figure("right", float("nan"), 0.0, most=True, must=True)) == 1
    record = json.loads((tmp_path / "gpu-limits-dry-run.json").read_text())
    assert record["facts"]["figures"][0]["value"] == "nan"


def test_routing_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_parts import routing

    right = routing._by_kernel

    def wrong(scores: Scores, policy: Policy) -> Routing:
        found = right(scores, policy)
        return replace(found, topk_ids=found.topk_ids.flip(-1))

    monkeypatch.setattr(routing, "_by_kernel", wrong)
    found = routing.measure(torch.device("cpu"), dry=True)
    assert len(found.wrong) >= len(routing.POLICIES) - 1


@pytest.mark.slow
def test_who_is_stopped_leaves_what_was_found(tmp_path: Path) -> None:
    """A part that never ends: what it has started ends with it, and its record stays."""
    (tmp_path / "gpu_parts").mkdir()
    scripts = Path(__file__).parents[2] / "scripts"
    for name in ("gpu.py", "gpu_parts/found.py"):
        (tmp_path / name).write_text((scripts / name).read_text())
    (tmp_path / "gpu_parts" / "limits.py").write_text(
        "import subprocess, sys, time\n"
        "def measure(device, *, dry, found):\n"
        "    other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    time.sleep(2.1)\n"
        "    found.took('copy', [1.0, 2.0])\n"
        "    found.facts['other'] = other.pid\n"
        "    time.sleep(2.1)\n"
        "    found.took('product', [3.0])\n"
        "    time.sleep(600)\n"
    )
    # As on a GPU, but that there is none.
    (tmp_path / "go.py").write_text(
        "import runpy, sys, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_name = lambda *which: 'none'\n"
        "sys.argv = ['gpu.py', *sys.argv[1:]]\n"
        "runpy.run_path(sys.path[0] + '/gpu.py', run_name='__main__')\n"
    )
    gpu = runpy.run_path(str(tmp_path / "gpu.py"))
    asked = argparse.Namespace(out=tmp_path, dry_run=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu["apart"].__globals__, "__file__", str(tmp_path / "go.py"))
        patch.setitem(gpu["apart"].__globals__, "ROOT", tmp_path)
        assert gpu["apart"]("limits", asked, 30) == "stopped after 30 s"
    record = json.loads((tmp_path / "gpu-limits.json").read_text())
    assert [measure["name"] for measure in record["measures"]] == ["copy", "product"]
    assert record["facts"]["unfinished"] is True
    process = Path("/proc") / str(record["facts"]["other"]) / "stat"
    assert not process.is_file() or ") Z " in process.read_text()


def test_copies_into_slots_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is imagined: every copy is done as soon as it is asked for."""
    from gpu_parts import offload

    World(0, eager=1.0).install(monkeypatch)
    monkeypatch.setattr(offload, "far", lambda device: True)
    monkeypatch.setattr(
        offload, "allocate_pinned", lambda *known: torch.empty(known[:2], dtype=torch.uint8)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = offload.measure(torch.device("cpu"), dry=True)
    assert found.wrong == []
    values = {figure.name: figure.value for figure in found.figures}
    for kind in offload.SLOTS:
        assert values[f"{kind}: slots against resident, distance"] < offload.NEAR
        for play in offload.PLAYS:
            assert values[f"{kind}, {play}, slots: share of the link"] > 0
            facts = found.facts[f"{kind}, {play}, slots"]
            assert facts["bytes a forward"] > 0
            assert facts["ms stalled a forward"] > 0
        assert found.facts[f"{kind}, vanilla, slots and CPU"]["hit_rate"] <= 1
        assert set(found.facts[f"{kind}, CPU or copy"]["ms"]) == {"copy", "begin", "each", "token"}
