"""Benchmarks: data, prompts, and grades of answers that are hard to parse."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
from hard_answers import GSM8K, MATH500
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coterie.cli.entry import run
from coterie.errors import CoterieError
from coterie.lab.evals.task import Item, TaskOptions
from coterie.lab.evals.tasks import TASKS, embedded, gsm8k, math500, open_tasks, source, verify
from coterie.lab.evals.tasks.latex import is_equivalent
from coterie.lab.evals.tasks.numbers import find_numbers, latex_to_plain
from coterie.lab.problems import PROBLEM_MAKERS as MAKERS
from coterie.lab.problems import split_of

ROWS = [{"question": "How many?", "answer": f"It is {n}.\n#### {n}"} for n in (7, 8)]
TRAIN = [{"question": f"Q{n}?", "answer": f"1+{n}=<<1+{n}={n + 1}>>{n + 1}\n#### {n + 1}"}
         for n in range(5)]  # fmt: skip

integers = st.integers(-(10**7), 10**7)
# Text that may stand after an answer: no box, no #### and no new question in it.
prose = st.text(st.characters(exclude_characters="\\#:<{}"), max_size=60)


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_benchmark(path: Path) -> Path:
    write_rows(path / "gsm8k" / "test.jsonl", ROWS)
    write_rows(path / "gsm8k" / "train.jsonl", TRAIN)
    return path


# Hard answers


@pytest.mark.parametrize(("gold", "output", "is_correct"), GSM8K)
def test_gsm8k_reads_hard_answers(gold, output, is_correct):
    assert gsm8k.grade(output, gold).correct is is_correct


@pytest.mark.parametrize(("gold", "output", "is_correct"), MATH500)
def test_math500_reads_hard_answers(gold, output, is_correct):
    assert math500.grade(output, gold).correct is is_correct


@given(integers, integers)
def test_a_number_is_correct_only_if_it_is_the_gold(number, gold):
    for output in (f"#### {number}", rf"\boxed{{{number}}}", f"The answer is {number}."):
        assert gsm8k.grade(output, str(gold)).correct is (number == gold)
    assert is_equivalent(str(number), str(gold)) is (number == gold)


@given(integers)
@example(1234567)
@example(-1000)
def test_thousands_commas_change_nothing(number):
    for output in (f"#### {number:,}", rf"\boxed{{{number:,}}}", f"She has {number:,} eggs."):
        assert gsm8k.grade(output, str(number)).correct
        assert gsm8k.grade(output.replace(",", ""), f"{number:,}").correct
    assert is_equivalent(f"{number:,}", str(number))
    assert is_equivalent(f"{number:,}".replace(",", r",\!"), str(number))


@given(integers, integers, prose)
def test_text_after_a_box_never_changes_the_grade(number, gold, after):
    output = rf"So it is $\boxed{{{number}}}$"
    for grade in (gsm8k.grade, math500.grade):
        assert grade(f"{output}. {after}", str(gold)).correct is (number == gold)


@given(integers, prose)
def test_text_after_hashes_never_changes_the_grade(number, after):
    assert gsm8k.grade(f"#### {number}\n{after}", str(number)).correct


@given(integers, integers)
def test_the_last_box_counts(first, last):
    output = rf"At first \boxed{{{first}}}. But no, it is \boxed{{{last}}}."
    for grade in (gsm8k.grade, math500.grade):
        assert grade(output, str(last)).correct
        assert grade(output, str(first)).correct is (first == last)


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_are_equal_in_every_notation(numerator, denominator):
    value = Fraction(numerator, denominator)
    sign = "-" if numerator < 0 else ""
    forms = [f"{numerator}/{denominator}", rf"{sign}\frac{{{abs(numerator)}}}{{{denominator}}}",
            rf"{sign}\dfrac{{{abs(numerator)}}}{{{denominator}}}", str(value)]  # fmt: skip
    for form in forms:
        assert gsm8k.gold_value(form) == value
        assert all(is_equivalent(form, other) for other in forms)


@given(st.text(max_size=200), st.text(max_size=20))
@settings(max_examples=200)
def test_no_output_makes_a_grader_raise(output, piece):
    for text in (output, rf"\boxed{{{output}}}", f"#### {output}", rf"\frac{piece}{output}$"):
        gsm8k.grade(text, "18")
        for name in ("words", "algebra"):
            embedded.grade(name, text, "18")
        math500.extract_latex(text)


@given(st.text("\\{}$frac12^_(), .x=", max_size=12))
@settings(max_examples=25)
def test_no_answer_makes_math500_raise(answer):
    assert math500.grade(rf"\boxed{{{answer}}}", r"\frac{1}{7}").correct in (True, False)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_all_numbers_of_a_text_are_parsed(values):
    text = " and ".join(f"${value:,}" for value in values)
    assert [number.value for number in find_numbers(latex_to_plain(text))] == values


def test_the_metrics_of_the_harness_are_recorded():
    hashes = gsm8k.grade("#### 18\nShe keeps 7.", "18")
    assert (hashes.correct, hashes.other_metrics) == (True, {"strict": True, "flexible": False})
    boxed = gsm8k.grade(r"\boxed{18}", "18")
    assert (boxed.correct, boxed.other_metrics) == (True, {"strict": False, "flexible": True})


def test_a_gold_without_a_number_raises():
    for gold in ("1234", "1,234", "She has 1,200 + 34.\n#### 1,234", r"\boxed{1234}", "$1234"):
        assert gsm8k.gold_value(gold) == 1234
    with pytest.raises(CoterieError, match="holds no number"):
        gsm8k.gold_value("many")


# The deadline


def test_an_answer_over_the_time_limit_is_wrong_and_the_next_is_graded(monkeypatch):
    monkeypatch.setattr(verify, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(verify, "_idle_verifiers", [])
    try:
        start = time.monotonic()
        assert not verify.is_equivalent_latex("5", "10^{10^{10^{10}}}")
        assert time.monotonic() - start < 20
        assert verify.is_equivalent_latex("3x", r"x \cdot 3")
    finally:
        verify._close_all()


def test_a_verifier_that_does_not_start_raises(monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "_idle_verifiers", [])
    (tmp_path / "broken.py").write_text("raise RuntimeError('no grammar')")
    monkeypatch.setattr(verify, "SCRIPT_PATH", tmp_path / "broken.py")
    with pytest.raises(CoterieError, match=r"does not start.*no grammar"):
        open_tasks(["math500"], TaskOptions("llada2"))
    monkeypatch.setattr(verify, "find_spec", lambda _name: None)
    with pytest.raises(CoterieError, match=r"pip install '\.\[lab\]'"):
        open_tasks(["math500"], TaskOptions("llada2"))


def test_answers_are_compared_in_threads():
    pairs = [(f"{n}x + 1", f"1 + x \\cdot {n}") for n in range(2, 5)]
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda p=p: results.append(is_equivalent(*p))) for p in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * len(pairs)


# Data


def test_file_folder_parent_and_default_folder_give_the_same_data(tmp_path, monkeypatch):
    write_benchmark(tmp_path)
    locations = [tmp_path, tmp_path / "gsm8k", tmp_path / "gsm8k" / "test.jsonl"]
    sources = [source.read_benchmark(gsm8k.TEST, location) for location in locations]
    monkeypatch.setenv(source.DATA_ENV_VAR, str(tmp_path))
    sources.append(source.read_benchmark(gsm8k.TEST, None))
    assert len(set(map(repr, sources))) == 1
    content = (tmp_path / "gsm8k" / "test.jsonl").read_bytes()
    assert sources[0].settings() == {
        "data": "test.jsonl", "sha256": hashlib.sha256(content).hexdigest(), "rows": 2,
    }  # fmt: skip


def test_jsonl_json_and_gzip_have_the_same_rows(tmp_path):
    plain_file = write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "a.gz").write_bytes(gzip.compress(plain_file.read_bytes(), mtime=0))
    results = [
        source.read_benchmark(gsm8k.TEST, tmp_path / f"a.{end}").rows
        for end in ("jsonl", "json", "gz")
    ]
    assert results[0] == results[1] == results[2] == tuple(ROWS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; expected objects with 'question' (text), 'answer' (text)"),
        (b"\n\n", "empty; expected"),
        (
            b'{"question": "a", "answer": "#### 1"}\n{"question": "b", "ans',
            "line 2: invalid or truncated JSON",
        ),
        (b'{"question": "a"}\n', "line 1: 'answer' is missing"),
        (b'{"question": "a", "answer": 3}\n', "line 1: 'answer' is not text"),
        (b'{"question": "a", "answer": "b"}\n[1]\n', "line 2: not an object but list"),
        (b'[{"question": "a", "answer": "b"}, 3]', "item 2: not an object but int"),
        (b'[{"question": "a",\n "answer"', "line 2: invalid or truncated JSON"),
        (b'{"question": "a", "answer": "b"}\n\xff\n', "line 2: not UTF-8"),
        (gzip.compress(b"[" * 1000, mtime=0)[:-9], "broken or truncated gzip"),
        (b"\x1f\x8b\x00", "broken or truncated gzip"),
        (b'{"question": "a", "answer": "none"}\n', "row 1: 'none' holds no number"),
    ],
)
def test_a_broken_file_is_reported_with_the_line_and_the_expected_form(tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(CoterieError) as error:
        open_tasks(["gsm8k"], TaskOptions("llada2", data=path))
    assert message in str(error.value)
    assert "broken.jsonl" in str(error.value)


def test_a_location_without_the_data_is_reported(tmp_path):
    for location, message in ((tmp_path / "no", "no such file or folder"), (tmp_path, "neither")):
        with pytest.raises(CoterieError, match=message):
            source.read_benchmark(gsm8k.TEST, location)


def test_two_rows_with_one_id_raise(tmp_path):
    row = {"problem": "1+1?", "answer": "2", "unique_id": "test/a"}
    with pytest.raises(CoterieError, match="two rows with 'unique_id' 'test/a'"):
        open_tasks(
            ["math500"], TaskOptions("llada2", data=write_rows(tmp_path / "m.jsonl", [row, row]))
        )


def test_without_data_the_published_file_is_downloaded(tmp_path, monkeypatch):
    downloads = []

    def deliver(repository: str, file: str, *, repo_type: str) -> str:
        downloads.append((repository, file, repo_type))
        row = {"problem": "1+1?", "answer": "2", "unique_id": "test/a"}
        return str(write_rows(tmp_path / "hub.jsonl", [row]))

    monkeypatch.delenv(source.DATA_ENV_VAR, raising=False)
    monkeypatch.setattr(source, "hf_hub_download", deliver)
    [task] = open_tasks(["math500"], TaskOptions("llada2"))
    assert downloads == [("HuggingFaceH4/MATH-500", "test.jsonl", "dataset")]
    assert task.settings()["data"] == "HuggingFaceH4/MATH-500"
    assert [item.id for item in task.items()] == ["math500/test/a"]


def test_a_failed_download_is_one_line_with_a_solution(monkeypatch):
    def fail(*_args: object, **_named: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.delenv(source.DATA_ENV_VAR, raising=False)
    monkeypatch.setattr(source, "hf_hub_download", fail)
    with pytest.raises(CoterieError, match=r"no route.*`data`.*gsm8k/test.jsonl"):
        source.read_benchmark(gsm8k.TEST, None)


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "test.parquet"
    path.write_bytes(b"PAR1...PAR1")

    class Table:
        def to_pylist(self) -> list[dict[str, object]]:
            return list(ROWS)

    library = ModuleType("pyarrow.parquet")
    library.read_table = lambda _file: Table()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", library)
    assert source.read_benchmark(gsm8k.TEST, path).rows == tuple(ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(CoterieError, match=r"pip install '\.\[harness\]'"):
        source.read_benchmark(gsm8k.TEST, path)


# Prompts


def test_gsm8k_examples_have_no_calculator_notes(tmp_path):
    [task] = open_tasks(["gsm8k"], TaskOptions("llada-moe", data=write_benchmark(tmp_path)))
    prompt = task.prompt(task.items()[0])
    assert prompt.count("Question:") == 5
    assert prompt.startswith(
        "Question: Q0?\nLet's think step by step\nAnswer: 1+0=1\n#### 1\n\nQuestion: Q1?"
    )
    assert prompt.endswith("Question: How many?\nLet's think step by step\nAnswer:")
    assert (task.settings()["shots"], task.generation()) == (4, {"max_new_tokens": 1024})
    content = (tmp_path / "gsm8k" / "train.jsonl").read_bytes()
    assert task.settings()["examples"] == {
        "data": "train.jsonl", "sha256": hashlib.sha256(content).hexdigest(), "rows": 5,
    }  # fmt: skip


def test_other_families_are_zero_shot_by_default(tmp_path):
    data = write_benchmark(tmp_path)
    [task] = open_tasks(["gsm8k"], TaskOptions("llada2", data=data))
    assert task.prompt(task.items()[0]) == (
        "How many?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    [two_shot] = open_tasks(["gsm8k"], TaskOptions("llada2", data=data, shots=2))
    assert two_shot.prompt(two_shot.items()[0]).count("Question:") == 3
    with pytest.raises(CoterieError, match="holds 5 examples, not 6"):
        open_tasks(["gsm8k"], TaskOptions("llada2", data=data, shots=6))


def test_missing_examples_are_reported(tmp_path):
    test_file = write_rows(tmp_path / "alone.jsonl", ROWS)
    with pytest.raises(CoterieError, match=r"train.jsonl: not found.*`shots` to 0"):
        open_tasks(["gsm8k"], TaskOptions("llada-moe", data=test_file))
    assert open_tasks(["gsm8k"], TaskOptions("llada-moe", data=test_file, shots=0))


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_embedded_items_are_held_out_and_a_larger_count_extends_them(seed, count):
    for task in open_tasks(list(MAKERS), TaskOptions("llada2", count=count, seed=seed, trust=True)):
        items = task.items()
        longer = embedded.EmbeddedTask(task.name, count + 2, seed).items()
        assert items == longer[:count]
        assert [item.id for item in items] == [f"{task.name}/{seed}/{n}" for n in range(count)]
        problems = embedded._draw_problems(task.name, seed, count)
        assert all(split_of(problem.key) == "test" for problem in problems)


@pytest.mark.parametrize("name", list(MAKERS))
def test_embedded_answers_are_correct_and_others_wrong(name):
    [task] = open_tasks([name], TaskOptions("llada2", count=3, seed=5, trust=True))
    for item, problem in zip(task.items(), embedded._draw_problems(name, 5, 3), strict=True):
        assert task.prompt(item) == problem.prompt
        assert task.grade(problem.answer, item).correct
        assert not task.grade("#### 999 \\boxed{999}", item).correct


def test_settings_of_every_task_are_json(tmp_path):
    options = TaskOptions("llada2", data=write_benchmark(tmp_path), trust=True)
    for task in open_tasks(["gsm8k", *MAKERS], options):
        assert json.loads(json.dumps(dict(task.settings()))) == dict(task.settings())


def test_invalid_names_and_options_are_refused(tmp_path):
    single_file = write_rows(tmp_path / "one.jsonl", ROWS)
    for names, options, message in (
        (["gsm"], TaskOptions("llada2"), "unknown task 'gsm'; known: gsm8k, humaneval"),
        (["words"], TaskOptions("llada2", count=0), "0 items"),
        (["words"], TaskOptions("llada2", shots=2), "zero-shot"),
        (["math500"], TaskOptions("llada2", shots=4), "zero-shot"),
        (
            ["gsm8k", "math500"],
            TaskOptions("llada2", data=single_file),
            "one file, .* for gsm8k and math500",
        ),
    ):
        with pytest.raises(CoterieError, match=message):
            open_tasks(names, options)
    assert [task.name for task in open_tasks(["words", "words"], TaskOptions("llada2"))] == [
        "words"
    ]
    assert list(TASKS) == ["gsm8k", "humaneval", "mbpp", "math500", *MAKERS]


def test_code_is_refused_without_a_sandbox(monkeypatch):
    def refuse(trust: bool = False) -> None:
        if not trust:
            raise CoterieError("nothing here can keep generated code in")

    monkeypatch.setattr(embedded, "require_backend", refuse)
    assert open_tasks(["words", "algebra"], TaskOptions("llada2"))
    with pytest.raises(CoterieError, match="keep generated code in"):
        open_tasks(["docstring"], TaskOptions("llada2"))
    assert open_tasks(["docstring"], TaskOptions("llada2", trust=True))


# coterie grade


def read_grades(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_grades_are_in_the_order_of_the_lines(tmp_path, capsys):
    rows: list[dict[str, object]] = [
        {"id": "b", "output": "#### 18", "gold": "... #### 18"},
        {"id": 7, "output": "none", "gold": 18},
        {"id": "b", "output": r"\boxed{19}", "gold": "$18"},
    ]
    assert run(["grade", "gsm8k", str(write_rows(tmp_path / "o.jsonl", rows))]) == 0
    assert read_grades(capsys) == [
        {"id": "b", "correct": True, "extracted": "18"},
        {"id": 7, "correct": False, "extracted": None},
        {"id": "b", "correct": False, "extracted": "19"},
    ]


def test_the_proportion_of_correct_lines_is_printed_on_stderr(tmp_path, capsys):
    rows: list[dict[str, object]] = [
        {"id": n, "output": rf"\boxed{{{n}}}", "gold": r"$\frac{2}{2}$"} for n in range(2)
    ]
    out = tmp_path / "grades.jsonl"
    path = write_rows(tmp_path / "o.jsonl", rows)
    assert run(["grade", "math500", str(path), "-o", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "math500: 1 of 2 correct, 50.0% (95 % interval 9.5% to 90.5%)" in captured.err
    assert [json.loads(line)["correct"] for line in out.read_text().splitlines()] == [False, True]


def test_an_id_without_a_gold_is_looked_up(tmp_path, capsys):
    data = write_benchmark(tmp_path)
    rows: list[dict[str, object]] = [
        {"id": "gsm8k/1", "output": "#### 8"},
        {"id": "0", "output": "#### 8"},
    ]
    path = write_rows(tmp_path / "o.jsonl", rows)
    assert run(["grade", "gsm8k", str(path), "--data", str(data)]) == 0
    assert [line["correct"] for line in read_grades(capsys)] == [True, False]


def test_an_embedded_function_is_looked_up_by_its_id(tmp_path, capsys):
    problem = embedded._draw_problems("docstring", 3, 2)[1]
    rows: list[dict[str, object]] = [
        {"id": "docstring/3/1", "output": problem.answer},
        {"id": "docstring/3/0", "output": problem.answer},
    ]
    path = str(write_rows(tmp_path / "o.jsonl", rows))
    assert run(["grade", "docstring", path, "--trust-generated-code"]) == 0
    assert [line["correct"] for line in read_grades(capsys)] == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (
            '{"id": 1, "output": "a", "gold": "1"}\n{"id": 2, "outp',
            "line 2: invalid or truncated JSON",
        ),
        ('{"id": 1, "gold": "1"}', "line 1: 'output' is missing"),
        ('{"output": "a", "gold": "1"}', "line 1: 'id' is missing"),
        ('{"id": 1, "output": null, "gold": "1"}', "line 1: 'output' is not a string"),
        ('{"id": [1], "output": "", "gold": "1"}', "line 1: 'id' is neither"),
        ('{"id": 1, "output": "", "gold": [1]}', "line 1: 'gold' is neither"),
        ("3", "line 1: not an object"),
        ('{"id": 1, "output": "", "gold": "many"}', "line 1: gold 'many' holds no number"),
        ('{"id": "gsm8k/9", "output": ""}', "no item 'gsm8k/9' (line 1); known are gsm8k/0 to"),
    ],
)
def test_bad_lines_are_reported_before_anything_is_graded(tmp_path, capsys, text, message):
    good = '{"id": "x", "output": "#### 1", "gold": "1"}\n' if text else ""
    path = tmp_path / "o.jsonl"
    path.write_text(good + text, encoding="utf-8")
    message = message.replace("line 2", "line 3").replace("line 1", "line 2")
    assert run(["grade", "gsm8k", str(path), "--data", str(write_benchmark(tmp_path))]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_the_output_file_is_kept_until_all_is_graded(tmp_path, capsys, monkeypatch):
    path = write_rows(tmp_path / "o.jsonl", [{"id": 1, "output": "1", "gold": "1"}])
    out = tmp_path / "grades.jsonl"
    out.write_text("before")

    def fail(_task: object, _output: str, _item: Item) -> None:
        raise CoterieError("no sandbox starts any more")

    monkeypatch.setattr(gsm8k.Gsm8k, "grade", fail)
    monkeypatch.setattr("coterie.lab.evals.grading.GOLD_GRADERS", {})
    data = write_benchmark(tmp_path)
    write_rows(path, [{"id": "gsm8k/0", "output": "1"}])
    assert run(["grade", "gsm8k", str(path), "-o", str(out), "--data", str(data)]) == 2
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grades.jsonl", "gsm8k", "o.jsonl"]
    assert run(["grade", "gsm8k", str(path), "-o", str(path)]) == 2
    assert "overwrite" in capsys.readouterr().err


def test_items_have_a_readable_gold(tmp_path):
    [task] = open_tasks(["gsm8k"], TaskOptions("llada2", data=write_benchmark(tmp_path)))
    assert task.items()[0] == Item("gsm8k/0", "How many?", "It is 7.\n#### 7")
