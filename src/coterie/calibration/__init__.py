"""Finds the parameter of a policy family that meets a target on given prompts.

>>> import coterie
>>> from coterie.calibration import Bench, Wish, calibrate, from_tasks
>>> asked = from_tasks(["words"], 20, Wish(family="llada2", seed=1))
>>> calibrate(Bench(coterie.load(), asked), "des-vote", "experts=38").policy
"""

from coterie.calibration.bench import Bench
from coterie.calibration.calibration import Calibration, calibrate
from coterie.calibration.kept import Kept, document, keep, read_kept
from coterie.calibration.prompts import Question, Questions, from_file, from_tasks
from coterie.calibration.target import Target
from coterie.evals.task import Wish

__all__ = [
    "Bench",
    "Calibration",
    "Kept",
    "Question",
    "Questions",
    "Target",
    "Wish",
    "calibrate",
    "document",
    "from_file",
    "from_tasks",
    "keep",
    "read_kept",
]
