"""Runs generated code in isolation: it cannot harm the machine and leaves no files or processes."""

from coterie.lab.sandbox.result import ExecutionResult, Limits
from coterie.lab.sandbox.runner import available_backend, require_backend, run_program, run_programs

__all__ = [
    "ExecutionResult",
    "Limits",
    "available_backend",
    "require_backend",
    "run_program",
    "run_programs",
]
