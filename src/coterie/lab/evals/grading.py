"""Outputs that were made elsewhere, graded as our own are: JSONL in, a grade for each line out."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from coterie.errors import CoterieError
from coterie.lab.evals.task import Grade, Item, Task, TaskOptions
from coterie.lab.evals.tasks import check_task_name, embedded, gsm8k, math500, open_tasks
from coterie.lab.evals.tasks.verify import require_math_verify
from coterie.lab.problems import PROBLEM_MAKERS as DRAWN

MAX_GENERATED = 100_000  # of one seed
MAX_IDS_SHOWN = 3  # unknown ids told at most

Grader = Callable[[str, str], Grade]  # output, gold


@dataclass(frozen=True)
class GoldGrader:
    """A task whose gold may come with the output; ``check`` raises for a gold that is none."""

    grade: Grader
    check: Callable[[str], object]


@dataclass(frozen=True)
class OutputToGrade:
    """One output, of line ``number``. ``id`` is as it was given: a text, or MBPP's number."""

    number: int
    id: str | int
    output: str
    gold: str | None


ItemIndex = Mapping[str, tuple[Task, Item]]


@dataclass(frozen=True)
class GradingJob:
    """What is to be graded, and what its lines are held against: their own gold, or an item."""

    outputs: Sequence[OutputToGrade]
    gold_grader: GoldGrader | None
    items: ItemIndex

    def grades(self) -> Iterator[Grade]:
        """In the order of the lines, some at a time: what is slow runs in processes beside."""
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        try:
            yield from pool.map(self._grade, self.outputs)
        finally:
            pool.shutdown(cancel_futures=True)

    def _grade(self, output: OutputToGrade) -> Grade:
        if self.gold_grader is not None and output.gold is not None:
            return self.gold_grader.grade(output.output, output.gold)
        task, item = self.items[_normalize_id(output.id)]
        return task.grade(output.output, item)


def read_outputs(text: str, source: str) -> list[OutputToGrade]:
    """Every line, or a CoterieError that names the first that cannot be read."""
    outputs = [
        _parse_output(number, line, source)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not outputs:
        raise CoterieError(f"{source}: empty; expected lines of id, output and gold")
    return outputs


def prepare_grading(
    task: str, outputs: Sequence[OutputToGrade], options: TaskOptions, source: str
) -> GradingJob:
    """Finds what every line is held against, before any is graded.

    A line's own gold comes first, where the task has one that can be told; else its id is looked
    up. Raises CoterieError by line for a gold that is none, and names unknown ids.
    """
    check_task_name(task)
    gold_grader = GOLD_GRADERS.get(task)
    without_gold = [output for output in outputs if gold_grader is None or output.gold is None]
    items = _index_items(task, without_gold, options) if without_gold else {}
    unknown = [output for output in without_gold if _normalize_id(output.id) not in items]
    if unknown:
        raise CoterieError(_unknown_ids_message(task, unknown, items, source))
    if gold_grader is not None:
        for output in outputs:
            _check_gold(gold_grader, output, source)
        if task == "math500":
            require_math_verify()
    return GradingJob(outputs, gold_grader, items)


def _parse_output(number: int, line: str, source: str) -> OutputToGrade:
    position = f"{source}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CoterieError(f"{position}: not JSON, or cut off ({error})") from None
    if not isinstance(row, dict):
        raise CoterieError(f"{position}: not an object with id, output and gold")
    for key in ("id", "output"):
        if key not in row:
            raise CoterieError(f"{position}: {key!r} is missing; a line has id, output and gold")
    name, output, gold = row["id"], row["output"], row.get("gold")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise CoterieError(f"{position}: 'id' is neither a text nor a whole number")
    if not isinstance(output, str):
        raise CoterieError(f"{position}: 'output' is not a text")
    if isinstance(gold, bool) or not isinstance(gold, str | int | float | None):
        raise CoterieError(f"{position}: 'gold' is neither a text nor a number")
    return OutputToGrade(number, name, output, None if gold is None else str(gold))


def _check_gold(gold_grader: GoldGrader, output: OutputToGrade, source: str) -> None:
    if output.gold is None:
        return
    try:
        gold_grader.check(output.gold)
    except CoterieError as error:
        raise CoterieError(f"{source}, line {output.number}: gold {error}") from None


def _index_items(task: str, outputs: Sequence[OutputToGrade], options: TaskOptions) -> ItemIndex:
    """Every name under which an item may be asked for: "HumanEval/0", "humaneval/0", "0"."""
    index: dict[str, tuple[Task, Item]] = {}
    for benchmark in (
        _generated_tasks(task, outputs, options) if task in DRAWN else open_tasks([task], options)
    ):
        for item in benchmark.items():
            short_id = item.id.partition("/")[2] or item.id
            for name in (item.id, short_id, f"{task}/{short_id}"):
                index.setdefault(_normalize_id(name), (benchmark, item))
    return index


def _generated_tasks(
    task: str, outputs: Sequence[OutputToGrade], options: TaskOptions
) -> Iterator[Task]:
    """The package's own problems are drawn again: "words/7/19" is the twentieth of seed 7."""
    counts: dict[int, int] = defaultdict(int)
    for output in outputs:
        parts = str(output.id).split("/")
        if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
            seed, number = int(parts[1]), int(parts[2])
            if number < MAX_GENERATED:
                counts[seed] = max(counts[seed], number + 1)
    for seed, count in counts.items():
        yield from open_tasks(
            [task], TaskOptions(options.family, count=count, seed=seed, trust=options.trust)
        )


def _normalize_id(name: str | int) -> str:
    return str(name).casefold()


def _unknown_ids_message(
    task: str, unknown: Sequence[OutputToGrade], items: ItemIndex, source: str
) -> str:
    names = [item.id for _, item in items.values()]
    shown = ", ".join(f"{output.id!r} (line {output.number})" for output in unknown[:MAX_IDS_SHOWN])
    more = f" and {len(unknown) - MAX_IDS_SHOWN} more" if len(unknown) > MAX_IDS_SHOWN else ""
    gold = "; or give the lines a gold" if task in GOLD_GRADERS else ""
    expected = f"known are {names[0]} to {names[-1]}" if names else f"as in {task}/<seed>/<n>"
    return f"{source}: {task} has no item {shown}{more}; {expected}{gold}"


def _check_not_empty(gold: str) -> None:
    if not gold.strip():
        raise CoterieError("is empty")


GOLD_GRADERS: dict[str, GoldGrader] = {
    "gsm8k": GoldGrader(gsm8k.grade, gsm8k.gold_value),
    "math500": GoldGrader(math500.grade, _check_not_empty),
    "words": GoldGrader(partial(embedded.grade, "words"), partial(embedded.gold_number, "words")),
    "algebra": GoldGrader(
        partial(embedded.grade, "algebra"), partial(embedded.gold_number, "algebra")
    ),
}
