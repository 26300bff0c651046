"""Grading of outputs from elsewhere: JSON lines in, one grade per line out."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from coterie.errors import TaskError
from coterie.lab.evals.task import Grade, Item, Task, TaskOptions
from coterie.lab.evals.tasks import check_task_name, embedded, gsm8k, math500, open_tasks
from coterie.lab.evals.tasks.source import decode_text, json_lines
from coterie.lab.evals.tasks.verify import require_math_verify
from coterie.lab.problems import PROBLEM_MAKERS

MAX_GENERATED = 100_000  # items of one seed
MAX_IDS_SHOWN = 3
EXPECTED_LINE = "lines with id, output and gold"
OUTPUT_KINDS = {
    "id": (str | int, "neither a string nor an integer"),
    "output": (str, "not a string"),
    "gold": (str | int | float | None, "neither a string nor a number"),
}


@dataclass(frozen=True)
class GoldGrader:
    """Grading against a gold that comes with the output; ``check`` raises for an invalid gold."""

    grade: Callable[[str, str], Grade]  # output, gold
    check: Callable[[str], object]


@dataclass(frozen=True)
class OutputToGrade:
    """The output of line ``number``. ``id`` is as in the file: a string, or MBPP's number."""

    number: int
    id: str | int
    output: str
    gold: str | None


ItemIndex = Mapping[str, tuple[Task, Item]]


@dataclass(frozen=True)
class GradingJob:
    """Outputs, and the grading of each against the gold of its line, or the item with its id."""

    outputs: Sequence[OutputToGrade]
    graders: Sequence[Callable[[], Grade]]

    def grades(self) -> Iterator[Grade]:
        """Grades in the order of the lines, several at a time."""
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        try:
            yield from pool.map(lambda grade: grade(), self.graders)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_outputs(content: bytes, source: str) -> list[OutputToGrade]:
    """Parses all lines; raises TaskError with the first line that cannot be read."""
    lines = json_lines(decode_text(content, source, EXPECTED_LINE), source, EXPECTED_LINE)
    outputs = [_parse_output(number, row, source) for number, row in lines]
    if not outputs:
        raise TaskError(f"{source}: empty; expected {EXPECTED_LINE}")
    return outputs


def prepare_grading(
    task: str, outputs: Sequence[OutputToGrade], options: TaskOptions, source: str
) -> GradingJob:
    """Resolves the reference of every line before any is graded.

    A line's own gold is used if the task can grade with it; otherwise the item with its id. Raises
    TaskError for an invalid gold, with its line, and for unknown ids.
    """
    check_task_name(task)
    by_gold = GOLD_GRADERS.get(task)
    without_gold = [output for output in outputs if by_gold is None or output.gold is None]
    items = _index_items(task, without_gold, options) if without_gold else {}
    unknown = [output for output in without_gold if _normalize_id(output.id) not in items]
    if unknown:
        raise TaskError(_unknown_ids_message(task, unknown, items, source))
    graders: list[Callable[[], Grade]] = []
    for output in outputs:
        if by_gold is None or output.gold is None:
            benchmark, item = items[_normalize_id(output.id)]
            graders.append(partial(benchmark.grade, output.output, item))
            continue
        try:
            by_gold.check(output.gold)
        except TaskError as error:
            raise TaskError(f"{source}, line {output.number}: gold {error}") from None
        graders.append(partial(by_gold.grade, output.output, output.gold))
    if task == "math500":
        require_math_verify()
    return GradingJob(outputs, graders)


def _parse_output(number: int, row: Any, source: str) -> OutputToGrade:
    position = f"{source}, line {number}"
    if not isinstance(row, dict):
        raise TaskError(f"{position}: not an object; expected {EXPECTED_LINE}")
    for key, (kind, message) in OUTPUT_KINDS.items():
        if key not in row and key != "gold":
            raise TaskError(f"{position}: {key!r} is missing; expected {EXPECTED_LINE}")
        if isinstance(row.get(key), bool) or not isinstance(row.get(key), kind):
            raise TaskError(f"{position}: {key!r} is {message}")
    gold = row.get("gold")
    return OutputToGrade(number, row["id"], row["output"], None if gold is None else str(gold))


def _index_items(task: str, outputs: Sequence[OutputToGrade], options: TaskOptions) -> ItemIndex:
    """Items by every accepted form of their id: "HumanEval/0", "humaneval/0", "0"."""
    generated = task in PROBLEM_MAKERS
    tasks = _generated_tasks(task, outputs, options) if generated else open_tasks([task], options)
    index: dict[str, tuple[Task, Item]] = {}
    for benchmark in tasks:
        for item in benchmark.items():
            short_id = item.id.partition("/")[2] or item.id
            for name in (item.id, short_id, f"{task}/{short_id}"):
                index.setdefault(_normalize_id(name), (benchmark, item))
    return index


def _generated_tasks(
    task: str, outputs: Sequence[OutputToGrade], options: TaskOptions
) -> Iterator[Task]:
    """Regenerates the embedded model's items: "words/7/19" is number 19 of seed 7."""
    counts: dict[int, int] = defaultdict(int)
    for output in outputs:
        parts = str(output.id).split("/")
        if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
            seed, number = int(parts[1]), int(parts[2])
            if number < MAX_GENERATED:
                counts[seed] = max(counts[seed], number + 1)
    for seed, count in counts.items():
        yield from open_tasks([task], replace(options, data=None, count=count, seed=seed))


def _normalize_id(id: str | int) -> str:
    return str(id).casefold()


def _unknown_ids_message(
    task: str, unknown: Sequence[OutputToGrade], items: ItemIndex, source: str
) -> str:
    ids = [item.id for _, item in items.values()]
    shown = ", ".join(f"{output.id!r} (line {output.number})" for output in unknown[:MAX_IDS_SHOWN])
    more = f" and {len(unknown) - MAX_IDS_SHOWN} more" if len(unknown) > MAX_IDS_SHOWN else ""
    expected = f"known are {ids[0]} to {ids[-1]}" if ids else f"an id is {task}/<seed>/<n>"
    gold = "; or add a gold to each line" if task in GOLD_GRADERS else ""
    return f"{source}: {task} has no item {shown}{more}; {expected}{gold}"


def _check_not_empty(gold: str) -> None:
    if not gold.strip():
        raise TaskError("is empty")


GOLD_GRADERS = {
    "gsm8k": GoldGrader(gsm8k.grade, gsm8k.gold_value),
    "math500": GoldGrader(math500.grade, _check_not_empty),
} | {
    name: GoldGrader(partial(embedded.grade, name), partial(embedded.gold_number, name))
    for name in embedded.ANSWER_PATTERNS
}
