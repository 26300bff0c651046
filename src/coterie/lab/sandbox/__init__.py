"""Runs generated code in isolation: it cannot harm the machine and leaves no files or processes."""

from coterie.lab.sandbox.backends import Limits
from coterie.lab.sandbox.runner import ExecutionResult, require_backend, run_program

__all__ = ["ExecutionResult", "Limits", "require_backend", "run_program"]
