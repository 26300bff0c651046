"""Policies to draw from: every name in the table, with any of its options."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st

from coterie.routing import POLICIES, parse_policy
from coterie.specs import Option, spec_options
from coterie.values import Policy

SIZES = ("beta=0.2", "beta=0.5", "m=3", "m=9", "tau=0.5", "tau=0.9,least=2", "price=0.3", "k=2")

NO_BALLOT = ("vote=max", "vote=random")  # which no token casts


def law(examples: int = 30) -> settings:
    """At least so many examples; more where the profile says so."""
    return settings(max_examples=max(examples, settings().max_examples))


@st.composite
def spellings(draw: st.DrawFn, names: Iterable[str] = tuple(POLICIES)) -> str:
    """``name:option=value,..``: what is required, and some of the rest."""
    name = draw(st.sampled_from(sorted(names)))
    said = [draw(st.sampled_from(SIZES))] if name == "coreset" else []
    taken = {"beta", "m", "tau", "least", "price", "k"} if name == "coreset" else set()
    for option in spec_options(POLICIES[name]).values():
        if option.name in taken:
            continue
        if option.default == "required" or draw(st.integers(0, 3)) == 0:
            said.append(f"{option.name}={draw(_value_of(option))}")
    if "tally=proportional" in said:
        said = [word for word in said if not word.startswith(NO_BALLOT)]
    return f"{name}:{','.join(said)}" if said else name


def policies() -> st.SearchStrategy[Policy]:
    return spellings().map(parse_policy)


def coresets() -> st.SearchStrategy[Policy]:
    """Those that elect one set for a block."""
    names = [name for name, cls in POLICIES.items() if "voters" in spec_options(cls)]
    return spellings(names).map(parse_policy)


def _value_of(option: Option) -> st.SearchStrategy[object]:
    if option.choices:
        return st.sampled_from(option.choices)
    if option.value_type is int:
        return st.integers(1, 12) | st.sampled_from(option.keywords or (1,))
    return st.floats(0.01, min(1, option.bounds.le)).map(lambda value: repr(round(value, 3)))
