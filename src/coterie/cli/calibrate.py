"""``coterie calibrate``: the parameter of a policy family that meets a target on given prompts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from coterie.checkpoints.model_info import inspect
from coterie.checkpoints.source import EMBEDDED
from coterie.cli import eval_options as e
from coterie.cli import options as o
from coterie.cli.engine_options import GenerationOptions, check_options, greedy_options, open_engine
from coterie.cli.json_output import print_document
from coterie.cli.memory_options import expert_memory_config, resolve_batch_size
from coterie.cli.option_groups import option_group
from coterie.cli.tables import console, plain_table, print_note, progress_bar
from coterie.errors import CoterieError
from coterie.lab.calibration import (
    Calibration,
    PolicyEvaluator,
    PromptSet,
    Target,
    calibrate,
    calibration_record,
    prompts_from_file,
    prompts_from_tasks,
    write_calibrated_policy,
)
from coterie.lab.calibration.calibration import check_target
from coterie.lab.calibration.measurement import PolicyRun, PromptProgressCallback
from coterie.lab.calibration.search_space import SearchFamily
from coterie.lab.calibration.target import Estimate
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import TASKS
from coterie.lab.problems import PROBLEM_MAKERS as OWN
from coterie.loading.expert_memory import ExpertMemoryConfig

DEFAULT_PROBLEMS = 40  # of each task

PolicyFamily = Annotated[
    str,
    typer.Argument(
        metavar="FAMILY",
        help="A policy without the option that is searched for: des-vote:voters=before-eos; "
        "or with ? in its place: coreset:m=?,vote=weight.",
    ),
]
TargetSpec = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="KIND=VALUE",
        help="experts=38 (a layer, at most), mass=0.9 (of the votes, at least), loss=0.05 "
        "(of a layer's output, squared, at most) or drop=0.01 (of accuracy, at most).",
    ),
]
Confident = Annotated[
    bool, typer.Option("--sure", help="The far end of the 95 % interval must meet it too.")
]
PerLayer = Annotated[
    bool, typer.Option("--per-layer", help="A budget for each layer, by marginal votes.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help='A file of prompts, one a line, or JSONL with "prompt"; in place of --task.',
        rich_help_panel=e.BENCHMARK_PANEL,
        show_default=False,
    ),
]
NumProblems = Annotated[
    int,
    typer.Option("--items", min=1, help="Prompts of each task.", rich_help_panel=e.BENCHMARK_PANEL),
]
ProblemSeed = Annotated[
    int,
    typer.Option("--seed", min=0, help="Of the prompts drawn.", rich_help_panel=e.BENCHMARK_PANEL),
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="A JSON file, which --policy @FILE takes.",
        rich_help_panel=o.OUTPUT_PANEL,
        show_default=False,
    ),
]


@option_group(memory=expert_memory_config, options=greedy_options)
def calibrate_command(
    family: PolicyFamily,
    *,
    target: TargetSpec,
    confident: Confident = False,
    per_layer: PerLayer = False,
    task: e.Tasks = None,
    prompt_file: PromptFile = None,
    num_problems: NumProblems = DEFAULT_PROBLEMS,
    seed: ProblemSeed = 1,
    data: e.DataPath = None,
    shots: e.NumShots = None,
    options: GenerationOptions,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    expert_dtype: o.ExpertDtype = None,
    memory: ExpertMemoryConfig | None = None,
    batch_size: e.BatchSize = None,
    trust_code: e.TrustCode = False,
    out: OutputFile = None,
    json: o.JsonOutput = False,
) -> None:
    """Find the parameter of a policy family that meets a target and saves as much as it can.

    The prompts are problems that no exam draws, a benchmark's items, or your own. Where not all
    experts are in memory, the memory is emptied before each.

    \b
    coterie calibrate des-vote:voters=before-eos,protect=top1 --target drop=0.01 -o found.json
    coterie generate "..." --policy @found.json
    """
    search_family, parsed_target = (
        SearchFamily.parse(family),
        Target.parse(target, confident=confident),
    )
    check_output_file(out)
    task_options = TaskOptions(
        inspect(model).family.name, data, shots, num_problems, seed, trust_code
    )
    prompt_set = load_questions(
        task, prompt_file, task_options, is_embedded=model in (None, EMBEDDED)
    )
    effective_batch_size = resolve_batch_size(batch_size, memory, e.DEFAULT_BATCH_SIZE)
    engine = open_engine(
        model, dtype=dtype, device=device, expert_dtype=expert_dtype, memory=memory
    )
    check_options(engine, options)
    with progress_bar(MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        bench = PolicyEvaluator(
            engine, prompt_set, options, effective_batch_size, _progress_callback(progress)
        )
        check_target(bench, search_family, parsed_target)
        calibration = calibrate(bench, search_family, parsed_target, per_layer=per_layer)
    content = calibration_record(bench, calibration, ["coterie", *sys.argv[1:]])
    if out is not None:
        write_calibrated_policy(out, content)
        print_note(f"{out}; --policy @{out} takes it")
    if json:
        print_document(content)
    else:
        console().print(calibration_table(calibration), *summary_lines(calibration), sep="\n")


def check_output_file(out: Path | None) -> None:
    """Raises for a file that could not be written, now and not after the search."""
    if out is None:
        return
    if out.is_dir():
        raise CoterieError(f"{out}: is a folder; give a file in it, such as {out / 'found.json'}")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise CoterieError(f"{out}: its folder is not there")
    if not os.access(folder, os.W_OK):
        raise CoterieError(f"{out}: its folder cannot be written to")


def load_questions(
    tasks: Sequence[str] | None,
    prompt_file: Path | None,
    task_options: TaskOptions,
    *,
    is_embedded: bool,
) -> PromptSet:
    """What is asked; says so where an exam would ask the same."""
    if tasks and prompt_file:
        raise CoterieError("--prompts stands in place of --task; give one of them")
    if prompt_file is not None:
        return prompts_from_file(prompt_file)
    if not tasks and not is_embedded:
        raise CoterieError(f"--task or --prompts is needed with --model; of {', '.join(TASKS)}")
    task_questions = prompts_from_tasks(
        list(dict.fromkeys(tasks or OWN)), task_options.count, task_options
    )
    if task_questions.includes_test_items:
        print_note(
            "these are a benchmark's own items: an exam on them is not held out any more; "
            "--data or --prompts takes others"
        )
    return task_questions


def calibration_table(calibration: Calibration) -> Table:
    """What was measured, in the ladder's order of traffic; then vanilla and the policy found."""
    meaning = calibration.target.spec
    columns = (meaning.description, "95 %", "meets it")
    table = plain_table("policy", *columns, number_columns=columns[:2])
    for step in calibration.steps:
        table.add_row(
            step.policy,
            *format_reading(step.estimate),
            "yes" if calibration.target.is_met(step.estimate) else "no",
        )
    return table


def format_reading(reading: Estimate) -> tuple[str, str]:
    low, high = reading.interval
    return f"{reading.value:.4g}", f"{low:.4g} to {high:.4g}"


def summary_lines(calibration: Calibration) -> list[str]:
    """The policy, what it costs, and what is doubtful, in lines."""
    value, interval = format_reading(calibration.achieved)
    noun = calibration.target.spec.description
    lines = [
        "",
        f"{calibration.policy} meets {calibration.target}: {noun} {value} ({interval}) "
        f"on {calibration.achieved.n} prompts",
        f"decoding them takes {describe_run(calibration.run)}; vanilla, {describe_run(calibration.vanilla)}",
    ]
    if not calibration.is_monotonic:
        lines.append(
            f"{noun} does not move one way along this ladder: another policy on it may do as well"
        )
    return lines


def describe_run(run: PolicyRun) -> str:
    score = f", {sum(run.correct)} of {len(run.correct)} right" if run.correct else ""
    experts = run.experts_estimate().value
    return f"{experts:.1f} experts a layer, {run.forwards_per_block:.2f} forwards a block{score}"


def _progress_callback(progress: Progress) -> PromptProgressCallback:
    """One bar, which begins anew with every measurement."""
    task = progress.add_task("", total=None)
    measurements = 0

    def on_progress(label: str, completed: int, total: int) -> None:
        nonlocal measurements
        measurements += completed == 0
        progress.update(
            task, completed=completed, total=total, description=f"{measurements}. {label}"
        )

    return on_progress
