"""Multiple choice by likelihood."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from benchmark_files import write_rows

from coterie.engine.engine import load
from coterie.errors import TaskError
from coterie.lab.evals.results import Variant
from coterie.lab.evals.run import run_eval
from coterie.lab.evals.task import Task, TaskOptions
from coterie.lab.evals.tasks.choices import choice_texts, open_choices
from coterie.lab.problems import PROBLEM_MAKERS, draw_problem

ROWS = {
    "arc": {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "hellaswag": {"ctx": "Which is hot?", "endings": ["ice", "fire"], "label": "1"},
    "mmlu": {"question": "Which is hot?", "choices": ["ice", "fire"], "answer": 1},
    "mmlu by letter": {"question": "Which is hot?", "choices": ["ice", "fire"], "answer": "B"},
}


def opened(folder: Path, rows: list[dict[str, object]], samples: int = 2) -> Task:
    path = write_rows(folder / "rows.jsonl", rows)
    return open_choices(TaskOptions("llada2", data=path, samples=samples))


@pytest.mark.parametrize("form", ROWS)
def test_each_form_has_a_context_its_choices_and_the_right_one(form: str, tmp_path: Path) -> None:
    [item] = opened(tmp_path, [ROWS[form]]).items()
    expected = (" A", " B") if form.startswith("mmlu") else (" ice", " fire")
    assert choice_texts(item) == expected
    assert "Which is hot?" in item.question
    assert ("B. fire" in item.question) == form.startswith("mmlu")
    assert json.loads(item.gold)["right"] == 1


@pytest.mark.parametrize("change", [
    {"answer": 2}, {"answer": -1}, {"answer": "C"}, {"answer": None}, {"choices": 5},
    {"choices": []},
])  # fmt: skip
def test_a_row_of_another_form_is_named(change: Mapping[str, object], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"row 2: .*ARC.*HellaSwag.*MMLU"):
        opened(tmp_path, [ROWS["mmlu"], {**ROWS["mmlu"], **change}])


def test_the_more_probable_choice_is_the_answer_and_a_run_resumes(tmp_path: Path) -> None:
    """The model in the package ends its own text; it gives words of other questions little."""
    engine, rng = load(device="cpu"), random.Random(3)
    drawn = [draw_problem(PROBLEM_MAKERS["words"], rng, "test") for _ in range(4)]
    rows: list[dict[str, object]] = []
    for number, problem in enumerate(drawn):
        text = engine.model.tokenizer.template.render([{"role": "user", "content": problem.prompt}])
        other = drawn[number - 1].answer
        endings = [other, problem.answer] if number % 2 else [problem.answer, other]
        rows.append({"ctx": text, "endings": endings, "label": number % 2})
    task, variants = opened(tmp_path, rows), [Variant("vanilla"), Variant("topk:k=4")]
    results = run_eval(engine, [task], variants, tmp_path / "run")
    assert all(result.correct() == [True] * 4 for result in results)
    first, other = (result.answers[0] for result in results)
    assert first.output != other.output
    assert len(json.loads(first.output)["nats"]) == len(json.loads(first.output)["noise"]) == 2
    assert other.experts < first.experts
    again = run_eval(engine, [task], variants, tmp_path / "run")
    assert all(answer.from_disk for result in again for answer in result.answers)
