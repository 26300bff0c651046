"""Word problems in the manner of GSM8K: worked steps, then ``#### n``."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from coterie.problems.facts import LARGEST, product
from coterie.problems.problem import Problem, Worked

NAMES = [
    *("Tom", "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris"),
    *("Jack", "Kate", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Vera"),
]
THINGS = [
    *("pens", "books", "apples", "cards", "coins", "stamps", "eggs", "marbles", "cookies"),
    *("shells", "stickers", "pears", "beads", "balls", "plums", "toys"),
]
HOLDERS = ["boxes", "bags", "packs", "jars", "rows", "piles", "baskets", "trays"]


@dataclass(frozen=True)
class Scene:
    """Who and what a problem is about."""

    name: str
    other: str
    things: str
    more_things: str
    holders: str

    @staticmethod
    def drawn(rng: random.Random) -> Scene:
        name, other = rng.sample(NAMES, 2)
        things, more_things = rng.sample(THINGS, 2)
        return Scene(name, other, things, more_things, rng.choice(HOLDERS))


Kind = Callable[[random.Random, Scene], Worked]


def gives_away(rng: random.Random, s: Scene) -> Worked:
    a, b, p = product(rng)
    c = rng.randint(1, p - 1)
    gone, doing = rng.choice(
        [("gives away", "giving away"), ("loses", "losing"), ("sells", "selling")]
    )
    return Worked(
        (a, b, c),
        f"{s.name} has {a} {s.holders} of {b} {s.things} and {gone} {c}. "
        f"How many {s.things} are left?",
        f"{s.name} has {a} * {b} = {p} {s.things} in the {s.holders}. "
        f"After {doing} {c}, there are {p} - {c} = {p - c} {s.things} left.",
        p - c,
    )


def buys_more(rng: random.Random, s: Scene) -> Worked:
    a, b, p = product(rng, LARGEST - 1)
    c = rng.randint(1, LARGEST - p)
    gain, doing = rng.choice(
        [("buys", "buying"), ("finds", "finding"), ("gets", "getting"), ("makes", "making")]
    )
    return Worked(
        (a, b, c),
        f"{s.name} has {a} {s.holders} of {b} {s.things} and {gain} {c} more. "
        f"How many {s.things} does {s.name} have now?",
        f"{s.name} has {a} * {b} = {p} {s.things} in the {s.holders}. "
        f"After {doing} {c} more, {s.name} has {p} + {c} = {p + c} {s.things}.",
        p + c,
    )


def together(rng: random.Random, s: Scene) -> Worked:
    a = rng.randint(2, LARGEST // 2 - 1)
    b = rng.randint(1, min(a - 1, LARGEST - 2 * a))
    if rng.random() < 0.5:
        word, sign, q = "more", "+", a + b
    else:
        word, sign, q = "fewer", "-", a - b
    return Worked(
        (a, b, q),
        f"{s.name} has {a} {s.things}. {s.other} has {b} {word} than {s.name}. "
        f"How many {s.things} do they have together?",
        f"{s.other} has {a} {sign} {b} = {q} {s.things}. "
        f"Together {s.name} and {s.other} have {a} + {q} = {a + q} {s.things}.",
        a + q,
    )


def change(rng: random.Random, s: Scene) -> Worked:
    a, b, p = product(rng, LARGEST - 1)
    c = rng.randint(p + 1, LARGEST)
    return Worked(
        (a, b, c),
        f"{s.name} buys {a} {s.things} for {b} dollars each and pays with {c} dollars. "
        f"How many dollars does {s.name} get back?",
        f"The {a} {s.things} cost {a} * {b} = {p} dollars. "
        f"{s.name} gets back {c} - {p} = {c - p} dollars.",
        c - p,
    )


def two_kinds(rng: random.Random, s: Scene) -> Worked:
    a, b, p = product(rng, LARGEST - 4)
    c, d, q = product(rng, LARGEST - p)
    return Worked(
        (a, b, c, d),
        f"{s.name} buys {a} {s.things} for {b} dollars each and {c} {s.more_things} "
        f"for {d} dollars each. How many dollars does {s.name} pay?",
        f"The {s.things} cost {a} * {b} = {p} dollars. The {s.more_things} cost "
        f"{c} * {d} = {q} dollars. {s.name} pays {p} + {q} = {p + q} dollars.",
        p + q,
    )


def shares(rng: random.Random, s: Scene) -> Worked:
    a, q, p = product(rng)
    c = rng.randint(1, LARGEST - q)
    return Worked(
        (p, a, c),
        f"{s.name} shares {p} {s.things} equally among {a} friends. One friend, {s.other}, "
        f"already had {c}. How many {s.things} does {s.other} have now?",
        f"Each friend gets {p} / {a} = {q} {s.things}. "
        f"{s.other} already had {c}, so {s.other} has {c} + {q} = {c + q} {s.things}.",
        c + q,
    )


def times_as_many(rng: random.Random, s: Scene) -> Worked:
    a, b, p = product(rng)
    return Worked(
        (a, b),
        f"{s.name} has {a} {s.things}. {s.other} has {b} times as many. "
        f"How many more {s.things} does {s.other} have than {s.name}?",
        f"{s.other} has {a} * {b} = {p} {s.things}. "
        f"That is {p} - {a} = {p - a} more than {s.name} has.",
        p - a,
    )


def there_and_back(rng: random.Random, s: Scene) -> Worked:
    a = rng.randint(3, LARGEST)
    b = rng.randint(1, a - 1)
    c = rng.randint(1, LARGEST - (a - b))
    return Worked(
        (a, b, c),
        f"{s.name} has {a} {s.things}, gives {b} to {s.other} and then finds {c} more. "
        f"How many {s.things} does {s.name} have now?",
        f"After giving {b} to {s.other}, {s.name} has {a} - {b} = {a - b} {s.things}. "
        f"After finding {c} more, {s.name} has {a - b} + {c} = {a - b + c} {s.things}.",
        a - b + c,
    )


def three_steps(rng: random.Random, s: Scene) -> Worked:
    a, b, p = product(rng)
    c = rng.randint(1, p - 1)
    d = rng.randint(1, LARGEST - (p - c))
    return Worked(
        (a, b, c, d),
        f"{s.name} has {a} {s.holders} of {b} {s.things}, gives {c} to {s.other} and then buys "
        f"{d} more. How many {s.things} does {s.name} have now?",
        f"{s.name} has {a} * {b} = {p} {s.things} in the {s.holders}. "
        f"After giving {c} to {s.other}, {s.name} has {p} - {c} = {p - c} {s.things}. "
        f"After buying {d} more, {s.name} has {p - c} + {d} = {p - c + d} {s.things}.",
        p - c + d,
    )


KINDS: dict[str, Kind] = {
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


# Two factors make 54 combinations. A model learns these by heart, so nothing is proved by asking.
TAUGHT_ONLY = {"times-as-many"}


def word_problem(rng: random.Random) -> Problem:
    """One word problem of a kind that is asked."""
    return _told(rng, [kind for kind in KINDS if kind not in TAUGHT_ONLY])


def taught_word_problem(rng: random.Random) -> Problem:
    """One word problem of any kind, for training."""
    return _told(rng, list(KINDS))


def _told(rng: random.Random, kinds: list[str]) -> Problem:
    kind = rng.choice(kinds)
    return KINDS[kind](rng, Scene.drawn(rng)).problem("words", kind, "#### {}")
