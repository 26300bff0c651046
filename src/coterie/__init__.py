"""Mixture-of-Experts diffusion language models, where every block elects the experts it needs.

>>> import coterie
>>> engine = coterie.load(policy="des-vote:beta=0.3")
>>> engine.generate("Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?").text
"""

from coterie.engine.coarse import LowPrecisionExperts
from coterie.engine.config import GenerationConfig
from coterie.engine.engine import Engine, load
from coterie.engine.event import Denoised, Event, ExpertUsage, Finished, Result
from coterie.engine.memory import ExpertMemoryConfig
from coterie.naming import CoterieError
from coterie.routing import POLICIES, parse_policy, format_policy

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "LowPrecisionExperts",
    "CoterieError",
    "Denoised",
    "Engine",
    "Event",
    "ExpertUsage",
    "Finished",
    "GenerationConfig",
    "ExpertMemoryConfig",
    "Result",
    "__version__",
    "load",
    "parse_policy",
    "format_policy",
]
