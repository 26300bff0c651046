"""HumanEval and MBPP: prompts, extraction of code, and grades."""

from __future__ import annotations

import ast
import json
import textwrap
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import benchmark

from coterie.errors import CoterieError
from coterie.lab.evals.task import Grade, Item, Task, TaskOptions
from coterie.lab.evals.tasks import TASKS, code
from coterie.lab.evals.tasks.code_tasks import HUMANEVAL, MBPP, open_humaneval, open_mbpp
from coterie.lab.evals.tasks.source import BenchmarkData, read_benchmark
from coterie.lab.sandbox import require_backend

HEADER = """\
from math import sqrt


def half(x):
    return x / 2


def add(a, b):
    '''Sum.'''
"""
TESTS = """\
def check(candidate):
    assert candidate(2, 3) == 5
    assert half(4) == 2

check(add)
"""
FUNCTION = "def add(a, b):\n    return a + b"


def has_sandbox() -> bool:
    try:
        require_backend()
    except CoterieError:
        return False
    return True


needs_a_sandbox = pytest.mark.skipif(
    not has_sandbox(), reason="NOT TESTED: no sandbox for generated code works here"
)


def humaneval(family: str = "llada2") -> Task:
    return open_humaneval(TaskOptions(family, data=benchmark("humaneval", "HumanEval.jsonl.gz")))


def mbpp(family: str = "llada2", file: str = "sanitized-mbpp.json", **options: int) -> Task:
    return open_mbpp(TaskOptions(family, data=benchmark("mbpp", file), **options))


def source_of(task: Task, file: str = "sanitized-mbpp.json") -> BenchmarkData:
    is_humaneval = task.name == "humaneval"
    file = "HumanEval.jsonl.gz" if is_humaneval else file
    return read_benchmark(HUMANEVAL if is_humaneval else MBPP, benchmark(task.name, file))


def reference_answers(task: Task) -> list[str]:
    answer = "canonical_solution" if task.name == "humaneval" else "code"
    return [str(row[answer]) for row in source_of(task).rows]


def grades(task: Task, outputs: Sequence[str], items: Sequence[Item]) -> list[Grade]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(task.grade, outputs, items))


def failed_ids(task: Task, outputs: Sequence[str], items: Sequence[Item]) -> list[str]:
    graded = zip(grades(task, outputs, items), items, strict=True)
    return [item.id for grade, item in graded if not grade.correct]


def every(some: int) -> pytest.MarkDecorator:
    """One item in so many; all of them in the slow tier."""
    slow = pytest.param(1, marks=pytest.mark.slow, id="all")
    return pytest.mark.parametrize("every", [slow, pytest.param(some, id="some")])


@needs_a_sandbox
@every(20)
@pytest.mark.parametrize(("open_task", "count"), [(humaneval, 164), (mbpp, 427)])
def test_the_references_pass(open_task, count, every):
    task = open_task()
    assert len(task.items()) == count
    assert failed_ids(task, reference_answers(task)[::every], task.items()[::every]) == []


def alter_returns(source: str) -> str:
    """Every return gives something that nothing equals."""

    class Alter(ast.NodeTransformer):
        def visit_Return(self, node: ast.Return) -> ast.Return:
            return ast.Return(ast.parse("object()", mode="eval").body)

    return ast.unparse(ast.fix_missing_locations(Alter().visit(parse(source))))


def parse(source: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(source)


def empty_bodies(source: str) -> str:
    tree = parse(source)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def full_programs(task: Task) -> list[str]:
    """The right answers as whole programs."""
    if task.name == "mbpp":
        return reference_answers(task)
    return [
        i.question + answer for i, answer in zip(task.items(), reference_answers(task), strict=True)
    ]


WRONG_ANSWERS: dict[str, Callable[[list[str]], list[str]]] = {
    "an altered return": lambda sources: [alter_returns(source) for source in sources],
    "an empty body": lambda sources: [empty_bodies(source) for source in sources],
    "another problem's solution": lambda sources: [*sources[1:], sources[0]],
    "nothing": lambda sources: [""] * len(sources),
    "no code": lambda sources: ["I am sorry, I cannot do that."] * len(sources),
    "an early exit": lambda sources: [f"import sys\n{source}\nsys.exit(0)" for source in sources],
}


@needs_a_sandbox
@pytest.mark.parametrize("wrong_kind", WRONG_ANSWERS)
@pytest.mark.parametrize("open_task", [humaneval, mbpp])
@every(50)
def test_wrong_answers_fail(open_task, wrong_kind, every):
    task = open_task()
    items, wrong = task.items()[::every], WRONG_ANSWERS[wrong_kind](full_programs(task))[::every]
    passed = {item.id for item in items} - set(failed_ids(task, wrong, items))
    assert passed == set()


OUTPUTS = {
    "bare": FUNCTION,
    "a fence": f"```python\n{FUNCTION}\n```",
    "a fence without a language": f"```\n{FUNCTION}\n```",
    "a fence of tildes": f"~~~python\n{FUNCTION}\n~~~",
    "a fence of four": f"````python\n{FUNCTION}\n````",
    "a fence in capitals": f"```Python\n{FUNCTION}\n```",
    "a fence with attributes": f"```{{.python}}\n{FUNCTION}\n```",
    "an unclosed fence": f"Here you are:\n```python\n{FUNCTION}",
    "an unclosed fence that was cut off": f"```python\n{FUNCTION}\n\n\nprint(add(1,",
    "a fence that closes at a line's end": f"```python\n{FUNCTION}```",
    "a fence that opens at a line's end": f"Here it is: ```python\n{FUNCTION}\n```",
    "an indented fence": "1. Like this:\n\n"
    + textwrap.indent(f"```python\n{FUNCTION}\n```", "   "),
    "prose around a fence": f"Sure! We add.\n\n```python\n{FUNCTION}\n```\n\nThis adds.",
    "prose around no fence": f"Here is the function:\n\n{FUNCTION}\n\nIt adds two numbers.",
    "prose that is an expression": f"Answer\n\n{FUNCTION}\n\nDone",
    "two fences, the last better": f"```python\ndef add(a, b):\n    return a\n```\nNo:\n"
    f"```python\n{FUNCTION}\n```",
    "a fence with the stub, then the answer": f"```python\n{HEADER}    ...\n```\n"
    f"```python\n{FUNCTION}\n```",
    "a fence, then its output": f"```python\n{FUNCTION}\n```\nOutput:\n```\n5\n```",
    "a fence, then a way to use it": f"```python\n{FUNCTION}\n```\n```py\nprint(add(1, 2))\n```",
    "a fence, then a shell": f"```python\n{FUNCTION}\n```\n```bash\npython add.py\n```",
    "a helper in an earlier fence": "```python\ndef plus(x, y):\n    return x + y\n```\nand\n"
    "```python\ndef add(a, b):\n    return plus(a, b)\n```",
    "a helper in a later fence": "```python\ndef add(a, b):\n    return plus(a, b)\n```\nwhere\n"
    "```python\nimport operator\n\ndef plus(x, y):\n    return operator.add(x, y)\n```",
    "a later fence that tests": f"```python\n{FUNCTION}\n```\nTests:\n"
    "```python\nfrom solution import add\n\ndef test():\n    assert add(1, 1) == 2\n```",
    "a constant in an earlier fence": "```python\nZERO = 0\n```\nthen\n"
    "```python\ndef add(a, b):\n    return a + b + ZERO\n```",
    "imports in an earlier fence": "```python\nimport operator\n```\n"
    "```python\ndef add(a, b):\n    return operator.add(a, b)\n```",
    "with its own wrong trial": f"```python\n{FUNCTION}\n\nassert add(1, 1) == 3\n```",
    "with a main part that asks": f"```python\n{FUNCTION}\n\n"
    'if __name__ == "__main__":\n    print(add(int(input()), 2))\n```',
    "with a question at the top": f"```python\n{FUNCTION}\n\n"
    'a = int(input("a: "))\nwhile a < 3:\n    a = int(input())\nprint(add(a, 1))\n```',
    "with prints": f"{FUNCTION}\n\nprint(add('1', '2'))\nprint(undefined)",
    "with a docstring that shows": 'def add(a, b):\n    """\n    >>> add(1, 2)\n    3\n    """\n'
    "    return a + b",
    "with types it imports": "```python\nfrom typing import Any\n\n"
    "def add(a: Any, b: Any) -> Any:\n    return a + b\n```",
    "the header again": f"{HEADER}    return a + b\n",
    "the header again, in a fence": f"```python\n{HEADER}    return a + b\n```",
    "only a body": "    return a + b\n",
    "only a body, stripped": "return a + b",
    "only a body of two lines": "    c = a\n    return c + b\n",
    "only a body whose first line lost its indentation": "c = a\n    return c + b\n",
    "only a body without indentation": "c = a\nif c:\n    c = a\nreturn c + b\n",
    "only a body in a fence": "```python\n    c = a\n    return c + b\n```",
    "only a body, then another function": "    return a + b\n\n\ndef test():\n    assert add(1, 1",
    "only a body, then prose": "    return a + b\n\nThis adds the two numbers.",
    "only a body, then a fence's end": "    return a + b\n```\nThis adds.",
    "begin and done": f"[BEGIN]\n{FUNCTION}\n[DONE]",
    "done alone": f"{FUNCTION}\n[DONE]\n\nYou are an expert Python programmer, and here",
    "begin and done with quotes": f"[BEGIN]\n '{FUNCTION}' \n[DONE]",
    "begin, done and a fence": f"[BEGIN]\n```python\n{FUNCTION}\n```\n[DONE]",
    "more problems after done": f"{FUNCTION}\n[DONE]\n[BEGIN]\ndef add(a, b): 0\n[DONE]",
    "an end mark": f"```python\n{FUNCTION}\n```<|im_end|>\n```python\ndef add(a, b): pass\n```",
    "after thinking": f"<think>\n```python\ndef add(a, b):\n  0\n```\n</think>\n{FUNCTION}",
    "windows line ends": f"```python\n{FUNCTION}\n```".replace("\n", "\r\n"),
    "tabs": "def add(a, b):\n\treturn a + b",
    "escaped underscores": "def add(a, b):\n    my\\_sum = a + b\n    return my\\_sum",
    "hard spaces": "def add(a, b):\n\u00a0\u00a0\u00a0\u00a0return a + b",
    "a lambda": "```python\nadd = lambda a, b: a + b\n```",
    "a constant above": "ZERO = 0\n\ndef add(a, b):\n    return a + b + ZERO",
    "recursion and a limit": f"import sys\nsys.setrecursionlimit(10000)\n\n{FUNCTION}",
    "using what the header gives": "    return int(half(2 * a) + sqrt(b * b))",
    "an import from the future": f"```py\nfrom __future__ import annotations\n\n{FUNCTION}\n```",
    "a decorator": "```python\nfrom functools import cache\n\n@cache\n" + FUNCTION + "\n```",
    "a warning": "def add(a, b):\n    '\\d'\n    return a + b",
    "a session": "```pycon\n>>> def add(a, b):\n...     return a + b\n...\n>>> add(1, 2)\n3\n```",
    "in the middle of a line": "Answer: def add(a, b): return a + b",
    "in single ticks": "Use `add = lambda a, b: a + b` for that.",
    "a tick before a fence": f"This is `add`: ```python\n{FUNCTION}\n```",
    "a mark of byte order": f"\ufeff{FUNCTION}",
    "a fence in its docstring": '```py\ndef add(a, b):\n    """\n    ```\n    add(1, 2)\n    ```\n'
    '    """\n    return a + b\n```',
    "after a fence that was the prompt's": f"{FUNCTION}\n```\nTry it:\n```python\nadd(1, 2)\n```",
    "a table filled above": "T = {}\n\ndef fill():\n    T[0] = 0\n\nfill()\n\ndef add(a, b):\n"
    "    return a + b + T[0]",
    "a test of its own that fails": f"{FUNCTION}\n\ndef test():\n    assert 1 == 3\n\ntest()",
    "an inline fence": "`add` is ```add = lambda a, b: a + b```",
}
WRONG = {
    "blank": " \n",
    "prose": "I cannot help with that.",
    "another name": "def plus(a, b):\n    return a + b",
    "a stub": f"```python\n{HEADER}    pass\n```",
    "a wrong body": "    return a - b",
    "a syntax error": "def add(a, b)\n    return a + b",
    "cut off": "```python\ndef add(a, b):\n    c = (a +",
    "an empty fence": "```python\n```",
    "only fences": "```" * 50,
    "deep": "def add(a, b): return " + "(" * 9999,
    "nothing but a null": "\0",
    "a lone surrogate": "\ud800",
}


@needs_a_sandbox
@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_code_is_extracted_from(kind):
    assert code.grade(OUTPUTS[kind], TESTS, header=HEADER).correct, code.extract_code(
        OUTPUTS[kind], ["add"], HEADER
    )


@needs_a_sandbox
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_output_fails(kind):
    assert not code.grade(WRONG[kind], TESTS, header=HEADER).correct


bodies = st.lists(
    st.sampled_from(
        ["x = 1", "if a:\n    x = [\n        b]", "for i in range(3):\n    x = '''\n  y'''"]
    ),
    max_size=4,
)
fences = st.sampled_from(
    ["```python\n{}\n```", "~~~\n{}\n~~~", "```py\n{}", "[BEGIN]\n{}\n[DONE]", "{}"]
)
proses = st.sampled_from(["", "Here is the code:\n\n", "Sure, this works.\n"])


@given(bodies, fences, proses, st.sampled_from(["", "\n\nThis adds, doesn't it?"]))
@settings(deadline=None)
def test_extracted_code_is_unchanged(lines, fence, before, after):
    function = "def add(a, b):\n" + textwrap.indent("\n".join([*lines, "return a + b"]), "    ")
    if fence == "```py\n{}":
        after = ""
    code_text = code.extract_code(before + fence.format(function) + after, ["add"])
    assert code_text is not None
    assert code_text.strip() == function.strip()


@given(st.text(alphabet=st.sampled_from("`~\n #defreturn:()[]'\"\\\0\u00a0é"), max_size=80))
@settings(deadline=None)
def test_no_output_breaks_the_extraction(text):
    code_text = code.extract_code(text, ["add"], HEADER)
    assert (code_text is None) == (not text.strip())


@pytest.mark.parametrize(
    "piece", ["```x", "`", "'", " ", "(", "def add(", "from x ", "[BEGIN]", "~~~\n"]
)
def test_extraction_from_a_long_output_is_fast(piece):
    start = time.process_time()
    code.extract_code(f"[BEGIN]'{piece * (40_000 // len(piece))}x", ["add"], HEADER)
    code.extract_code("\n".join([piece] * 4000), ["add"], HEADER)
    assert time.process_time() - start < 4


@pytest.mark.parametrize(
    "piece",
    ["def add(a, b: return 1", "def add(a, b):\n    pass", "x = 1\nprose, prose", "  y = (1"],
)
@pytest.mark.parametrize("header", ["", HEADER])
def test_extraction_takes_memory_and_parses_in_proportion(piece, header, monkeypatch):
    parsed: list[int] = []
    parse_code = code._parse_or_error_line

    def counted(text: str) -> ast.Module | int:
        parsed.append(len(text))
        return parse_code(text)

    monkeypatch.setattr(code, "_parse_or_error_line", counted)

    def cost(count: int) -> tuple[int, int]:
        parsed.clear()
        tracemalloc.start()
        code.extract_code(f"so: (\n{piece}\n" * count, ["add"], header)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, sum(parsed)

    (small_peak, small_sum), (peak, total) = cost(100), cost(400)
    assert peak < 6 * small_peak
    assert total < 6 * small_sum


@pytest.mark.parametrize("header", ["", HEADER])
def test_a_long_answer_of_stubs_is_parsed_a_few_times(header, monkeypatch):
    text = "def add(a, b):\n    pass\n" * 4000
    parsed: list[int] = []
    parse_code = code._parse_or_error_line
    monkeypatch.setattr(
        code, "_parse_or_error_line", lambda part: parsed.append(len(part)) or parse_code(part)
    )
    code.extract_code(text, ["add"], header)
    assert sum(parsed) < 25 * len(text)


def test_threads_keep_the_warning_filters():
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda _: code.extract_code("def add(): '\\d'; return 1", ["add"]), range(200))
        )
    assert list(warnings.filters) == before


def test_called_functions_are_read_from_the_tests():
    assert code.called_functions(TESTS) == ("add",)
    assert code.called_functions("import math\nassert math.isclose(set(f(1)), g(len([])))") == (
        "f",
        "g",
    )
    assert code.called_functions("not python (") == ()


def test_the_preamble_is_the_code_above_the_function():
    assert code.preamble(HEADER, ["add"]).endswith("return x / 2")
    assert code.preamble("def add(a, b):", ["add"]) == ""
    assert code.preamble("", ["add"]) == ""


def test_items_have_the_benchmarks_own_names():
    assert [item.id for item in humaneval().items()] == [f"HumanEval/{n}" for n in range(164)]
    assert [item.id for item in mbpp().items()][:3] == ["2", "3", "4"]


def test_a_family_has_its_usual_prompts():
    item = humaneval().items()[0]
    assert (
        humaneval("llada-moe").prompt(item)
        == f"Complete the following python code:\n{item.question}"
    )
    assert f"```python\n{item.question}\n```" in humaneval("llada2").prompt(item)
    item = mbpp().items()[50]
    few_shot, zero_shot = mbpp("llada-moe").items()[50].question, item.question
    assert few_shot.count("[BEGIN]") == 4
    assert few_shot.count("[DONE]") == 3
    assert few_shot.endswith("[BEGIN]\n")
    assert "[BEGIN]" not in zero_shot
    assert all(
        test in few_shot and test in zero_shot
        for test in item.gold.splitlines()
        if "assert" in test
    )


def test_no_prompt_contains_its_own_answer():
    task = mbpp("llada-moe")
    rows = {str(row["task_id"]): str(row["code"]) for row in source_of(task).rows}
    leaked = [item for item in task.items() if rows[item.id].strip() in task.prompt(item)]
    assert leaked == []
    assert {task.prompt(item).count("[DONE]") for item in task.items()} == {3}


def test_the_full_file_has_500_tests_with_imports_before_asserts():
    assert [int(item.id) for item in mbpp(file="mbpp.jsonl").items()] == list(range(11, 511))
    math = [item for item in mbpp().items() if item.gold.startswith("import math\n")]
    assert len(math) == 13


@needs_a_sandbox
def test_the_whole_files_reference_codes_pass():
    task = mbpp(file="mbpp.jsonl")
    answers = {str(row["task_id"]): str(row["code"]) for row in source_of(task, "mbpp.jsonl").rows}
    items = task.items()[::50]
    assert failed_ids(task, [answers[item.id] for item in items], items) == []


def test_settings_are_json_with_data_and_limits():
    for task in (humaneval(), mbpp(), mbpp(shots=2)):
        document = json.loads(json.dumps(dict(task.settings())))
        assert document["sha256"] == source_of(task).sha256
        assert document["limits"]["processor"] == 5
    assert mbpp(shots=2).settings()["shots"] == 2


def test_invalid_options_are_refused(tmp_path: Path):
    with pytest.raises(CoterieError, match="zero-shot; `shots` is 2"):
        open_humaneval(TaskOptions("llada2", shots=2))
    with pytest.raises(CoterieError, match=r"7 shots.*at most 6"):
        mbpp(shots=7)
    file = tmp_path / "mbpp.jsonl"
    file.write_text('{"task_id": 1, "code": "", "test_list": []}')
    with pytest.raises(CoterieError, match="problem 1 has neither 'prompt' nor 'text'"):
        open_mbpp(TaskOptions("llada2", data=file))


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "docstring", "sentence"])
def test_without_a_sandbox_a_code_task_opens_only_if_trusted(name, monkeypatch):
    data = {"humaneval": ("humaneval",), "mbpp": ("mbpp",)}.get(name, ())
    monkeypatch.setattr("coterie.lab.sandbox.runner.backend_candidates", list)
    with pytest.raises(CoterieError, match=r"install bubblewrap.*`trust`"):
        TASKS[name](TaskOptions("llada2", data=benchmark(*data)))
    assert TASKS[name](TaskOptions("llada2", data=benchmark(*data), trust=True)).name == name
