"""Specs: one text for each value, and errors that name the option or the entry of a list."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from coterie.errors import SpecError
from coterie.specs import (
    PositiveFractions,
    PositiveInt,
    check_options,
    format_spec,
    parse_spec,
    spec_options,
)


@dataclass(frozen=True)
class Budget:
    beta: PositiveFractions
    m: PositiveInt | tuple[PositiveInt, ...] | None = None
    voters: Literal["all", "some"] | tuple[Literal["all", "some"], ...] = "all"
    least: PositiveInt = 1

    __post_init__ = check_options


TABLE: dict[str, type[Budget]] = {"budget": Budget}

shares = st.floats(0, 1, exclude_min=True)
counts = st.integers(1, 10**6)


def one_or_more(entries: st.SearchStrategy) -> st.SearchStrategy:
    return entries | st.lists(entries, min_size=2, max_size=50).map(tuple)


budgets = st.builds(
    Budget,
    beta=one_or_more(shares),
    m=st.none() | one_or_more(counts),
    voters=one_or_more(st.sampled_from(["all", "some"])),
    least=counts,
)


@given(budgets)
def test_a_formatted_spec_parses_to_the_same_value(budget: Budget):
    text = format_spec(budget, TABLE)
    assert parse_spec(text, TABLE, "budget") == budget
    assert format_spec(parse_spec(text, TABLE, "budget"), TABLE) == text


@given(shares)
def test_one_number_stays_a_number(share: float):
    budget = parse_spec(f"budget:beta={share!r}", TABLE, "budget")
    assert (type(budget.beta), budget.beta) == (float, share)


@given(st.lists(shares, min_size=2, max_size=9))
def test_a_list_reads_as_a_tuple_in_order(entries: list[float]):
    text = " / ".join(map(repr, entries))
    assert parse_spec(f"budget:beta={text},least=2", TABLE, "budget").beta == tuple(entries)


@given(st.lists(shares, min_size=2, max_size=9), st.data(), st.floats())
def test_an_error_names_the_entry_that_is_out_of_range(entries: list[float], data, wrong: float):
    assume(not 0 < wrong <= 1)
    index = data.draw(st.integers(0, len(entries) - 1))
    entries[index] = wrong
    message = re.escape(
        f"entry {index + 1} of {len(entries)} of beta must be above 0 and at most 1, not {wrong!r}"
    )
    with pytest.raises(SpecError, match=message):
        Budget(beta=tuple(entries))
    with pytest.raises(SpecError, match=message):
        parse_spec(f"budget:beta={'/'.join(map(repr, entries))}", TABLE, "budget")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta=0.3//0.2", "entry 2 of 3 of beta is empty"),
        ("beta=0.3/", "entry 2 of 2 of beta is empty"),
        ("beta=/0.3/0.2", "entry 1 of 3 of beta is empty"),
        ("beta=/", "entry 1 of 2 of beta is empty"),
        ("beta=", "'beta=' is not of the form option=value"),
        ("beta=0.3/much", "entry 2 of 2 of beta must be a number, not 'much'"),
        ("beta=0.3/0.2,m=3/1.5", "entry 2 of 2 of m must be a whole number, not '1.5'"),
        ("beta=0.3,m=3/0", "entry 2 of 2 of m must be at least 1, not 0"),
        ("beta=0.3,voters=all/none", "entry 2 of 2 of voters must be one of all, some, not 'none'"),
        ("beta=0.3,least=3/2", "least must be a whole number, not '3/2'"),
    ],
)
def test_an_invalid_text_is_an_error_of_one_line(text: str, message: str):
    with pytest.raises(SpecError, match=re.escape(message)) as error:
        parse_spec(f"budget:{text}", TABLE, "budget")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        ((), "beta as a list needs two entries or more, not ()"),
        ((0.3,), "beta as a list needs two entries or more, not (0.3,)"),
        ([0.3, 0.2], "beta must be of type float or a tuple of it, not [0.3, 0.2]"),
        ((0.3, True), "entry 2 of 2 of beta must be of type float, not True"),
        ((0.3, (0.2, 0.1)), "entry 2 of 2 of beta must be of type float, not (0.2, 0.1)"),
        ((0.3, None), "entry 2 of 2 of beta must be of type float, not None"),
        (None, "beta must be of type float or a tuple of it, not None"),
    ],
)
def test_an_invalid_value_in_code_is_an_error(beta, message: str):
    with pytest.raises(SpecError, match=re.escape(message)):
        Budget(beta=beta)


def test_only_an_option_with_a_tuple_type_takes_a_list():
    with pytest.raises(SpecError, match=re.escape("least must be of type int, not (1, 2)")):
        Budget(beta=0.5, least=(1, 2))  # pyright: ignore[reportArgumentType]
    assert {name: option.accepts_list for name, option in spec_options(Budget).items()} == {
        "beta": True,
        "m": True,
        "voters": True,
        "least": False,
    }


def test_equal_specs_have_one_hash():
    first, second = (
        parse_spec(f"budget:beta={text}", TABLE, "budget") for text in ("1/.5", "1.0/0.50")
    )
    assert len({first, second}) == 1
    assert format_spec(first, TABLE) == "budget:beta=1/0.5"


@given(digits=st.integers(101, 6000), sign=st.sampled_from([1, -1]))
def test_a_number_without_end_is_refused(digits: int, sign: int) -> None:
    with pytest.raises(SpecError, match="digits"):
        Budget(0.5, m=sign * 10**digits)
    with pytest.raises(SpecError, match="digits"):
        Budget(sign * 10**digits)
