"""The number of threads follows the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.ops import cpu, threads
from coterie.ops.threads import busy_threads, limited_threads

SHARE = 1000
GENERATE_TWICE = """
import os, time
from pathlib import Path
import coterie

def wakes():
    tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
    return {task.name: switches(task / "status") for task in tasks}

def switches(status):
    lines = status.read_text().splitlines()
    return next(line for line in lines if line.startswith("voluntary_ctxt_switches"))

engine = coterie.load()
engine.generate("Tom has 3 boxes of 4 pens.")
time.sleep(0.1)
before = wakes()
engine.generate("Tom has 3 boxes of 4 pens.")
print(len(before), wakes() == before)
"""


@given(st.integers(0, 2**40), st.integers(1, 64))
@law(30)
def test_work_takes_all_threads_once_it_keeps_two_busy(multiplications: int, limit: int):
    """A region of fewer threads would end the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "MIN_SHARE", SHARE)
        patch.setattr(torch, "get_num_threads", lambda: limit)
        busy = busy_threads(multiplications)
    assert busy == (limit if multiplications >= 2 * SHARE else 1)


def test_torch_takes_one_thread_for_small_work_and_all_again_after_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(threads, "MIN_SHARE", SHARE)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with limited_threads(15 * SHARE, regions=8):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with limited_threads(16 * SHARE, regions=8):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="NOT TESTED: no /proc")
@pytest.mark.skipif(not cpu.is_available(), reason="NOT TESTED: the kernels are not built")
def test_a_small_model_wakes_no_other_thread():
    variables = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", GENERATE_TWICE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    others, is_same = done.stdout.split()
    assert int(others) >= 1
    assert is_same == "True"
