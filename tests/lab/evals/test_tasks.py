"""Benchmarks: prompts, settings and items."""

from __future__ import annotations

import hashlib
import json

import pytest
from benchmark_files import ROWS, write_benchmark, write_rows
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import CoterieError
from coterie.lab.evals.task import Item, TaskOptions
from coterie.lab.evals.tasks import TASKS, embedded, open_tasks
from coterie.lab.problems import PROBLEM_MAKERS as MAKERS
from coterie.lab.problems import split_of


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
        options = TaskOptions("llada2", count=count + 2, seed=seed, trust=True)
        longer = embedded.open_embedded(task.name, options).items()
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
        (["words"], TaskOptions("llada2", count=10**400), "items; at least 1, at most"),
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
    assert list(TASKS) == ["gsm8k", "humaneval", "mbpp", "math500", "choices", *MAKERS]


def test_code_is_refused_without_a_sandbox(monkeypatch):
    def refuse(trust: bool = False) -> None:
        if not trust:
            raise CoterieError("nothing here can keep generated code in")

    monkeypatch.setattr(embedded, "require_backend", refuse)
    assert open_tasks(["words", "algebra"], TaskOptions("llada2"))
    with pytest.raises(CoterieError, match="keep generated code in"):
        open_tasks(["docstring"], TaskOptions("llada2"))
    assert open_tasks(["docstring"], TaskOptions("llada2", trust=True))


def test_items_have_a_readable_gold(tmp_path):
    [task] = open_tasks(["gsm8k"], TaskOptions("llada2", data=write_benchmark(tmp_path)))
    assert task.items()[0] == Item("gsm8k/0", "How many?", "It is 7.\n#### 7")
