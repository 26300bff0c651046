"""``coterie grade``: grades outputs of any program."""

import json
from collections.abc import Iterator
from pathlib import Path

from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from coterie.cli.engine_options import standard_input
from coterie.cli.output import check_output_file, print_note, print_text, progress_bar
from coterie.errors import TaskError
from coterie.files import atomic_write, read_file
from coterie.lab.evals.grading import GradingJob, prepare_grading, read_outputs
from coterie.lab.evals.report import proportion
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import check_task_name
from coterie.lab.evals.tasks.source import MAX_BYTES


def grade(
    task: str, file: str, *, out: Path | None = None, data: Path | None = None,
    trust_code: bool = False,
) -> None:  # fmt: skip
    """Grade outputs of any program, as `coterie eval` grades its own.

    \b
    coterie grade gsm8k outputs.jsonl > grades.jsonl
    coterie grade humaneval outputs.jsonl --data data/ -o grades.jsonl

    \b
    in    {"id": "gsm8k/17", "output": "... 9 * 2 = 18.", "gold": "18"}
    out   {"id": "gsm8k/17", "correct": true, "extracted": "18"}

    \b
    gold       gsm8k, math500, words, algebra: the bare answer, or as in
               the data set ("... #### 1,234", "$\\frac12$",
               "\\boxed{12}"). Without one, the id is looked up.
    id         Code tasks look it up: HumanEval/0, mbpp/2,
               docstring/<seed>/<n>. Otherwise any text or number.
    extracted  The answer read out of the output; null: none.

    All lines and ids are checked before the first is graded. The grades
    have the order of the lines. The number of correct ones goes to
    standard error.
    """
    check_task_name(task)
    source = "standard input" if file == "-" else file
    content = standard_input().buffer.read() if file == "-" else read_file(Path(file), MAX_BYTES)
    outputs = read_outputs(content, source)
    check_output_file(out)
    if out is not None and file != "-" and out.exists() and out.samefile(file):
        raise TaskError(f"-o {out} would overwrite the outputs")
    job = prepare_grading(task, outputs, TaskOptions("", data=data, trust=trust_code), source)
    correct: list[bool] = []
    if out is None:
        for line in _grade_lines(job, task, correct):
            print_text(line)
    else:
        lines = [f"{line}\n" for line in _grade_lines(job, task, correct)]
        atomic_write(out, "".join(lines).encode())
    accuracy = proportion(correct)
    low, high = accuracy.interval
    share = f"{accuracy.value:.1%} (95 % interval {low:.1%} to {high:.1%})"
    print_note(f"{task}: {accuracy.successes} of {accuracy.n} correct, {share}")


def _grade_lines(job: GradingJob, task: str, correct: list[bool]) -> Iterator[str]:
    """Each grade as a line; appends to ``correct``."""
    with progress_bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task_id = progress.add_task(task, total=len(job.outputs))
        for output, grade in zip(job.outputs, job.grades(), strict=True):
            correct.append(grade.correct)
            description = f"{task} {proportion(correct).value:.1%}"
            progress.update(task_id, advance=1, description=description)
            document = {"id": output.id, "correct": grade.correct, "extracted": grade.extracted}
            yield json.dumps(document)
