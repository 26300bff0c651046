"""Where code that a model wrote may run: it can harm nothing, and leaves nothing behind."""

from coterie.sandbox.judge import fence, require_fence, run, run_many
from coterie.sandbox.verdict import Limits, Verdict

__all__ = ["Limits", "Verdict", "fence", "require_fence", "run", "run_many"]
