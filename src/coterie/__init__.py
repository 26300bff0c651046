"""Inference of Mixture-of-Experts diffusion language models: each block elects its experts.

>>> import coterie
>>> engine = coterie.load(policy="des-vote:beta=0.3")
>>> engine.generate("Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?").text
"""

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
