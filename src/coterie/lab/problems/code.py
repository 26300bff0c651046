"""Small Python functions from a docstring (HumanEval) or from a sentence and asserts (MBPP)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import astuple, dataclass

from coterie.lab.problems.problem import Problem

VERBS = [
    *("get", "make", "find", "take", "give", "pick", "run", "do", "work", "solve"),
    *("build", "form", "read", "show", "tell"),
]
NOUNS = [
    *("result", "value", "answer", "part", "item", "thing", "figure", "output", "piece", "score"),
    *("report", "note", "case", "batch", "block"),
]

Integer = int


@dataclass(frozen=True)
class FunctionSpec:
    """A function on a list of integers: a filter, a map and a reduction.

    Its description, its source code and its result follow from these three choices.
    """

    filter_name: str
    filter_constant: int
    map_name: str
    map_constant: int
    reduce_name: str

    def description(self) -> str:
        filter_words, _ = FILTERS[self.filter_name].texts(self.filter_constant)
        map_words, _ = MAPS[self.map_name].texts(self.map_constant)
        return f"{REDUCTIONS[self.reduce_name].words} {filter_words} in xs{map_words}"

    def source_code(self, name: str) -> str:
        _, test = FILTERS[self.filter_name].texts(self.filter_constant)
        _, value = MAPS[self.map_name].texts(self.map_constant)
        reduction = REDUCTIONS[self.reduce_name]
        lines = [f"def {name}(xs):", f"    out = {reduction.start}", "    for x in xs:"]
        indent = "        "
        if test:
            lines.append(f"{indent}if {test}:")
            indent += "    "
        lines.append(indent + reduction.code.format(value=value))
        return "\n".join([*lines, "    return out"])

    def evaluate(self, xs: list[Integer]) -> Integer | list[Integer]:
        """The return value of the function, computed without its source code."""
        passes, mapped = FILTERS[self.filter_name].function, MAPS[self.map_name].function
        values = [mapped(x, self.map_constant) for x in xs if passes(x, self.filter_constant)]
        return REDUCTIONS[self.reduce_name].function(values)


@dataclass(frozen=True)
class Part:
    """A filter or a map: its description, its code, and the same as a function of x and c."""

    words: str
    code: str
    function: Callable[[Integer, Integer], Integer]

    def texts(self, c: Integer) -> tuple[str, str]:
        """The description and the code, with the constant."""
        return self.words.format(c=c), self.code.format(c=c)


@dataclass(frozen=True)
class Reduction:
    """A reduction: its description, its first value, its loop body, and the same as a function."""

    words: str
    start: str
    code: str
    function: Callable[[list[Integer]], Integer | list[Integer]]


FILTERS = {
    "all": Part("the numbers", "", lambda x, c: True),
    "even": Part("the even numbers", "x % 2 == 0", lambda x, c: x % 2 == 0),
    "odd": Part("the odd numbers", "x % 2 == 1", lambda x, c: x % 2 == 1),
    "above": Part("the numbers greater than {c}", "x > {c}", lambda x, c: x > c),
    "below": Part("the numbers less than {c}", "x < {c}", lambda x, c: x < c),
    "except": Part("the numbers other than {c}", "x != {c}", lambda x, c: x != c),
    "multiple": Part("the multiples of {c}", "x % {c} == 0", lambda x, c: x % c == 0),
}
MAPS = {
    "none": Part("", "x", lambda x, c: x),
    "plus": Part(", each plus {c}", "x + {c}", lambda x, c: x + c),
    "minus": Part(", each minus {c}", "x - {c}", lambda x, c: x - c),
    "times": Part(", each times {c}", "x * {c}", lambda x, c: x * c),
    "square": Part(", each squared", "x * x", lambda x, c: x * x),
}
REDUCTIONS = {
    "sum": Reduction("the sum of", "0", "out = out + {value}", sum),
    "count": Reduction("the count of", "0", "out = out + 1", len),
    "max": Reduction(
        "the largest of 0 and", "0", "out = max(out, {value})", lambda xs: max([0, *xs])
    ),
    "list": Reduction("a list of", "[]", "out.append({value})", list),
    "reversed": Reduction(
        "a reversed list of", "[]", "out.insert(0, {value})", lambda xs: xs[::-1]
    ),
}
WITHOUT_CONSTANT = {"all", "even", "odd", "none", "square"}  # filters and maps


def docstring_problem(rng: random.Random) -> Problem:
    """Complete a function from its signature and docstring, as in HumanEval."""
    spec, name = _draw_spec(rng), _draw_name(rng)
    prompt = f'def {name}(xs):\n    """Return {spec.description()}."""'
    return _make_problem("docstring", spec, name, prompt=prompt, rng=rng)


def sentence_problem(rng: random.Random) -> Problem:
    """Write a function from a sentence and asserts, as in MBPP."""
    spec, name = _draw_spec(rng), _draw_name(rng)
    examples = "\n".join(_draw_asserts(spec, name, rng, count=2, shortest=1, longest=2))
    prompt = f"Write a function that returns {spec.description()}.\n{examples}"
    return _make_problem("sentence", spec, name, prompt=prompt, rng=rng)


def code_phrase(rng: random.Random) -> tuple[str, str, str]:
    """A phrase of a description, the code that it becomes, and the text after that code."""
    spec = _draw_spec(rng)
    words, test = FILTERS[spec.filter_name].texts(spec.filter_constant)
    if test and rng.random() < 0.5:
        return f" {words}\n        if", f" {test}", ":"
    map_name = rng.choice([name for name in MAPS if name != "none"])
    constant = 0 if map_name in WITHOUT_CONSTANT else rng.randint(2, 9)
    words, value = MAPS[map_name].texts(constant)
    steps = [reduction.code for reduction in REDUCTIONS.values() if "{" in reduction.code]
    before, after = rng.choice(steps).split("{value}")
    gap = " " if before.endswith(" ") else ""
    return f"{words}\n            {before.rstrip()}", f"{gap}{value}", after


def _make_problem(
    task: str, spec: FunctionSpec, name: str, *, prompt: str, rng: random.Random
) -> Problem:
    return Problem(
        task=task,
        key=astuple(spec),
        prompt=prompt,
        answer=spec.source_code(name),
        gold="\n".join(_draw_asserts(spec, name, rng, count=6, shortest=3, longest=8)),
    )


def _draw_spec(rng: random.Random) -> FunctionSpec:
    reduce_name = rng.choice(list(REDUCTIONS))
    filter_name = rng.choice(list(FILTERS))
    map_name = "none" if reduce_name == "count" else rng.choice(list(MAPS))
    return FunctionSpec(
        filter_name=filter_name,
        filter_constant=0 if filter_name in WITHOUT_CONSTANT else rng.randint(2, 9),
        map_name=map_name,
        map_constant=0 if map_name in WITHOUT_CONSTANT else rng.randint(2, 9),
        reduce_name=reduce_name,
    )


def _draw_name(rng: random.Random) -> str:
    return f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"


def _draw_asserts(
    spec: FunctionSpec, name: str, rng: random.Random, *, count: int, shortest: int, longest: int
) -> list[str]:
    inputs = [
        [rng.randint(0, 12) for _ in range(rng.randint(shortest, longest))] for _ in range(count)
    ]
    return [f"assert {name}({xs}) == {spec.evaluate(xs)}" for xs in inputs]
