"""Other engines, each in a process under the Python of an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from shared_data import peer_folder

SEEDS = st.integers(0, 2**32 - 1)


def fresh(examples: int) -> settings:
    """So many examples that are new in each run; a failing one is printed and tried again."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=examples, derandomize=False, print_blob=True, suppress_health_check=slow
    )


class PeerProcess:
    """Calls functions of a script that imports the peer: a line of JSON each way.

    Skips the test if the peer is not installed. ``call`` raises RuntimeError with the traceback if
    the function fails.
    """

    def __init__(self, name: str, script: Path) -> None:
        python = peer_folder(name) / "bin" / "python"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def call(self, function: str, **arguments: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"function": function, **arguments}) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in reply:
            raise RuntimeError(f"{function}: {reply['error']}")
        return reply["value"]

    def close(self) -> None:
        self._process.communicate()
