"""The problem generators, their split and their grader."""

import ast
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.lab.evals.tasks import embedded
from coterie.lab.problems import (
    MAX_NUMBER,
    PROBLEM_MAKERS,
    TRAINING_MAKERS,
    Problem,
    code_phrase,
    draw_equation,
    draw_problem,
    replace_equations,
    split_of,
)
from coterie.lab.problems.code import FunctionSpec
from coterie.lab.problems.words import CONTAINERS, ITEMS, NAMES, ProblemSetting, gives_away

tasks = st.sampled_from(list(PROBLEM_MAKERS))
seeds = st.integers(0, 2**32)


def grade(made: Problem, output: str) -> bool:
    return embedded.grade(made.task, output, made.gold, trust=True).correct


def problem(task: str, seed: int) -> Problem:
    return PROBLEM_MAKERS[task](random.Random(seed))


@given(tasks, seeds)
def test_a_problem_is_a_pure_function_of_its_seed(task, seed):
    assert problem(task, seed) == problem(task, seed)


@given(tasks, seeds, st.sampled_from(["train", "test"]))
def test_drawn_problem_has_the_requested_split(task, seed, split):
    assert split_of(draw_problem(PROBLEM_MAKERS[task], random.Random(seed), split).key) == split


def test_splits_share_no_key_and_no_question():
    rng = random.Random(0)
    sides = {side: [draw_problem(m, rng, side) for m in PROBLEM_MAKERS.values() for _ in range(500)]
             for side in ("train", "test")}  # fmt: skip
    assert not {p.key for p in sides["train"]} & {p.key for p in sides["test"]}
    assert not {p.prompt for p in sides["train"]} & {p.prompt for p in sides["test"]}


@given(st.sampled_from(["words", "algebra"]), seeds)
def test_every_equation_of_a_worked_answer_holds_and_stays_in_the_tables(task, seed):
    made = problem(task, seed)
    found = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", made.answer)
    assert found
    for left, sign, right, result in found:
        exact = {"+": int(left) + int(right), "-": int(left) - int(right),
                 "*": int(left) * int(right), "/": int(left) / int(right)}[sign]  # fmt: skip
        assert exact == int(result)
        assert max(int(left), int(right), int(result)) <= MAX_NUMBER
    assert grade(made, made.answer)


@given(seeds)
def test_every_drilled_fact_holds(seed):
    line = draw_equation(random.Random(seed))
    left, result = line.split(" = ")
    assert eval(left) == int(result)


@given(st.sampled_from(["words", "algebra"]), seeds)
def test_another_number_is_wrong(task, seed):
    made = problem(task, seed)
    head, tail = made.answer.rsplit(made.gold, 1)
    assert not grade(made, f"{head}{int(made.gold) + 1}{tail}")
    assert not grade(made, "")


@pytest.mark.parametrize("task", ["docstring", "sentence"])
def test_worked_functions_pass_their_asserts_and_broken_ones_do_not(task):
    rng = random.Random(5)
    for _ in range(5):
        made = PROBLEM_MAKERS[task](rng)
        assert grade(made, made.answer)
        assert not grade(made, made.answer.replace("return out", "return [out]"))
        assert not grade(made, made.answer.replace("def ", "def other_"))


@given(st.lists(st.integers(0, 20), max_size=8), seeds)
def test_source_code_equals_evaluate(xs, seed):
    key = PROBLEM_MAKERS["docstring"](random.Random(seed)).key
    recipe = FunctionSpec(*key)  # type: ignore[arg-type]
    scope: dict[str, object] = {}
    exec(recipe.source_code("f"), scope)
    assert scope["f"](xs) == recipe.evaluate(xs)  # type: ignore[operator]


@pytest.mark.parametrize(
    "program",
    [
        "x = [0] * 10**10",
        "def f(): return f()\nf()",
        "1 / 0",
        "this is not python",
        "raise SystemExit",
        "x = 3and 4; assert not x",
    ],
)
def test_a_program_that_fails_does_not_pass(program):
    assert not embedded.grade("docstring", program, "", trust=True).correct


def test_a_right_program_passes():
    right = embedded.grade("docstring", "x = [1]\nx.append(2)", "assert sum(x) == 3", trust=True)
    assert right.correct


def test_the_question_of_the_demo_lies_inside_what_is_learned():
    asked = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
    assert ("Tom" in NAMES, "pens" in ITEMS, "boxes" in CONTAINERS) == (True, True, True)
    scene, rng = ProblemSetting("Tom", "Anna", "pens", "books", "boxes"), random.Random(0)
    told = {made.question: made.result for made in (gives_away(rng, scene) for _ in range(20_000))}
    assert told[asked] == 7


@given(st.sampled_from(["words", "algebra"]), seeds, seeds)
def test_worked_steps_with_other_facts_keep_their_wording_and_hold(task, seed, other):
    steps = problem(task, seed).answer
    parts = list(replace_equations(steps, random.Random(other)))
    loosened = "".join(text for text, _ in parts)
    blank = re.compile(r"\d+ ([-+*/]) \d+ = \d+")
    assert blank.sub(r"\1", loosened) == blank.sub(r"\1", steps)
    found = re.findall(r"(\d+ [-+*/] \d+) = (\d+)", loosened)
    assert all(eval(left) == int(result) for left, result in found)
    assert [text for text, is_result in parts if is_result] == [f" {result}" for _, result in found]


@given(seeds)
def test_a_phrase_shows_the_words_and_hides_code_that_python_reads(seed):
    shown, hidden, after = code_phrase(random.Random(seed))
    assert "\n" in shown
    assert ast.parse(hidden.strip(), mode="eval")
    assert not any(sign in after for sign in "<>%*/")


def test_every_evaluated_kind_has_many_combinations():
    rng = random.Random(0)
    combinations: dict[str, set[tuple[str | int, ...]]] = {}
    for maker in (PROBLEM_MAKERS["words"], PROBLEM_MAKERS["algebra"]):
        for _ in range(20_000):
            key = maker(rng).key
            combinations.setdefault(str(key[0]), set()).add(key)
    assert "times-as-many" not in combinations
    assert {kind: len(keys) for kind, keys in combinations.items() if len(keys) < 200} == {}


def test_training_includes_training_only_kinds():
    rng = random.Random(0)
    assert "times-as-many" in {TRAINING_MAKERS["words"](rng).key[0] for _ in range(200)}
