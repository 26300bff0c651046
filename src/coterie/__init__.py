"""Inference of Mixture-of-Experts diffusion language models: each block elects its experts.

>>> import coterie
>>> engine = coterie.load(policy="des-vote:beta=0.3")
>>> engine.generate("Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?").text

The names are loaded on first use, since torch takes seconds.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.engine.engine import Engine, load
    from coterie.engine.events import Denoised, Event, ExpertUsage, Finished, Result
    from coterie.engine.generation_config import GenerationConfig
    from coterie.errors import CoterieError
    from coterie.loading.expert_memory import ExpertMemoryConfig
    from coterie.loading.low_precision import LowPrecisionExperts
    from coterie.routing import POLICIES, format_policy, parse_policy, register_policy

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "CoterieError",
    "Denoised",
    "Engine",
    "Event",
    "ExpertMemoryConfig",
    "ExpertUsage",
    "Finished",
    "GenerationConfig",
    "LowPrecisionExperts",
    "Result",
    "__version__",
    "format_policy",
    "load",
    "parse_policy",
    "register_policy",
]

_MODULES = {
    "engine.engine": ("Engine", "load"),
    "engine.events": ("Denoised", "Event", "ExpertUsage", "Finished", "Result"),
    "engine.generation_config": ("GenerationConfig",),
    "errors": ("CoterieError",),
    "loading.expert_memory": ("ExpertMemoryConfig",),
    "loading.low_precision": ("LowPrecisionExperts",),
    "routing": ("POLICIES", "format_policy", "parse_policy", "register_policy"),
}

# OpenMP reads these once, when torch loads it. Threads that spin while they wait take cores from
# those that they wait for; threads that sleep at once are slow to wake. See docs/performance.md.
OPENMP_DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}

if "torch" not in sys.modules and not OPENMP_DEFAULTS.keys() & os.environ.keys():
    os.environ.update(OPENMP_DEFAULTS)


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"coterie.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
