"""Grades of answers that are hard to read, and the deadline of a comparison."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from fractions import Fraction

import pytest
from hard_answers import GSM8K
from hard_formulas import MATH500
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shared_data import field_case, grading_cases

from coterie.errors import CoterieError
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import embedded, gsm8k, math500, open_tasks, verify
from coterie.lab.evals.tasks.latex import is_equivalent
from coterie.lab.evals.tasks.numbers import find_numbers, latex_to_plain

integers = st.integers(-(10**7), 10**7)
PLACES = ("#### {}", r"\boxed{{{}}}", "<answer>{}</answer>", "The answer is {}.")
# Text that may stand after an answer: no box, no #### and no new question in it.
prose = st.text(st.characters(exclude_characters="\\#:<{}"), max_size=60)


@pytest.mark.parametrize(("gold", "output", "is_correct"), GSM8K)
def test_gsm8k_reads_hard_answers(gold, output, is_correct):
    assert gsm8k.grade(output, gold).correct is is_correct


@pytest.mark.parametrize(("gold", "output", "is_correct"), MATH500)
def test_math500_reads_hard_answers(gold, output, is_correct):
    assert math500.grade(output, gold).correct is is_correct


@pytest.mark.parametrize(
    ("output", "gold", "is_correct"),
    [
        (r"\boxed{4\sqrt(2)}", r"4\sqrt{2}", True),
        (r"\boxed{4\sqrt(2)}", "4", False),
        (r"\boxed{\frac{1}{2006!}}", r"\frac{1}{2004!}", False),
        (r"\boxed{1/10^{12}}", "10^{-12}", True),
        (r"\boxed{\frac{1}{\sqrt{n}}}", r"\sqrt{1/n}", True),
        (r"\boxed{\sqrt{\frac{x}{y}}}", r"\frac{\sqrt{x}}{\sqrt{y}}", True),
        (r"\boxed{\sqrt{x^2}}", "x", False),
        ("The answer is sin(x).", r"\sin x", True),
        ("The answer is ln(y).", r"\ln x", False),
        (r"\boxed{3 + (-2)i}", "3-2i", True),
        (r"\boxed{3+(-2i)}", "3-2i", True),
        (r"\boxed{3-2i}", "3+2i", False),
        (r"So \boxed{\frac{1}{2}", r"\frac12", True),
        (r"So \boxed{42", "43", False),
    ],
)
def test_math500_reads_formulas_as_they_are_written(output, gold, is_correct):
    assert math500.grade(output, gold).correct is is_correct


@given(integers.filter(lambda n: n >= 0), st.sampled_from([":30", ":1", "^3", ".2.3", r"\sqrt{5}"]))
def test_a_number_that_goes_on_is_not_that_number(number, rest):
    assert not gsm8k.grade(f"#### {number}{rest}", str(number)).correct


JOINS = ("-", " - ", "\u2013", "..", " to ", " + ", "*", "-05-", " hours and ", " May ")


@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from(JOINS), st.sampled_from(PLACES))
def test_a_part_of_a_range_or_date_is_not_the_answer(first, second, join, place):
    output = place.format(f"{first}{join}{second}")
    if first != second:
        assert not gsm8k.grade(output, str(first)).correct
        assert not gsm8k.grade(output, str(second)).correct


@given(st.integers(1, 28), st.integers(1, 12), st.integers(1990, 2030), st.sampled_from("-/."))
def test_no_part_of_a_date_is_the_answer(day, month, year, mark):
    for date in (f"{day}{mark}{month:02}{mark}{year}", f"{year}{mark}{month:02}{mark}{day:02}"):
        for gold in (day, month, year):
            assert not gsm8k.grade(f"#### {date}", str(gold)).correct


@given(st.integers(3, 12))
def test_a_factorial_is_its_value_and_an_exclamation_is_none(number):
    for place in ("#### {}", "\\boxed{{{}}}"):
        output = place.format(f"{number}!")
        assert not gsm8k.grade(output, str(number)).correct
        assert gsm8k.grade(output, str(math.factorial(number))).correct
    assert gsm8k.grade(f"The answer is {number}!", str(number)).correct


@given(integers.filter(lambda n: n >= 0), st.sampled_from(PLACES))
def test_words_after_an_answer_change_nothing(number, place):
    for rest in (
        " dollars",
        " - all of it",
        "-hour",
        " of 7 days",
        " (9 eggs at $2)",
        " in 3 bags",
    ):
        assert gsm8k.grade(place.format(f"{number}{rest}"), str(number)).correct


@pytest.mark.parametrize("case", grading_cases(), ids=lambda case: str(case["id"]))
def test_answers_of_the_field_are_graded_as_expected(case):
    field_case("grading")  # skips where the folder is absent
    grade = {"gsm8k": gsm8k.grade, "math500": math500.grade}[case["task"]]
    if case["expect"] is not None:  # else either verdict is right
        assert grade(case["output"], case["gold"]).correct is case["expect"]


@pytest.mark.parametrize("grade", [gsm8k.grade, math500.grade])
@given(number=integers)
def test_a_box_at_the_end_may_lack_its_brace(grade, number):
    assert grade(rf"7 and so \boxed{{{number}", str(number)).correct


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
@settings(max_examples=50)
def test_no_output_makes_a_grader_raise(output, piece):
    for text in (output, rf"\boxed{{{output}}}", f"#### {output}", rf"\frac{piece}{output}$"):
        gsm8k.grade(text, "18")
        for name in ("words", "algebra"):
            embedded.grade(name, text, "18")
        list(math500._candidates(text))


@given(st.text("\\{}$frac12^_(), .x=", max_size=12))
@settings(max_examples=10)
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


def test_a_verifier_that_was_killed_is_no_verdict(monkeypatch):
    monkeypatch.setattr(verify, "_idle_verifiers", [])
    try:
        assert verify.is_equivalent_latex("5x", r"x \cdot 5")
        [idle] = verify._idle_verifiers
        idle.process.kill()
        idle.process.wait()
        assert verify.is_equivalent_latex("7x", r"x \cdot 7")
        busy = verify._acquire()
        os.kill(busy.process.pid, signal.SIGKILL)
        with monkeypatch.context() as patch:
            patch.setattr(verify, "_acquire", lambda: busy)
            with pytest.raises(CoterieError, match="was killed"):
                verify.is_equivalent_latex("8x", r"x \cdot 8")
        assert verify.is_equivalent_latex("8x", r"x \cdot 8")
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
