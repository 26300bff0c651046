"""``coterie study``: every table and figure of the paper, on one model, as one page."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from coterie.checkpoints.model_info import inspect
from coterie.checkpoints.source import EMBEDDED
from coterie.cli import options as o
from coterie.cli.engine_options import open_engine
from coterie.cli.eval_options import DataPath, Seed, Tasks, TrustCode
from coterie.cli.eval_train import task_names
from coterie.cli.tables import console, plain_table, print_note, print_text, progress_bar
from coterie.errors import CoterieError
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import TASKS, open_tasks

if TYPE_CHECKING:
    from coterie.lab.study.experiment import Experiment
    from coterie.lab.study.report import ReportSection
    from coterie.lab.study.study import ExperimentOutcome

QUICK_PROBLEMS, QUICK_PROMPTS = 64, 8
EXIT_FAILED = 1

StudyModel = Annotated[
    str | None,
    typer.Argument(help="A folder or a hub id. Default: the model in the package."),
]
OutputFolder = Annotated[
    Path, typer.Option("--out", "-o", help="Folder for report, records, figures and answers.")
]
Experiments = Annotated[
    list[str] | None,
    typer.Option("--chapter", help="Only this one; may be repeated. Default: all."),
]
Rerun = Annotated[
    list[str] | None,
    typer.Option("--again", help="Measure this chapter although its record is there."),
]
NumProblems = Annotated[
    int | None,
    typer.Option("--items", min=1, help="Questions for each policy, of all tasks; default 500."),
]
NumPrompts = Annotated[
    int | None,
    typer.Option(
        "--prompts", min=1, help="Questions where single forwards are watched; default 32."
    ),
]
QuickRun = Annotated[
    bool,
    typer.Option("--quick", help=f"A first look: {QUICK_PROBLEMS} and {QUICK_PROMPTS} questions."),
]


def study(
    model: StudyModel = None,
    *,
    out: OutputFolder,
    experiments: Experiments = None,
    rerun: Rerun = None,
    num_problems: NumProblems = None,
    num_prompts: NumPrompts = None,
    tasks: Tasks = None,
    data: DataPath = None,
    seed: Seed = 1,
    trust_code: TrustCode = False,
    quick: QuickRun = False,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    expert_dtype: o.ExpertDtype = None,
) -> int:
    """Measure every table and figure of the paper on a model, and report what holds.

    Writes OUT/report.html, which needs nothing else, and the figures and records beside it. What
    is measured is kept: called again, only what is missing is measured, and everything is drawn
    anew. Ends in 1 where a chapter failed; the others stand.

    \b
    coterie study -o runs/study
    coterie study inclusionAI/LLaDA2.0-mini --task gsm8k --items 200 -o runs/mini
    coterie study -o runs/study --chapter explosion --again explosion
    """
    study_module = load_study()
    study_module.select_experiments(
        [*(experiments or []), *(rerun or [])], study_module.EXPERIMENTS
    )
    config = study_module.StudyConfig(
        items=num_problems or (QUICK_PROBLEMS if quick else study_module.StudyConfig.items),
        prompts=num_prompts or (QUICK_PROMPTS if quick else study_module.StudyConfig.prompts),
        seed=seed,
    )
    names = known_tasks(model, tasks, data)
    per_task = -(-config.items // len(names))
    task_options = TaskOptions(
        inspect(model).family.name, data, count=per_task, seed=seed, trust=trust_code
    )
    open_task_list = open_tasks(names, task_options)  # fails here, before weights are loaded
    out.mkdir(parents=True, exist_ok=True)
    engine = open_engine(model, dtype=dtype, device=device, expert_dtype=expert_dtype)
    with progress_bar(TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        sections = study_module.run_study(
            engine,
            open_task_list,
            out,
            config=config,
            observer=StudyProgressBar(progress, study_module.TYPICAL_SECONDS),
            names=experiments or (),
            rerun=rerun or (),
            command=["coterie", *sys.argv[1:]],
        )
    console().print(findings_table(sections))
    print_text(str(out / study_module.REPORT))
    return EXIT_FAILED if any(section.failure for section in sections) else 0


def load_study() -> ModuleType:
    """The module ``coterie.lab.study.study``; here and not above, for matplotlib is of an extra."""
    try:
        return import_module("coterie.lab.study.study")
    except ModuleNotFoundError as error:
        raise CoterieError(
            f"the study needs {error.name}, which is not installed: pip install 'coterie[lab]'"
        ) from None


def known_tasks(model: str | None, tasks: Sequence[str] | None, data: Path | None) -> list[str]:
    """The tasks as typed; the model in the package has its own."""
    is_embedded = model in (None, EMBEDDED)
    if not tasks and not is_embedded:
        raise CoterieError(f"which questions shall {model} answer? Give --task: {', '.join(TASKS)}")
    return task_names(tasks, is_embedded=is_embedded, num_problems=None, data=data)


def findings_table(sections: Sequence[ReportSection]) -> Table:
    """One finding a line, with its verdict on the paper's claim."""
    table = plain_table("chapter", "claim", "found")
    for section in sections:
        for finding in section.findings:
            table.add_row(section.name, finding.verdict or "", finding.text)
        if section.failure:
            table.add_row(section.name, "failed", section.failure)
    return table


class StudyProgressBar:
    """Moves one bar over all chapters, each as long as it usually takes; where there is none, a
    line for each chapter's end."""

    def __init__(self, progress: Progress, usual_seconds: Mapping[str, int]) -> None:
        self._progress, self._usual_seconds = progress, usual_seconds
        self._task_id: TaskID | None = None
        self._completed, self._length, self._start = 0.0, 0.0, 0.0
        self._label = ""

    def on_experiment_start(self, experiment: Experiment, selected: Sequence[Experiment]) -> None:
        index, sizes = (
            selected.index(experiment),
            [self._expected_seconds(other) for other in selected],
        )
        if self._task_id is None:
            self._task_id = self._progress.add_task("", total=sum(sizes))
        self._completed, self._length = sum(sizes[:index]), sizes[index]
        self._label = f"{index + 1} of {len(selected)}, {experiment.name}"
        self._start = time.perf_counter()
        self._progress.update(self._task_id, completed=self._completed, description=self._label)

    def on_progress(self, share: float, activity: str) -> None:
        if self._task_id is not None:
            completed = self._completed + share * self._length
            self._progress.update(
                self._task_id, completed=completed, description=f"{self._label}: {activity}"
            )

    def on_experiment_end(self, outcome: ExperimentOutcome) -> None:
        if self._task_id is not None:
            self._progress.update(self._task_id, completed=self._completed + self._length)
        seconds = time.perf_counter() - self._start
        origin = "measured" if outcome.measured else "kept"
        message = (
            f"{origin}, {seconds:.0f} s"
            if outcome.failure is None
            else f"failed: {outcome.failure}"
        )
        print_note(f"{self._label}: {message}")

    def _expected_seconds(self, experiment: Experiment) -> int:
        return self._usual_seconds.get(experiment.name, 30)
