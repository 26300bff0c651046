"""Calibration: finds the parameter of a policy family that meets a target on given prompts.

>>> import coterie
>>> from coterie.lab.calibration import PolicyEvaluator, TaskOptions, calibrate, prompts_from_tasks
>>> prompts = prompts_from_tasks(["words"], 20, TaskOptions(family="llada2", seed=1))
>>> calibrate(PolicyEvaluator(coterie.load(), prompts), "des-vote", "experts=38").policy
"""

from coterie.lab.calibration.calibration import Calibration, calibrate
from coterie.lab.calibration.measurement import PolicyEvaluator
from coterie.lab.calibration.policy_file import (
    CalibratedPolicy,
    calibration_record,
    evaluation_conditions,
    read_calibrated_policy,
)
from coterie.lab.calibration.prompts import (
    CalibrationPrompt,
    PromptSet,
    prompts_from_file,
    prompts_from_tasks,
    prompts_from_texts,
)
from coterie.lab.calibration.target import Target
from coterie.lab.evals.task import TaskOptions

__all__ = [
    "CalibratedPolicy", "Calibration", "CalibrationPrompt", "PolicyEvaluator", "PromptSet",
    "Target", "TaskOptions", "calibrate", "calibration_record", "evaluation_conditions",
    "prompts_from_file", "prompts_from_tasks", "prompts_from_texts", "read_calibrated_policy",
]  # fmt: skip
