"""Resource limits of a sandboxed program, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from coterie.keys import Key

ExecutionStatus = Literal["passed", "failed", "timeout"]


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program, its child processes included.

    ``cpu_seconds`` is processor time, so that load on the machine fails no program.
    ``wall_seconds`` also ends a program that sleeps. ``memory`` limits the address space of each
    process and the resident memory of all of them. ``disk`` limits the private folder and each
    file; ``output`` limits stdout and stderr. These three are in bytes.
    """

    cpu_seconds: Annotated[int, Key("processor")] = 5
    wall_seconds: Annotated[float, Key("seconds")] = 20.0
    memory: Annotated[int, Key("memory")] = 1 << 30
    disk: Annotated[int, Key("disk")] = 8 << 20
    output: Annotated[int, Key("output")] = 16 << 20
    processes: Annotated[int, Key("processes")] = 8
    files: Annotated[int, Key("files")] = 32


@dataclass(frozen=True)
class ExecutionResult:
    """``reason`` is one short printable line, such as "AssertionError()"; empty when passed."""

    status: ExecutionStatus
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"
