"""The problem generators, their split and their grader."""

import ast
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.evals.tasks import embedded
from coterie.problems import (
    LARGEST,
    TASKS,
    TAUGHT,
    Problem,
    draw,
    fact,
    phrase,
    split_of,
    with_other_facts,
)
from coterie.problems.code import Recipe
from coterie.problems.words import HOLDERS, NAMES, THINGS, Scene, gives_away

tasks = st.sampled_from(list(TASKS))
seeds = st.integers(0, 2**32)


def grade(made: Problem, output: str) -> bool:
    return embedded.grade(made.task, output, made.gold, trust=True).correct


def problem(task: str, seed: int) -> Problem:
    return TASKS[task](random.Random(seed))


@given(tasks, seeds)
def test_a_problem_is_a_pure_function_of_its_seed(task, seed):
    assert problem(task, seed) == problem(task, seed)


@given(tasks, seeds, st.sampled_from(["train", "test"]))
def test_a_drawn_problem_lies_on_the_side_asked_for(task, seed, split):
    assert split_of(draw(TASKS[task], random.Random(seed), split).key) == split


def test_the_two_sides_share_no_combination_and_no_question():
    rng = random.Random(0)
    sides = {side: [draw(m, rng, side) for m in TASKS.values() for _ in range(500)]
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
        assert max(int(left), int(right), int(result)) <= LARGEST
    assert grade(made, made.answer)


@given(seeds)
def test_every_drilled_fact_holds(seed):
    line = fact(random.Random(seed))
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
        made = TASKS[task](rng)
        assert grade(made, made.answer)
        assert not grade(made, made.answer.replace("return out", "return [out]"))
        assert not grade(made, made.answer.replace("def ", "def other_"))


@given(st.lists(st.integers(0, 20), max_size=8), seeds)
def test_the_source_of_a_recipe_does_what_its_meaning_says(xs, seed):
    key = TASKS["docstring"](random.Random(seed)).key
    recipe = Recipe(*key)  # type: ignore[arg-type]
    scope: dict[str, object] = {}
    exec(recipe.source("f"), scope)
    assert scope["f"](xs) == recipe.meaning(xs)  # type: ignore[operator]


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
    assert ("Tom" in NAMES, "pens" in THINGS, "boxes" in HOLDERS) == (True, True, True)
    scene, rng = Scene("Tom", "Anna", "pens", "books", "boxes"), random.Random(0)
    told = {made.question: made.result for made in (gives_away(rng, scene) for _ in range(20_000))}
    assert told[asked] == 7


@given(st.sampled_from(["words", "algebra"]), seeds, seeds)
def test_worked_steps_with_other_facts_keep_their_wording_and_hold(task, seed, other):
    steps = problem(task, seed).answer
    parts = list(with_other_facts(steps, random.Random(other)))
    loosened = "".join(text for text, _ in parts)
    blank = re.compile(r"\d+ ([-+*/]) \d+ = \d+")
    assert blank.sub(r"\1", loosened) == blank.sub(r"\1", steps)
    found = re.findall(r"(\d+ [-+*/] \d+) = (\d+)", loosened)
    assert all(eval(left) == int(result) for left, result in found)
    assert [text for text, is_result in parts if is_result] == [f" {result}" for _, result in found]


@given(seeds)
def test_a_phrase_shows_the_words_and_hides_code_that_python_reads(seed):
    shown, hidden, after = phrase(random.Random(seed))
    assert "\n" in shown
    assert ast.parse(hidden.strip(), mode="eval")
    assert not any(sign in after for sign in "<>%*/")


def test_what_is_asked_is_no_lookup_every_kind_has_many_combinations():
    rng = random.Random(0)
    combinations: dict[str, set[tuple[str | int, ...]]] = {}
    for maker in (TASKS["words"], TASKS["algebra"]):
        for _ in range(20_000):
            key = maker(rng).key
            combinations.setdefault(str(key[0]), set()).add(key)
    assert "times-as-many" not in combinations
    assert {kind: len(keys) for kind, keys in combinations.items() if len(keys) < 200} == {}


def test_training_also_draws_what_is_not_asked():
    rng = random.Random(0)
    assert "times-as-many" in {TAUGHT["words"](rng).key[0] for _ in range(200)}
