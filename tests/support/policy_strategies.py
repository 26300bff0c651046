"""Policies to draw from: every name of the table with any of its options."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st

from coterie.routing import POLICIES, parse_policy
from coterie.specs import Option, spec_options
from coterie.values import Policy

SIZES = ("beta=0.2", "beta=0.5", "m=3", "m=9", "tau=0.5", "tau=0.9,least=2", "price=0.3", "k=2")

WITHOUT_BALLOTS = ("vote=max", "vote=random")  # votes that tokens do not cast one by one


def law(examples: int = 30) -> settings:
    """So many examples, a third by default; in another profile at least as many as it has."""
    if settings.get_current_profile_name() == "default":
        return settings(max_examples=min(examples, max(5, examples // 3)))
    return settings(max_examples=max(examples, settings().max_examples))


@st.composite
def spellings(draw: st.DrawFn, names: Iterable[str] = tuple(POLICIES)) -> str:
    """``name:option=value,..`` with the required options and some of the optional ones."""
    name = draw(st.sampled_from(sorted(names)))
    options = [draw(st.sampled_from(SIZES))] if name == "coreset" else []
    excluded = {"beta", "m", "tau", "least", "price", "k"} if name == "coreset" else set()
    for option in spec_options(POLICIES[name]).values():
        if option.name in excluded:
            continue
        if option.default == "required" or draw(st.integers(0, 3)) == 0:
            options.append(f"{option.name}={draw(_value_of(option))}")
    if "tally=proportional" in options:
        options = [text for text in options if not text.startswith(WITHOUT_BALLOTS)]
    return f"{name}:{','.join(options)}" if options else name


def policies() -> st.SearchStrategy[Policy]:
    return spellings().map(parse_policy)


def coresets() -> st.SearchStrategy[Policy]:
    """Policies that elect one coreset for a block."""
    names = [name for name, cls in POLICIES.items() if "voters" in spec_options(cls)]
    return spellings(names).map(parse_policy)


def _value_of(option: Option) -> st.SearchStrategy[object]:
    if option.value_type is str:
        return st.sampled_from(option.words)
    if option.value_type is int:
        return st.integers(1, 12) | st.sampled_from(option.words or (1,))
    return st.floats(0.01, min(1, option.bounds.le)).map(lambda value: repr(round(value, 3)))
