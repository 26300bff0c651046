"""``coterie study``: measures every table and figure of the paper on one model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from coterie.checkpoints.model_info import inspect
from coterie.cli import output
from coterie.cli.engine_options import EngineOptions
from coterie.cli.prompt_options import task_names
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import open_tasks

if TYPE_CHECKING:
    from coterie.lab.study.experiment import Experiment
    from coterie.lab.study.report import ReportSection
    from coterie.lab.study.study import ExperimentOutcome

QUICK_PROBLEMS, QUICK_PROMPTS = 64, 8
EXIT_FAILED = 1


def study(
    model: str | None = None, *, out: Path, experiment: list[str] | None = None,
    rerun: list[str] | None = None, num_problems: int | None = None, num_prompts: int | None = None,
    task: list[str] | None = None, data: Path | None = None, seed: int = 1,
    trust_code: bool = False, quick: bool = False, dtype: str | None = None, device: str = "auto",
    expert_dtype: str | None = None,
) -> int:  # fmt: skip
    """Measure every table and figure of the paper on a model, and report which claims hold.

    Writes OUT/report.html, figures and records. Called again, it measures what is missing and draws
    everything. The exit status is 1 where an experiment failed; the others are reported.

    \b
    coterie study -o runs/study
    coterie study inclusionAI/LLaDA2.0-mini --task gsm8k --num-problems 200 -o runs/mini
    coterie study -o runs/study --experiment explosion --rerun explosion
    """
    lab = output.require_extra("coterie.lab.study.study", "the study")
    lab.select_experiments([*(experiment or []), *(rerun or [])], lab.EXPERIMENTS)
    config = lab.StudyConfig(
        items=num_problems or (QUICK_PROBLEMS if quick else lab.StudyConfig.items),
        prompts=num_prompts or (QUICK_PROMPTS if quick else lab.StudyConfig.prompts),
        seed=seed,
    )
    names = task_names(task, model, data)
    per_task, family = -(-config.items // len(names)), inspect(model).family.name
    task_options = TaskOptions(family, data, count=per_task, seed=seed, trust=trust_code)
    tasks = open_tasks(names, task_options)  # raises before weights are loaded
    out.mkdir(parents=True, exist_ok=True)
    engine = EngineOptions(model, dtype, device, expert_dtype).open()
    with output.progress_bar(TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        observer = StudyProgressBar(progress)
        sections = lab.run_study(
            engine, tasks, out, config=config, observer=observer, names=experiment or (),
            rerun=rerun or (), command=output.command_line(),
        )  # fmt: skip
    output.print_parts(findings_table(sections))
    output.print_text(str(out / lab.REPORT))
    return EXIT_FAILED if any(section.failure for section in sections) else 0


def findings_table(sections: Sequence[ReportSection]) -> Table:
    """One finding a line, with the verdict on the paper's claim."""
    rows = []
    for section in sections:
        rows += [(section.name, each.verdict or "", each.text) for each in section.findings]
        rows += [(section.name, "failed", section.failure)] if section.failure else []
    return output.plain_table("experiment", "claim", "finding", rows=rows)


class StudyProgressBar:
    """One bar over all experiments, and one line for the end of each."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task_id = progress, progress.add_task("", total=None)
        self._completed, self._length, self._start, self._label = 0.0, 0.0, 0.0, ""

    def on_experiment_start(self, experiment: Experiment, selected: Sequence[Experiment]) -> None:
        index = selected.index(experiment)
        lengths = [each.text.typical_seconds for each in selected]
        self._completed, self._length = sum(lengths[:index]), lengths[index]
        self._label = f"{index + 1} of {len(selected)}, {experiment.name}"
        self._start = time.perf_counter()
        self._move(0.0, self._label, total=sum(lengths))

    def on_progress(self, share: float, activity: str) -> None:
        self._move(share, f"{self._label}: {activity}")

    def on_experiment_end(self, outcome: ExperimentOutcome) -> None:
        self._move(1.0)
        seconds, failure = time.perf_counter() - self._start, outcome.failure
        origin = "measured" if outcome.measured else "from its record"
        message = f"{origin}, {seconds:.0f} s" if failure is None else f"failed: {failure}"
        output.print_note(f"{self._label}: {message}")

    def _move(self, share: float, text: str | None = None, total: float | None = None) -> None:
        completed = self._completed + share * self._length
        self._progress.update(self._task_id, completed=completed, description=text, total=total)
