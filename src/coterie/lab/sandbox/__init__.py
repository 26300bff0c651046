"""Runs generated code in isolation: it cannot harm the machine and leaves no files or processes."""

from coterie.lab.sandbox.result import ExecutionResult, Limits
from coterie.lab.sandbox.runner import require_backend, run_program

__all__ = ["ExecutionResult", "Limits", "require_backend", "run_program"]
