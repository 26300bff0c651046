"""Prompts of a calibration: from training problems, and from files."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import CoterieError
from coterie.lab.calibration import TaskOptions, prompts_from_file, prompts_from_tasks
from coterie.lab.problems import PROBLEM_MAKERS, draw_problem, split_of


@given(st.integers(0, 2**32))
def test_prompts_are_from_the_training_split(seed: int):
    names = ["words", "algebra"]  # code tasks would start a sandbox
    prompts = prompts_from_tasks(names, 3, TaskOptions("llada2", seed=seed)).prompts
    assert len(prompts) == 3 * len(names)
    for name, n in product(names, range(3)):
        rng = random.Random(f"calibration/{name}/{seed}")
        drawn = [draw_problem(PROBLEM_MAKERS[name], rng, "train") for _ in range(n + 1)][n]
        assert split_of(drawn.key) == "train"
        assert drawn.prompt in {prompt.text for prompt in prompts}


def test_prompts_grade_answers():
    rng = random.Random("calibration/words/4")
    problem = draw_problem(PROBLEM_MAKERS["words"], rng, "train")
    (prompt,) = prompts_from_tasks(["words"], 1, TaskOptions("llada2", seed=4)).prompts
    assert prompt.is_correct is not None
    assert (prompt.text, prompt.is_correct(problem.answer)) == (problem.prompt, True)
    assert not prompt.is_correct(problem.answer + "7")


def test_prompts_come_from_a_file(tmp_path: Path):
    plain, lines = tmp_path / "plain.txt", tmp_path / "some.jsonl"
    plain.write_text("first one\n\nsecond\n")
    lines.write_text('{"prompt": "first one", "id": 3}\n{"prompt": "a\\nb"}\n')
    assert [q.text for q in prompts_from_file(plain).prompts] == ["first one", "second"]
    assert [q.text for q in prompts_from_file(lines).prompts] == ["first one", "a\nb"]
    assert not prompts_from_file(plain).is_graded


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"\n \n", "holds no prompts"),
        (b'{"prompt": "a"}\n{"prompt"', "line 2: not JSON"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "line 1: not JSON (a number in it has more"),
        (b'{"prompt": "a"}\n\n{"question": "b"}', 'line 3: no text under "prompt"'),
        (b'{"prompt": ""}', 'line 1: no text under "prompt"'),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_broken_prompt_file_raises(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(CoterieError) as caught:
        prompts_from_file(path)
    assert str(caught.value).startswith(f"{path}")
    assert message in str(caught.value)
