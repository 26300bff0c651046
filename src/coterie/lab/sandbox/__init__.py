"""Where code that a model wrote may run: it can harm nothing, and leaves nothing behind."""

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
