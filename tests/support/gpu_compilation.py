"""Compiles kernels for a GPU where there is none: finds what the interpreter cannot.

Run as a program in a process of its own (the interpreter's switch holds for a whole process), it
executes the codes of the JSON list that is its input. Whatever they launch is compiled for compute
capability 9.0 down to machine code, as the launch would be, and not run; one line of JSON says what
each kernel takes, and which code launched it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CAPABILITY = 90


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel; all sizes but registers in bytes."""

    name: str
    registers: int  # of each thread
    stack: int  # of each thread: more than a few bytes are registers that spilled
    shared: int  # of each program


def compiled(code: str) -> list[Compiled]:
    """What ``code`` launches, compiled; raises AssertionError with what the compiler said."""
    return compiled_parts([code])[0]


def compiled_parts(codes: Sequence[str]) -> list[list[Compiled]]:
    """``compiled`` of each of them, in one process: most of its time is for its imports."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(codes),
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts: list[list[Compiled]] = [[] for _ in codes]
    for line in done.stdout.splitlines():
        part, facts = json.loads(line)
        parts[part].append(Compiled(**facts))
    return parts


def _main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """As much of a driver as compiling asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", CAPABILITY, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return device

    launch = JITFunction.run
    seen: list[object] = []

    def warm_up(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object):
        del warmup
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if all(kernel is not other for other in seen):
            seen.append(kernel)
            facts = _resources(triton.__file__, kernel.asm["cubin"])
            facts["shared"] = kernel.metadata.shared
            line = json.dumps([part, {"name": self.fn.__name__, **facts}])
            print(line, file=out, flush=True)
        return kernel

    out = sys.stdout
    driver.set_active(Absent())
    JITFunction.run = warm_up
    with contextlib.redirect_stdout(io.StringIO()):
        for part, code in enumerate(json.load(sys.stdin)):  # noqa: B007
            seen.clear()
            exec(compile(code, "<launches>", "exec"), {})


def _resources(triton: str, cubin: bytes) -> dict[str, int]:
    tool = Path(triton).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


if __name__ == "__main__":
    _main()
