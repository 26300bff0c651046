"""What a program may use, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from coterie.keys import Key

ExecutionStatus = Literal["passed", "failed", "timeout"]


@dataclass(frozen=True)
class Limits:
    """What one program and all that it starts may use.

    ``processor`` is seconds of processor time, so that a busy machine fails nobody; ``seconds``
    is the wall clock's, for programs that sleep. ``memory`` holds for the address space of each
    process and for what all of them keep resident; ``disk`` is what the private folder holds,
    and the largest file; ``output`` what may be printed. Bytes, all four.
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
