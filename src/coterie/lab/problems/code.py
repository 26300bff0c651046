"""Small Python functions from a docstring (HumanEval) or from a sentence and asserts (MBPP)."""

from __future__ import annotations

import random
from dataclasses import dataclass

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

    @property
    def key(self) -> tuple[str | int, ...]:
        return (
            self.filter_name,
            self.filter_constant,
            self.map_name,
            self.map_constant,
            self.reduce_name,
        )

    def description(self) -> str:
        filter_words = FILTERS[self.filter_name][0].format(c=self.filter_constant)
        map_words = MAPS[self.map_name][0].format(c=self.map_constant)
        return f"{REDUCTIONS[self.reduce_name]} {filter_words} in xs{map_words}"

    def source_code(self, name: str) -> str:
        test = FILTERS[self.filter_name][1].format(c=self.filter_constant)
        value = MAPS[self.map_name][1].format(c=self.map_constant)
        start, step = REDUCTION_CODE[self.reduce_name]
        lines = [f"def {name}(xs):", f"    {start}", "    for x in xs:"]
        indent = "        "
        if test:
            lines.append(f"{indent}if {test}:")
            indent += "    "
        lines.append(indent + step.format(value=value))
        return "\n".join([*lines, "    return out"])

    def evaluate(self, xs: list[Integer]) -> Integer | list[Integer]:
        """The return value of the function, computed without its source code."""
        values = [_apply_map(self, x) for x in xs if _passes_filter(self, x)]
        match self.reduce_name:
            case "sum":
                return sum(values)
            case "count":
                return len(values)
            case "max":
                return max([0, *values])
            case _:
                return values if self.reduce_name == "list" else values[::-1]


FILTERS = {  # description, test
    "all": ("the numbers", ""),
    "even": ("the even numbers", "x % 2 == 0"),
    "odd": ("the odd numbers", "x % 2 == 1"),
    "above": ("the numbers greater than {c}", "x > {c}"),
    "below": ("the numbers less than {c}", "x < {c}"),
    "except": ("the numbers other than {c}", "x != {c}"),
    "multiple": ("the multiples of {c}", "x % {c} == 0"),
}
MAPS = {  # description, expression
    "none": ("", "x"),
    "plus": (", each plus {c}", "x + {c}"),
    "minus": (", each minus {c}", "x - {c}"),
    "times": (", each times {c}", "x * {c}"),
    "square": (", each squared", "x * x"),
}
REDUCTIONS = {
    "sum": "the sum of",
    "count": "the count of",
    "max": "the largest of 0 and",
    "list": "a list of",
    "reversed": "a reversed list of",
}
REDUCTION_CODE = {  # first line, loop body
    "sum": ("out = 0", "out = out + {value}"),
    "count": ("out = 0", "out = out + 1"),
    "max": ("out = 0", "out = max(out, {value})"),
    "list": ("out = []", "out.append({value})"),
    "reversed": ("out = []", "out.insert(0, {value})"),
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
    test = FILTERS[spec.filter_name][1].format(c=spec.filter_constant)
    if test and rng.random() < 0.5:
        return (
            f" {FILTERS[spec.filter_name][0].format(c=spec.filter_constant)}\n        if",
            f" {test}",
            ":",
        )
    map_name = rng.choice([name for name in MAPS if name != "none"])
    constant = 0 if map_name in WITHOUT_CONSTANT else rng.randint(2, 9)
    words, value = (text.format(c=constant) for text in MAPS[map_name])
    before, after = rng.choice([step for _, step in REDUCTION_CODE.values() if "{" in step]).split(
        "{value}"
    )
    gap = " " if before.endswith(" ") else ""
    return f"{words}\n            {before.rstrip()}", f"{gap}{value}", after


def _make_problem(
    task: str, spec: FunctionSpec, name: str, *, prompt: str, rng: random.Random
) -> Problem:
    return Problem(
        task=task,
        key=spec.key,
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


def _passes_filter(spec: FunctionSpec, x: Integer) -> bool:
    match spec.filter_name:
        case "even" | "odd":
            return x % 2 == (spec.filter_name == "odd")
        case "above":
            return x > spec.filter_constant
        case "below":
            return x < spec.filter_constant
        case "except":
            return x != spec.filter_constant
        case "multiple":
            return x % spec.filter_constant == 0
        case _:
            return True


def _apply_map(spec: FunctionSpec, x: Integer) -> Integer:
    match spec.map_name:
        case "plus":
            return x + spec.map_constant
        case "minus":
            return x - spec.map_constant
        case "times":
            return x * spec.map_constant
        case "square":
            return x * x
        case _:
            return x
