"""``coterie grade``: grades of outputs from elsewhere."""

from __future__ import annotations

import json

import pytest
from benchmark_files import write_benchmark, write_rows

from coterie.cli.entry import run
from coterie.errors import CoterieError, TaskError
from coterie.lab.evals.grading import read_outputs
from coterie.lab.evals.task import Item, Task
from coterie.lab.evals.tasks import embedded


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


@pytest.mark.parametrize("line", [1, 2, 5])
def test_a_line_that_is_not_utf8_is_named(line):
    good = b'{"id": "a", "output": "18"}\n'
    with pytest.raises(TaskError, match=rf"outputs, line {line}: .*UTF-8"):
        read_outputs(good * (line - 1) + b"\xff\n", "outputs")


def test_the_output_file_is_kept_until_all_is_graded(tmp_path, capsys, monkeypatch):
    path = write_rows(tmp_path / "o.jsonl", [{"id": 1, "output": "1", "gold": "1"}])
    out = tmp_path / "grades.jsonl"
    out.write_text("before")

    def fail(_task: object, _output: str, _item: Item) -> None:
        raise CoterieError("no sandbox starts any more")

    monkeypatch.setattr(Task, "grade", fail)
    monkeypatch.setattr("coterie.lab.evals.grading.GOLD_GRADERS", {})
    data = write_benchmark(tmp_path)
    write_rows(path, [{"id": "gsm8k/0", "output": "1"}])
    assert run(["grade", "gsm8k", str(path), "-o", str(out), "--data", str(data)]) == 2
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grades.jsonl", "gsm8k", "o.jsonl"]
    assert run(["grade", "gsm8k", str(path), "-o", str(path)]) == 2
    assert "overwrite" in capsys.readouterr().err
