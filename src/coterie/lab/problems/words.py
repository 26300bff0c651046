"""Word problems like those of GSM8K: worked steps, then ``#### n``."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from coterie.lab.problems.facts import MAX_NUMBER, draw_product, draw_product_and_term
from coterie.lab.problems.problem import Problem, WorkedProblem

NAMES = [
    *("Tom", "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris"),
    *("Jack", "Kate", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Vera"),
]
ITEMS = [
    *("pens", "books", "apples", "cards", "coins", "stamps", "eggs", "marbles", "cookies"),
    *("shells", "stickers", "pears", "beads", "balls", "plums", "toys"),
]
CONTAINERS = ["boxes", "bags", "packs", "jars", "rows", "piles", "baskets", "trays"]


@dataclass(frozen=True)
class ProblemSetting:
    """The names and the items of a problem."""

    name: str
    other_name: str
    items: str
    other_items: str
    containers: str

    @staticmethod
    def sample(rng: random.Random) -> ProblemSetting:
        name, other_name = rng.sample(NAMES, 2)
        items, other_items = rng.sample(ITEMS, 2)
        return ProblemSetting(name, other_name, items, other_items, rng.choice(CONTAINERS))


WordProblemMaker = Callable[[random.Random, ProblemSetting], WorkedProblem]


def gives_away(rng: random.Random, s: ProblemSetting) -> WorkedProblem:
    a, b, p, c, left = draw_product_and_term(rng, "-")
    gone, doing = rng.choice(
        [("gives away", "giving away"), ("loses", "losing"), ("sells", "selling")]
    )
    return WorkedProblem(
        (a, b, c),
        f"{s.name} has {a} {s.containers} of {b} {s.items} and {gone} {c}. "
        f"How many {s.items} are left?",
        f"{s.name} has {a} * {b} = {p} {s.items} in the {s.containers}. "
        f"After {doing} {c}, there are {p} - {c} = {left} {s.items} left.",
        left,
    )


def buys_more(rng: random.Random, s: ProblemSetting) -> WorkedProblem:
    a, b, p, c, total = draw_product_and_term(rng, "+")
    gain, doing = rng.choice(
        [("buys", "buying"), ("finds", "finding"), ("gets", "getting"), ("makes", "making")]
    )
    return WorkedProblem(
        (a, b, c),
        f"{s.name} has {a} {s.containers} of {b} {s.items} and {gain} {c} more. "
        f"How many {s.items} does {s.name} have now?",
        f"{s.name} has {a} * {b} = {p} {s.items} in the {s.containers}. "
        f"After {doing} {c} more, {s.name} has {p} + {c} = {total} {s.items}.",
        total,
    )


def together(rng: random.Random, s: ProblemSetting) -> WorkedProblem:
    a = rng.randint(2, MAX_NUMBER // 2 - 1)
    b = rng.randint(1, min(a - 1, MAX_NUMBER - 2 * a))
    if rng.random() < 0.5:
        word, sign, q = "more", "+", a + b
    else:
        word, sign, q = "fewer", "-", a - b
    return WorkedProblem(
        (a, b, q),
        f"{s.name} has {a} {s.items}. {s.other_name} has {b} {word} than {s.name}. "
        f"How many {s.items} do they have together?",
        f"{s.other_name} has {a} {sign} {b} = {q} {s.items}. "
        f"Together {s.name} and {s.other_name} have {a} + {q} = {a + q} {s.items}.",
        a + q,
    )


def change(rng: random.Random, s: ProblemSetting) -> WorkedProblem:
    a, b, p = draw_product(rng, MAX_NUMBER - 1)
    c = rng.randint(p + 1, MAX_NUMBER)
    return WorkedProblem(
        (a, b, c),
        f"{s.name} buys {a} {s.items} for {b} dollars each and pays with {c} dollars. "
        f"How many dollars does {s.name} get back?",
        f"The {a} {s.items} cost {a} * {b} = {p} dollars. "
        f"{s.name} gets back {c} - {p} = {c - p} dollars.",
        c - p,
    )


def two_kinds(rng: random.Random, s: ProblemSetting) -> WorkedProblem:
    a, b, p = draw_product(rng, MAX_NUMBER - 4)
    c, d, q = draw_product(rng, MAX_NUMBER - p)
    return WorkedProblem(
        (a, b, c, d),
        f"{s.name} buys {a} {s.items} for {b} dollars each and {c} {s.other_items} "
        f"for {d} dollars each. How many dollars does {s.name} pay?",
        f"The {s.items} cost {a} * {b} = {p} dollars. The {s.other_items} cost "
        f"{c} * {d} = {q} dollars. {s.name} pays {p} + {q} = {p + q} dollars.",
        p + q,
    )


def shares(rng: random.Random, s: ProblemSetting) -> WorkedProblem:
    a, q, p = draw_product(rng)
    c = rng.randint(1, MAX_NUMBER - q)
    return WorkedProblem(
        (p, a, c),
        f"{s.name} shares {p} {s.items} equally among {a} friends. One friend, {s.other_name}, "
        f"already had {c}. How many {s.items} does {s.other_name} have now?",
        f"Each friend gets {p} / {a} = {q} {s.items}. "
        f"{s.other_name} already had {c}, so {s.other_name} has {c} + {q} = {c + q} {s.items}.",
        c + q,
    )


def times_as_many(rng: random.Random, s: ProblemSetting) -> WorkedProblem:
    a, b, p = draw_product(rng)
    return WorkedProblem(
        (a, b),
        f"{s.name} has {a} {s.items}. {s.other_name} has {b} times as many. "
        f"How many more {s.items} does {s.other_name} have than {s.name}?",
        f"{s.other_name} has {a} * {b} = {p} {s.items}. "
        f"That is {p} - {a} = {p - a} more than {s.name} has.",
        p - a,
    )


def there_and_back(rng: random.Random, s: ProblemSetting) -> WorkedProblem:
    a = rng.randint(3, MAX_NUMBER)
    b = rng.randint(1, a - 1)
    c = rng.randint(1, MAX_NUMBER - (a - b))
    return WorkedProblem(
        (a, b, c),
        f"{s.name} has {a} {s.items}, gives {b} to {s.other_name} and then finds {c} more. "
        f"How many {s.items} does {s.name} have now?",
        f"After giving {b} to {s.other_name}, {s.name} has {a} - {b} = {a - b} {s.items}. "
        f"After finding {c} more, {s.name} has {a - b} + {c} = {a - b + c} {s.items}.",
        a - b + c,
    )


def three_steps(rng: random.Random, s: ProblemSetting) -> WorkedProblem:
    a, b, p, c, left = draw_product_and_term(rng, "-")
    d = rng.randint(1, MAX_NUMBER - left)
    return WorkedProblem(
        (a, b, c, d),
        f"{s.name} has {a} {s.containers} of {b} {s.items}, gives {c} to {s.other_name} "
        f"and then buys {d} more. How many {s.items} does {s.name} have now?",
        f"{s.name} has {a} * {b} = {p} {s.items} in the {s.containers}. "
        f"After giving {c} to {s.other_name}, {s.name} has {p} - {c} = {left} {s.items}. "
        f"After buying {d} more, {s.name} has {left} + {d} = {left + d} {s.items}.",
        left + d,
    )


KINDS: dict[str, WordProblemMaker] = {
    "gives-away": gives_away,
    "buys-more": buys_more,
    "together": together,
    "change": change,
    "two-kinds": two_kinds,
    "shares": shares,
    "times-as-many": times_as_many,
    "there-and-back": there_and_back,
    "three-steps": three_steps,
}
# Two factors have only 54 combinations, which a model memorizes.
TRAINING_ONLY = {"times-as-many"}


def word_problem(rng: random.Random) -> Problem:
    """One word problem of a kind that evaluations use."""
    return _draw_word_problem(rng, [kind for kind in KINDS if kind not in TRAINING_ONLY])


def training_word_problem(rng: random.Random) -> Problem:
    """One word problem of any kind, for training."""
    return _draw_word_problem(rng, list(KINDS))


def _draw_word_problem(rng: random.Random, kinds: list[str]) -> Problem:
    kind = rng.choice(kinds)
    return KINDS[kind](rng, ProblemSetting.sample(rng)).to_problem("words", kind, "#### {}")
