"""Small Python functions, asked for by a docstring (HumanEval) or a sentence and asserts (MBPP)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from coterie.problems.problem import Problem

VERBS = [
    *("get", "make", "find", "take", "give", "pick", "run", "do", "work", "solve"),
    *("build", "form", "read", "show", "tell"),
]
NOUNS = [
    *("result", "value", "answer", "part", "item", "thing", "figure", "output", "piece", "score"),
    *("report", "note", "case", "batch", "block"),
]

Number = int


@dataclass(frozen=True)
class Recipe:
    """What a function does to a list: keep some numbers, change each, gather them.

    The words, the source and the meaning are read off the same three choices.
    """

    keep: str
    keep_by: int
    change: str
    change_by: int
    gather: str

    @property
    def key(self) -> tuple[str | int, ...]:
        return (self.keep, self.keep_by, self.change, self.change_by, self.gather)

    def words(self) -> str:
        kept = KEEPS[self.keep][0].format(c=self.keep_by)
        changed = CHANGES[self.change][0].format(c=self.change_by)
        return f"{GATHERS[self.gather]} {kept} in xs{changed}"

    def source(self, name: str) -> str:
        test = KEEPS[self.keep][1].format(c=self.keep_by)
        value = CHANGES[self.change][1].format(c=self.change_by)
        start, step = BODIES[self.gather]
        lines = [f"def {name}(xs):", f"    {start}", "    for x in xs:"]
        indent = "        "
        if test:
            lines.append(f"{indent}if {test}:")
            indent += "    "
        lines.append(indent + step.format(value=value))
        return "\n".join([*lines, "    return out"])

    def meaning(self, xs: list[Number]) -> Number | list[Number]:
        """What the function returns, computed without its source."""
        values = [_change(self, x) for x in xs if _keeps(self, x)]
        match self.gather:
            case "sum":
                return sum(values)
            case "count":
                return len(values)
            case "max":
                return max([0, *values])
            case _:
                return values if self.gather == "list" else values[::-1]


KEEPS = {  # words, test
    "all": ("the numbers", ""),
    "even": ("the even numbers", "x % 2 == 0"),
    "odd": ("the odd numbers", "x % 2 == 1"),
    "above": ("the numbers greater than {c}", "x > {c}"),
    "below": ("the numbers less than {c}", "x < {c}"),
    "except": ("the numbers other than {c}", "x != {c}"),
    "multiple": ("the multiples of {c}", "x % {c} == 0"),
}
CHANGES = {  # words, expression
    "none": ("", "x"),
    "plus": (", each plus {c}", "x + {c}"),
    "minus": (", each minus {c}", "x - {c}"),
    "times": (", each times {c}", "x * {c}"),
    "square": (", each squared", "x * x"),
}
GATHERS = {
    "sum": "the sum of",
    "count": "the count of",
    "max": "the largest of 0 and",
    "list": "a list of",
    "reversed": "a reversed list of",
}
BODIES = {  # first line, step
    "sum": ("out = 0", "out = out + {value}"),
    "count": ("out = 0", "out = out + 1"),
    "max": ("out = 0", "out = max(out, {value})"),
    "list": ("out = []", "out.append({value})"),
    "reversed": ("out = []", "out.insert(0, {value})"),
}
BARE = {"all", "even", "odd", "none", "square"}  # choices without a constant


def docstring_problem(rng: random.Random) -> Problem:
    """A function from its signature and docstring, as in HumanEval."""
    recipe, name = _recipe(rng), _name(rng)
    prompt = f'def {name}(xs):\n    """Return {recipe.words()}."""'
    return _problem("docstring", recipe, name, prompt=prompt, rng=rng)


def sentence_problem(rng: random.Random) -> Problem:
    """A function from a sentence and an assert, as in MBPP."""
    recipe, name = _recipe(rng), _name(rng)
    examples = "\n".join(_asserts(recipe, name, rng, count=2, shortest=1, longest=2))
    prompt = f"Write a function that returns {recipe.words()}.\n{examples}"
    return _problem("sentence", recipe, name, prompt=prompt, rng=rng)


def phrase(rng: random.Random) -> tuple[str, str, str]:
    """Words of a recipe with the line of code they become: shown, hidden, shown again."""
    recipe = _recipe(rng)
    test = KEEPS[recipe.keep][1].format(c=recipe.keep_by)
    if test and rng.random() < 0.5:
        return f" {KEEPS[recipe.keep][0].format(c=recipe.keep_by)}\n        if", f" {test}", ":"
    change = rng.choice([name for name in CHANGES if name != "none"])
    by = 0 if change in BARE else rng.randint(2, 9)
    words, value = (text.format(c=by) for text in CHANGES[change])
    before, after = rng.choice([step for _, step in BODIES.values() if "{" in step]).split(
        "{value}"
    )
    gap = " " if before.endswith(" ") else ""
    return f"{words}\n            {before.rstrip()}", f"{gap}{value}", after


def _problem(task: str, recipe: Recipe, name: str, *, prompt: str, rng: random.Random) -> Problem:
    return Problem(
        task=task,
        key=recipe.key,
        prompt=prompt,
        answer=recipe.source(name),
        gold="\n".join(_asserts(recipe, name, rng, count=6, shortest=3, longest=8)),
    )


def _recipe(rng: random.Random) -> Recipe:
    gather = rng.choice(list(GATHERS))
    keep = rng.choice(list(KEEPS))
    change = "none" if gather == "count" else rng.choice(list(CHANGES))
    return Recipe(
        keep=keep,
        keep_by=0 if keep in BARE else rng.randint(2, 9),
        change=change,
        change_by=0 if change in BARE else rng.randint(2, 9),
        gather=gather,
    )


def _name(rng: random.Random) -> str:
    return f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"


def _asserts(
    recipe: Recipe, name: str, rng: random.Random, *, count: int, shortest: int, longest: int
) -> list[str]:
    inputs = [
        [rng.randint(0, 12) for _ in range(rng.randint(shortest, longest))] for _ in range(count)
    ]
    return [f"assert {name}({xs}) == {recipe.meaning(xs)}" for xs in inputs]


def _keeps(recipe: Recipe, x: Number) -> bool:
    match recipe.keep:
        case "even" | "odd":
            return x % 2 == (recipe.keep == "odd")
        case "above":
            return x > recipe.keep_by
        case "below":
            return x < recipe.keep_by
        case "except":
            return x != recipe.keep_by
        case "multiple":
            return x % recipe.keep_by == 0
        case _:
            return True


def _change(recipe: Recipe, x: Number) -> Number:
    match recipe.change:
        case "plus":
            return x + recipe.change_by
        case "minus":
            return x - recipe.change_by
        case "times":
            return x * recipe.change_by
        case "square":
            return x * x
        case _:
            return x
