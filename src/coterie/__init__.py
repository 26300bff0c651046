"""Mixture-of-Experts diffusion language models, where every block elects the experts it needs.

>>> import coterie
>>> engine = coterie.load(policy="des-vote:beta=0.3")
>>> engine.generate("Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?").text
"""

from coterie.engine.coarse import Coarse
from coterie.engine.config import Generation
from coterie.engine.engine import Engine, load
from coterie.engine.event import Denoised, Event, Experts, Finished, Result
from coterie.engine.memory import Memory
from coterie.naming import CoterieError
from coterie.routing import POLICIES, parse_policy, spell

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "Coarse",
    "CoterieError",
    "Denoised",
    "Engine",
    "Event",
    "Experts",
    "Finished",
    "Generation",
    "Memory",
    "Result",
    "__version__",
    "load",
    "parse_policy",
    "spell",
]
