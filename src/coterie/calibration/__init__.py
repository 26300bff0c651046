"""Finds the parameter of a policy family that meets a target on given prompts.

>>> import coterie
>>> from coterie.calibration import Bench, Wish, calibrate, from_tasks
>>> asked = from_tasks(["words"], 20, Wish(family="llada2", seed=1))
>>> calibrate(Bench(coterie.load(), asked), "des-vote", "experts=38").policy
"""

from coterie.calibration.bench import PolicyEvaluator
from coterie.calibration.calibration import Calibration, calibrate
from coterie.calibration.kept import (
    CalibratedPolicy,
    calibration_record,
    write_calibrated_policy,
    read_calibrated_policy,
)
from coterie.calibration.prompts import (
    CalibrationPrompt,
    PromptSet,
    prompts_from_file,
    prompts_from_tasks,
)
from coterie.calibration.target import Target
from coterie.evals.task import TaskOptions

__all__ = [
    "PolicyEvaluator",
    "Calibration",
    "CalibratedPolicy",
    "CalibrationPrompt",
    "PromptSet",
    "Target",
    "TaskOptions",
    "calibrate",
    "calibration_record",
    "prompts_from_file",
    "prompts_from_tasks",
    "write_calibrated_policy",
    "read_calibrated_policy",
]
