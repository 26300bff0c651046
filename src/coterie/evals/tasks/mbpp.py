"""MBPP: small Python functions from a sentence and tests (Austin et al., arXiv 2108.07732)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coterie.evals.task import Grade, Item, Wish
from coterie.evals.tasks import code
from coterie.evals.tasks.source import Published, Row, Source, read, texts
from coterie.keys import to_json
from coterie.naming import CoterieError
from coterie.sandbox import Limits, require_fence

SANITIZED = Published(
    "mbpp/sanitized-mbpp.json",
    "google-research-datasets/mbpp",
    tuple(
        f"sanitized/{split}-00000-of-00001.parquet"
        for split in ("prompt", "train", "validation", "test")
    ),
    {"task_id": int, "code": str, "test_list": list},
    unique="task_id",
)
TESTED = range(11, 511)  # of the whole file, 974 problems; of the sanitized one all 427
SHOWN = range(1, 11)  # the publication's own examples
SHOTS = {"llada-moe": 3}  # families that are not named: none
LONGEST = {"llada-moe": 512}  # tokens; others: 2048

ASKED = (
    "You are an expert Python programmer, and here is your task: {task} "
    "Your code should pass these tests:\n\n{tests}\n"
)
FEW_SHOT = ASKED + "[BEGIN]\n"
ZERO_SHOT = ASKED + (
    "\nPlease enclose your code within delimiters as follows:\n```python\n# YOUR CODE HERE\n```\n\n"
)


@dataclass(frozen=True)
class Mbpp:
    """The sanitized 427, or of the whole file its 500 tests. ``gold`` is imports, then asserts.

    An item that is itself among the first ``shots`` examples is shown the next ones instead.
    """

    source: Source
    family: str
    shots: int
    trust: bool = False
    name: str = field(default="mbpp", init=False)

    def settings(self) -> Mapping[str, object]:
        return {
            **self.source.settings(),
            "shots": self.shots,
            "examples": f"the first of {_span(SHOWN)} that are not asked themselves",
            "template": FEW_SHOT if self.shots else ZERO_SHOT,
            "counts": "the answer and the tests run to their end",
            "limits": to_json(Limits()),
        }

    def generation(self) -> Mapping[str, object]:
        return {"max_new_tokens": LONGEST.get(self.family, 2048)}

    def items(self) -> Sequence[Item]:
        rows = self.source.rows
        if not _sanitized(rows):
            rows = [row for row in rows if row["task_id"] in TESTED]
        return [_item(row) for row in rows]

    def prompt(self, item: Item) -> str:
        if not self.shots:
            return ZERO_SHOT.format(task=item.question, tests=self._tests(item.id))
        shown = [row for row in self.source.rows if row["task_id"] in SHOWN]
        chosen = [row for row in shown if str(row["task_id"]) != item.id][: self.shots]
        asked = FEW_SHOT.format(task=item.question, tests=self._tests(item.id))
        return "\n\n".join([*map(_example, chosen), asked])

    def grade(self, output: str, item: Item) -> Grade:
        return code.grade(output, item.gold, trust=self.trust)

    def _tests(self, id: str) -> str:
        row = next(row for row in self.source.rows if str(row["task_id"]) == id)
        return "\n".join(texts(row, "test_list"))


def open_mbpp(wish: Wish) -> Mbpp:
    """Refuses, before anything is generated, where no sandbox can be had for the answers."""
    shots = SHOTS.get(wish.family, 0) if wish.shots is None else wish.shots
    require_fence(wish.trust)
    source = read(SANITIZED, wish.data)
    for row in source.rows:
        if not isinstance(row.get("prompt", row.get("text")), str):
            raise CoterieError(
                f"{source.name}: problem {row['task_id']} has neither 'prompt' nor 'text'"
            )
    few = len([row for row in source.rows if row["task_id"] in SHOWN]) - 1
    if shots > max(few, 0):
        raise CoterieError(f"mbpp: {shots} shots; {source.name} has examples for at most {few}")
    return Mbpp(source, wish.family, shots, wish.trust)


def _sanitized(rows: Sequence[Row]) -> bool:
    return "prompt" in rows[0]


def _item(row: Row) -> Item:
    imports = texts(row, "test_imports") if "test_imports" in row else []
    setup = [str(row["test_setup_code"])] if row.get("test_setup_code") else []
    gold = "\n".join([*imports, *setup, *texts(row, "test_list")])
    return Item(str(row["task_id"]), _task(row), gold + "\n")


def _task(row: Row) -> str:
    return str(row.get("prompt", row.get("text")))


def _example(row: Row) -> str:
    answer = str(row["code"]).replace("\r\n", "\n").strip()
    asked = FEW_SHOT.format(task=_task(row), tests="\n".join(texts(row, "test_list")))
    return f"{asked}{answer}\n[DONE]"


def _span(numbers: range) -> str:
    return f"problems {numbers.start} to {numbers.stop - 1}"
