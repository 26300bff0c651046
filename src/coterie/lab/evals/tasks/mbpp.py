"""MBPP: small Python functions from a sentence and tests (Austin et al., arXiv 2108.07732)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coterie.errors import TaskError
from coterie.keys import to_json
from coterie.lab.evals.task import Grade, Item, TaskOptions
from coterie.lab.evals.tasks import code
from coterie.lab.evals.tasks.source import (
    BenchmarkData,
    BenchmarkFile,
    DataRow,
    read_benchmark,
    text_list,
)
from coterie.lab.sandbox import Limits, require_backend

SANITIZED = BenchmarkFile(
    "mbpp/sanitized-mbpp.json",
    "google-research-datasets/mbpp",
    tuple(
        f"sanitized/{split}-00000-of-00001.parquet"
        for split in ("prompt", "train", "validation", "test")
    ),
    {"task_id": int, "code": str, "test_list": list},
    unique_key="task_id",
)
TEST_IDS = range(11, 511)  # of the full file, 974 problems; the sanitized file is all tests
EXAMPLE_IDS = range(1, 11)  # the publication's examples
DEFAULT_SHOTS = {"llada-moe": 3}  # other families: none
MAX_NEW_TOKENS = {"llada-moe": 512}  # other families: 2048

INSTRUCTION = (
    "You are an expert Python programmer, and here is your task: {task} "
    "Your code should pass these tests:\n\n{tests}\n"
)
FEW_SHOT = INSTRUCTION + "[BEGIN]\n"
ZERO_SHOT = INSTRUCTION + (
    "\nPlease enclose your code within delimiters as follows:\n```python\n# YOUR CODE HERE\n```\n\n"
)


@dataclass(frozen=True)
class Mbpp:
    """The 427 sanitized problems, or the 500 tests of the full file. ``gold``: imports, asserts.

    The examples of a prompt are the first ``shots`` ones, without the item itself.
    """

    source: BenchmarkData
    family: str
    shots: int
    trust: bool = False
    name: str = field(default="mbpp", init=False)

    def settings(self) -> Mapping[str, object]:
        return {
            **self.source.settings(),
            "shots": self.shots,
            "examples": f"the first of {_format_range(EXAMPLE_IDS)} that are not asked themselves",
            "template": FEW_SHOT if self.shots else ZERO_SHOT,
            "counts": "the answer and the tests run to their end",
            "limits": to_json(Limits()),
        }

    def generation(self) -> Mapping[str, object]:
        return {"max_new_tokens": MAX_NEW_TOKENS.get(self.family, 2048)}

    def items(self) -> Sequence[Item]:
        rows = self.source.rows
        if not _is_sanitized(rows):
            rows = [row for row in rows if row["task_id"] in TEST_IDS]
        return [_item(row) for row in rows]

    def prompt(self, item: Item) -> str:
        if not self.shots:
            return ZERO_SHOT.format(task=item.question, tests=self._tests(item.id))
        examples = [row for row in self.source.rows if row["task_id"] in EXAMPLE_IDS]
        shots = [row for row in examples if str(row["task_id"]) != item.id][: self.shots]
        question = FEW_SHOT.format(task=item.question, tests=self._tests(item.id))
        return "\n\n".join([*map(_example, shots), question])

    def grade(self, output: str, item: Item) -> Grade:
        return code.grade(output, item.gold, trust=self.trust)

    def _tests(self, id: str) -> str:
        row = next(row for row in self.source.rows if str(row["task_id"]) == id)
        return "\n".join(text_list(row, "test_list"))


def open_mbpp(options: TaskOptions) -> Mbpp:
    """Raises TaskError for broken data, too many shots, or if no sandbox works."""
    shots = DEFAULT_SHOTS.get(options.family, 0) if options.shots is None else options.shots
    require_backend(options.trust)
    source = read_benchmark(SANITIZED, options.data)
    for row in source.rows:
        if not isinstance(row.get("prompt", row.get("text")), str):
            raise TaskError(
                f"{source.name}: problem {row['task_id']} has neither 'prompt' nor 'text'"
            )
    max_shots = len([row for row in source.rows if row["task_id"] in EXAMPLE_IDS]) - 1
    if shots > max(max_shots, 0):
        raise TaskError(f"mbpp: {shots} shots; {source.name} has examples for at most {max_shots}")
    return Mbpp(source, options.family, shots, options.trust)


def _is_sanitized(rows: Sequence[DataRow]) -> bool:
    return "prompt" in rows[0]


def _item(row: DataRow) -> Item:
    imports = text_list(row, "test_imports") if "test_imports" in row else []
    setup = [str(row["test_setup_code"])] if row.get("test_setup_code") else []
    gold = "\n".join([*imports, *setup, *text_list(row, "test_list")])
    return Item(str(row["task_id"]), _task(row), gold + "\n")


def _task(row: DataRow) -> str:
    return str(row.get("prompt", row.get("text")))


def _example(row: DataRow) -> str:
    answer = str(row["code"]).replace("\r\n", "\n").strip()
    question = FEW_SHOT.format(task=_task(row), tests="\n".join(text_list(row, "test_list")))
    return f"{question}{answer}\n[DONE]"


def _format_range(numbers: range) -> str:
    return f"problems {numbers.start} to {numbers.stop - 1}"
