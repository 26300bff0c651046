"""HumanEval and MBPP: small Python functions, graded by their tests (pass@1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from coterie.errors import TaskError
from coterie.keys import to_json
from coterie.lab.evals.task import QUESTION, Grade, Item, Task, TaskOptions
from coterie.lab.evals.tasks import code
from coterie.lab.evals.tasks.source import BenchmarkFile, DataRow, read_benchmark, text_list
from coterie.lab.sandbox import Limits, require_backend

HUMANEVAL = BenchmarkFile(  # from a docstring (Chen et al., arXiv 2107.03374)
    "humaneval/HumanEval.jsonl.gz",
    "openai/openai_humaneval",
    ("openai_humaneval/test-00000-of-00001.parquet",),
    {"task_id": str, "prompt": str, "test": str, "entry_point": str},
    unique_key="task_id",
)
COMPLETE = "Complete the following python code:\n{prompt}"  # OpenCompass, for chat models
INSTRUCT = (  # OpenCompass, for models that explain their answers
    "You are an intelligent programming assistant to produce Python algorithmic solutions.\n"
    "Can you complete the following Python function?\n```python\n{prompt}\n```"
)
TEMPLATES = {"llada-moe": COMPLETE}  # other families: INSTRUCT

MBPP = BenchmarkFile(  # from a sentence and tests (Austin et al., arXiv 2108.07732)
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
INSTRUCTION = (
    "You are an expert Python programmer, and here is your task: {task} "
    "Your code should pass these tests:\n\n{tests}\n"
)
FEW_SHOT = INSTRUCTION + "[BEGIN]\n"
ZERO_SHOT = INSTRUCTION + (
    "\nPlease enclose your code within delimiters as follows:\n```python\n# YOUR CODE HERE\n```\n\n"
)

MAX_NEW_TOKENS = {"llada-moe": 512}  # of both; other families: 2048


def open_humaneval(options: TaskOptions) -> Task:
    """The 164 problems, zero-shot. ``gold`` is the tests and the call that runs them.

    Raises TaskError if no sandbox works and ``options.trust`` is false.
    """
    options.require_zero_shot("humaneval")
    require_backend(options.trust)
    source, template = (
        read_benchmark(HUMANEVAL, options.data),
        TEMPLATES.get(options.family, INSTRUCT),
    )
    items = (
        Item(
            str(row["task_id"]),
            str(row["prompt"]),
            f"{row['test']}\n\ncheck({row['entry_point']})\n",
        )
        for row in source.rows
    )
    about = {
        **source.settings(),
        "shots": 0,
        "template": template,
        "counts": "the prompt's imports and helpers, the answer and the tests run to their end",
        "limits": to_json(Limits()),
    }

    def grade(output: str, item: Item) -> Grade:
        return code.grade(output, item.gold, header=item.question, trust=options.trust)

    template, length = template.format(prompt=QUESTION), MAX_NEW_TOKENS.get(options.family, 2048)
    return Task("humaneval", tuple(items), template, grade, about, length)


def open_mbpp(options: TaskOptions) -> Task:
    """The 427 sanitized problems, or the 500 tests of the full file. ``gold``: imports, asserts.

    A question is the whole prompt. Its examples are the first ``shots`` ones, without the item
    itself. Raises TaskError for broken data, too many shots, or if no sandbox works.
    """
    shots = DEFAULT_SHOTS.get(options.family, 0) if options.shots is None else options.shots
    require_backend(options.trust)
    source = read_benchmark(MBPP, options.data)
    for row in source.rows:
        if not isinstance(row.get("prompt", row.get("text")), str):
            raise TaskError(
                f"{source.name}: problem {row['task_id']} has neither 'prompt' nor 'text'"
            )
    examples = [row for row in source.rows if row["task_id"] in EXAMPLE_IDS]
    max_shots = len(examples) - 1
    if shots > max(max_shots, 0):
        raise TaskError(f"mbpp: {shots} shots; {source.name} has examples for at most {max_shots}")
    about = {
        **source.settings(),
        "shots": shots,
        "examples": "the first of problems 1 to 10 that are not asked themselves",
        "template": FEW_SHOT if shots else ZERO_SHOT,
        "counts": "the answer and the tests run to their end",
        "limits": to_json(Limits()),
    }

    def grade(output: str, item: Item) -> Grade:
        return code.grade(output, item.gold, trust=options.trust)

    items, length = (
        _mbpp_items(source.rows, examples, shots),
        MAX_NEW_TOKENS.get(options.family, 2048),
    )
    return Task("mbpp", tuple(items), QUESTION, grade, about, length)


def _mbpp_items(rows: Sequence[DataRow], examples: Sequence[DataRow], shots: int) -> Iterator[Item]:
    is_sanitized = "prompt" in rows[0]
    for row in rows:
        if is_sanitized or row["task_id"] in TEST_IDS:
            imports = text_list(row, "test_imports") if "test_imports" in row else []
            setup = [str(row["test_setup_code"])] if row.get("test_setup_code") else []
            gold = "\n".join([*imports, *setup, *text_list(row, "test_list")])
            others = [each for each in examples if each["task_id"] != row["task_id"]][:shots]
            solved = (f"{_ask(each, FEW_SHOT)}{_solution(each)}\n[DONE]" for each in others)
            prompt = "\n\n".join([*solved, _ask(row, FEW_SHOT if shots else ZERO_SHOT)])
            yield Item(str(row["task_id"]), prompt, gold + "\n")


def _ask(row: DataRow, template: str) -> str:
    tests = "\n".join(text_list(row, "test_list"))
    return template.format(task=row.get("prompt", row.get("text")), tests=tests)


def _solution(row: DataRow) -> str:
    return str(row["code"]).replace("\r\n", "\n").strip()
