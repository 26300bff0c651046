"""The libraries that a layer is timed against: their interpreters and processes."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from coterie.errors import ConfigError, CoterieError

SCRIPT_FOLDER = Path(__file__).parent
ENVIRONMENTS_FOLDER = Path(".peers")
"""Where ``scripts/peers`` creates a virtual environment for each baseline."""

START_TIMEOUT, ANSWER_TIMEOUT = 240.0, 60.0  # seconds


class BaselineError(CoterieError):
    """A baseline that does not start, ends, does not respond, or computes a wrong output."""


@dataclass(frozen=True)
class Baseline:
    """Another implementation of a layer of experts; its ``slow_kernels`` are timed on request.

    ``memory_layers`` is the memory of its process, in layers of experts.
    """

    name: str
    kernels: tuple[str, ...]
    dtypes: tuple[str, ...]
    script: str = "worker.py"
    memory_layers: float = 1.0
    slow_kernels: tuple[str, ...] = ()
    in_our_python: bool = False  # whether this interpreter has its packages

    def find_python(self, python_paths: Mapping[str, Path]) -> Path | None:
        """The interpreter in ``python_paths``, in ``.peers``, or this one if it suffices."""
        if self.name in python_paths:
            return python_paths[self.name]
        environment_python = ENVIRONMENTS_FOLDER / self.name / "bin" / "python"
        if environment_python.exists():
            return environment_python
        return Path(sys.executable) if self.in_our_python else None


BASELINES = {
    "torch": Baseline("torch", ("loop", "grouped_mm"), ("fp32", "bf16"), in_our_python=True),
    "transformers": Baseline(
        "transformers",
        ("eager", "grouped_mm", "batched_mm"),
        ("fp32", "bf16"),
        slow_kernels=("batched_mm",),
    ),
    "zentorch": Baseline("zentorch", ("fused_moe",), ("bf16",), memory_layers=2.0),
    "llama.cpp": Baseline(
        "llama.cpp",
        ("layer",),
        ("bf16", "int8", "int4"),
        script="llama.py",
        memory_layers=1.5,
    ),
}


@dataclass(frozen=True)
class ResolvedBaseline:
    """A baseline and its interpreter; a ``required`` one must not fail."""

    baseline: Baseline
    python: Path
    required: bool


def resolve_baselines(
    names: Sequence[str], pythons: Mapping[str, Path], dtype: str
) -> tuple[list[ResolvedBaseline], dict[str, str]]:
    """The baselines to time, and the reasons for those left out; by default all installed ones.

    Raises ConfigError for a named baseline that is unknown, not installed, or lacks the dtype.
    """
    for name in (*names, *pythons):
        if name not in BASELINES:
            raise ConfigError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    resolved, skipped = [], {}
    for baseline in BASELINES.values():
        if names and baseline.name not in names:
            continue
        required = baseline.name in names or baseline.name in pythons
        python = baseline.find_python(pythons)
        reason = _why_unavailable(baseline, python, dtype)
        if reason is not None and required:
            raise ConfigError(f"{baseline.name}: {reason}")
        if reason is not None or python is None:
            skipped[baseline.name] = reason or ""
        else:
            resolved.append(ResolvedBaseline(baseline, python, required))
    return resolved, skipped


def _why_unavailable(baseline: Baseline, python: Path | None, dtype: str) -> str | None:
    if dtype not in baseline.dtypes:
        return f"has no experts in {dtype}; it has {', '.join(baseline.dtypes)}"
    if python is None:
        return (
            f"not installed; `scripts/peers {baseline.name}` installs it in {ENVIRONMENTS_FOLDER}, "
            "or `baseline_pythons` names an interpreter that has it"
        )
    if not os.access(python, os.X_OK):
        return f"{python} is not executable"
    return None


class BaselineProcess:
    """The process of a baseline: one line in is one command, one line out its reply.

    Raises BaselineError for an unexpected reply or a timeout.
    """

    def __init__(
        self,
        resolved: ResolvedBaseline,
        folder: Path,
        *,
        threads: int,
        start_timeout: float = START_TIMEOUT,
        answer_timeout: float = ANSWER_TIMEOUT,
    ) -> None:
        self.resolved, self.baseline = resolved, resolved.baseline
        self.kernels: tuple[str, ...] = ()
        self.versions: dict[str, str] = {}
        self._start_timeout, self._answer_timeout = start_timeout, answer_timeout
        self._error_file = folder / f"{self.baseline.name}.stderr"
        self._answers: queue.Queue[str | None] = queue.Queue()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        script = SCRIPT_FOLDER / self.baseline.script
        command = (resolved.python, script, self.baseline.name, folder)
        with self._error_file.open("wb") as error_file:
            self._process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=error_file,
                text=True,
                errors="replace",
                env=environment,
            )
        self._reader = threading.Thread(target=self._collect_answers, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception_info: object) -> None:
        self.close()

    def wait_until_ready(self) -> None:
        """Waits for the process to load its libraries and experts."""
        status, _, payload = self._read_answer(self._start_timeout).partition(" ")
        if status != "ready":
            raise self._unexpected_answer(f"{status} {payload}")
        description = json.loads(payload)
        self.kernels, self.versions = tuple(description["works"]), description["versions"]

    def time_kernel(self, kernel: str, case: int) -> float:
        """Seconds of one kernel call on a case."""
        return self._request_number(f"time {kernel} {case}")

    def relative_error(self, kernel: str, case: int) -> float:
        """The relative error of a kernel on a case."""
        return self._request_number(f"check {kernel} {case}")

    def close(self) -> None:
        """Kills the process."""
        process = self._process
        process.kill()
        process.wait()
        self._reader.join()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def _request_number(self, line: str) -> float:
        assert self._process.stdin is not None
        with suppress(OSError):  # the process has ended; the reply is its error
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._read_answer(self._answer_timeout)
        try:
            return float(answer)
        except ValueError:
            raise self._unexpected_answer(answer) from None

    def _read_answer(self, timeout: float) -> str:
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise BaselineError(f"{self.baseline.name} did not reply in {timeout:g} s") from None
        if line is None:
            status = self._process.wait()
            lines = map(str.strip, self._error_file.read_text(errors="replace").splitlines())
            last = " / ".join([line[:200] for line in lines if line][-5:]) or "no error message"
            raise BaselineError(f"{self.baseline.name} ended with status {status}: {last}")
        if line.startswith("failed "):
            raise BaselineError(f"{self.baseline.name}: {line.removeprefix('failed ')}")
        return line

    def _unexpected_answer(self, answer: str) -> BaselineError:
        return BaselineError(f"{self.baseline.name} replied {answer.strip()!r}")

    def _collect_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line.rstrip("\n"))
        self._answers.put(None)
