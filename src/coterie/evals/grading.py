"""Outputs that were made elsewhere, graded as our own are: JSONL in, a grade for each line out."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from coterie.evals.task import Grade, Item, Task, Wish
from coterie.evals.tasks import check_name, embedded, gsm8k, math500, open_tasks
from coterie.evals.tasks.verify import require_math_verify
from coterie.naming import CoterieError
from coterie.problems import TASKS as DRAWN

MOST_DRAWN = 100_000  # of one seed
NAMED = 3  # unknown ids told at most

Grader = Callable[[str, str], Grade]  # output, gold


@dataclass(frozen=True)
class Golden:
    """A task whose gold may come with the output; ``check`` raises for a gold that is none."""

    grade: Grader
    check: Callable[[str], object]


@dataclass(frozen=True)
class Line:
    """One output, of line ``number``. ``id`` is as it was given: a text, or MBPP's number."""

    number: int
    id: str | int
    output: str
    gold: str | None


Known = Mapping[str, tuple[Task, Item]]


@dataclass(frozen=True)
class Paper:
    """What is to be graded, and what its lines are held against: their own gold, or an item."""

    lines: Sequence[Line]
    golden: Golden | None
    known: Known

    def grades(self) -> Iterator[Grade]:
        """In the order of the lines, some at a time: what is slow runs in processes beside."""
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        try:
            yield from pool.map(self._grade, self.lines)
        finally:
            pool.shutdown(cancel_futures=True)

    def _grade(self, line: Line) -> Grade:
        if self.golden is not None and line.gold is not None:
            return self.golden.grade(line.output, line.gold)
        task, item = self.known[_key(line.id)]
        return task.grade(line.output, item)


def read_lines(text: str, where: str) -> list[Line]:
    """Every line, or a CoterieError that names the first that cannot be read."""
    lines = [
        _line(number, written, where)
        for number, written in enumerate(text.split("\n"), start=1)
        if written.strip()
    ]
    if not lines:
        raise CoterieError(f"{where}: empty; expected lines of id, output and gold")
    return lines


def prepare(task: str, lines: Sequence[Line], wish: Wish, where: str) -> Paper:
    """Finds what every line is held against, before any is graded.

    A line's own gold comes first, where the task has one that can be told; else its id is looked
    up. Raises CoterieError by line for a gold that is none, and names unknown ids.
    """
    check_name(task)
    golden = GOLDEN.get(task)
    asked = [line for line in lines if golden is None or line.gold is None]
    known = _known(task, asked, wish) if asked else {}
    unknown = [line for line in asked if _key(line.id) not in known]
    if unknown:
        raise CoterieError(_unknown(task, unknown, known, where))
    if golden is not None:
        for line in lines:
            _check(golden, line, where)
        if task == "math500":
            require_math_verify()
    return Paper(lines, golden, known)


def _line(number: int, written: str, where: str) -> Line:
    place = f"{where}, line {number}"
    try:
        row = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise CoterieError(f"{place}: not JSON, or cut off ({error})") from None
    if not isinstance(row, dict):
        raise CoterieError(f"{place}: not an object with id, output and gold")
    for key in ("id", "output"):
        if key not in row:
            raise CoterieError(f"{place}: {key!r} is missing; a line has id, output and gold")
    name, output, gold = row["id"], row["output"], row.get("gold")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise CoterieError(f"{place}: 'id' is neither a text nor a whole number")
    if not isinstance(output, str):
        raise CoterieError(f"{place}: 'output' is not a text")
    if isinstance(gold, bool) or not isinstance(gold, str | int | float | None):
        raise CoterieError(f"{place}: 'gold' is neither a text nor a number")
    return Line(number, name, output, None if gold is None else str(gold))


def _check(golden: Golden, line: Line, where: str) -> None:
    if line.gold is None:
        return
    try:
        golden.check(line.gold)
    except CoterieError as error:
        raise CoterieError(f"{where}, line {line.number}: gold {error}") from None


def _known(task: str, lines: Sequence[Line], wish: Wish) -> Known:
    """Every name under which an item may be asked for: "HumanEval/0", "humaneval/0", "0"."""
    known: dict[str, tuple[Task, Item]] = {}
    for opened in _drawn(task, lines, wish) if task in DRAWN else open_tasks([task], wish):
        for item in opened.items():
            bare = item.id.partition("/")[2] or item.id
            for name in (item.id, bare, f"{task}/{bare}"):
                known.setdefault(_key(name), (opened, item))
    return known


def _drawn(task: str, lines: Sequence[Line], wish: Wish) -> Iterator[Task]:
    """The package's own problems are drawn again: "words/7/19" is the twentieth of seed 7."""
    counts: dict[int, int] = defaultdict(int)
    for line in lines:
        parts = str(line.id).split("/")
        if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
            seed, number = int(parts[1]), int(parts[2])
            if number < MOST_DRAWN:
                counts[seed] = max(counts[seed], number + 1)
    for seed, count in counts.items():
        yield from open_tasks([task], Wish(wish.family, count=count, seed=seed, trust=wish.trust))


def _key(name: str | int) -> str:
    return str(name).casefold()


def _unknown(task: str, unknown: Sequence[Line], known: Known, where: str) -> str:
    names = [item.id for _, item in known.values()]
    told = ", ".join(f"{line.id!r} (line {line.number})" for line in unknown[:NAMED])
    more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
    gold = "; or give the lines a gold" if task in GOLDEN else ""
    known_as = f"known are {names[0]} to {names[-1]}" if names else f"as in {task}/<seed>/<n>"
    return f"{where}: {task} has no item {told}{more}; {known_as}{gold}"


def _some(gold: str) -> None:
    if not gold.strip():
        raise CoterieError("is empty")


GOLDEN: dict[str, Golden] = {
    "gsm8k": Golden(gsm8k.grade, gsm8k.gold_value),
    "math500": Golden(math500.grade, _some),
    "words": Golden(partial(embedded.grade, "words"), partial(embedded.bare, "words")),
    "algebra": Golden(partial(embedded.grade, "algebra"), partial(embedded.bare, "algebra")),
}
