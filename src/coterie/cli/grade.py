"""``coterie grade``: right or wrong, for outputs that were made elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from coterie.cli.tables import print_note, print_text, progress_bar
from coterie.errors import CoterieError
from coterie.lab.evals.grading import GradingJob, prepare_grading, read_outputs
from coterie.lab.evals.report import proportion
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import TASKS, check_task_name

TaskName = Annotated[
    str, typer.Argument(metavar="TASK", help=f"Of {', '.join(TASKS)}.", show_default=False)
]
OutputsFile = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="JSONL of outputs; - reads standard input.", show_default=False
    ),
]
GradesFile = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="File for the grades. Default: standard output."),
]
DataPath = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Where ids are looked up: the benchmark's file, its folder, or the folder above. "
        "Default: the folder that $COTERIE_DATA names, else the hub.",
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-generated-code",
        help="Run generated code even where no sandbox can be had.",
    ),
]


def grade_command(
    task: TaskName,
    file: OutputsFile,
    *,
    out: GradesFile = None,
    data: DataPath = None,
    trust_code: TrustCode = False,
) -> None:
    """Grade outputs that were made elsewhere, as `coterie eval` grades its own.

    \b
    coterie grade gsm8k outputs.jsonl > grades.jsonl
    coterie grade humaneval outputs.jsonl --data data/ -o grades.jsonl

    \b
    in    {"id": "gsm8k/17", "output": "... 9 * 2 = 18.", "gold": "18"}
    out   {"id": "gsm8k/17", "correct": true, "extracted": "18"}

    \b
    gold       gsm8k, math500, words, algebra: the bare answer, or as the
               data set has it ("... #### 1,234", "$\\frac12$",
               "\\boxed{12}"). Without one, the id is looked up.
    id         Code tasks look it up: HumanEval/0, mbpp/2,
               docstring/<seed>/<n>. Otherwise any text or number.
    extracted  What was read out of the output; null: nothing.

    Every line is read, and each id found, before the first is graded.
    The grades come in the order of the lines; how many are right is told
    on standard error.
    """
    check_task_name(task)
    source = "standard input" if file == "-" else file
    outputs = read_outputs(_read_text(file), source)
    if out is not None:
        _check_output(out, file)
    job = prepare_grading(task, outputs, TaskOptions("", data=data, trust=trust_code), source)
    correct: list[bool] = []
    if out is None:
        for grade_line in _grade_lines(job, task, correct):
            print_text(grade_line)
    else:
        _write_atomically(out, _grade_lines(job, task, correct))
    accuracy = proportion(correct)
    low, high = accuracy.interval
    print_note(
        f"{task}: {accuracy.successes} of {accuracy.n} right, {accuracy.value:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%})"
    )


def _read_text(file: str) -> str:
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise CoterieError(f"{file}, line {line}: not UTF-8") from None


def _grade_lines(job: GradingJob, task: str, correct: list[bool]) -> Iterator[str]:
    """Every grade as it is written, while ``right`` grows and the bar moves."""
    with progress_bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task_id = progress.add_task(task, total=len(job.outputs))
        for output, grade in zip(job.outputs, job.grades(), strict=True):
            correct.append(grade.correct)
            progress.update(
                task_id, advance=1, description=f"{task} {proportion(correct).value:.1%}"
            )
            document = {"id": output.id, "correct": grade.correct, "extracted": grade.extracted}
            yield json.dumps(document)


def _check_output(out: Path, file: str) -> None:
    """Fails now, not after an hour of running code."""
    if not out.parent.is_dir():
        raise CoterieError(f"{out.parent}: no such folder")
    if out.is_dir():
        raise CoterieError(f"{out}: a folder; -o names a file")
    if file != "-" and out.exists() and out.samefile(file):
        raise CoterieError(f"-o {out} would overwrite the outputs")


def _write_atomically(out: Path, lines: Iterator[str]) -> None:
    """All or nothing: what ``out`` held before stays until the last line is there."""
    with NamedTemporaryFile("w", dir=out.parent, prefix=f".{out.name}.", delete=False) as file:
        try:
            for line in lines:
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).chmod(0o666 & ~_current_umask())
    Path(file.name).replace(out)


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
