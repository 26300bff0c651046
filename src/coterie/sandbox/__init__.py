"""Where code that a model wrote may run: it can harm nothing, and leaves nothing behind."""

from coterie.sandbox.judge import available_backend, require_backend, run_program, run_programs
from coterie.sandbox.verdict import Limits, ExecutionResult

__all__ = [
    "Limits",
    "ExecutionResult",
    "available_backend",
    "require_backend",
    "run_program",
    "run_programs",
]
