"""A policy family as a ladder: one parameter, from the gentlest policy to the most thrifty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coterie.naming import CoterieError
from coterie.routing import POLICIES, McMoe, Naee, parse_policy, respell, spell
from coterie.spelling import BETWEEN, options
from coterie.values import RouterSpec

FREE = "?"  # in place of a value: this is what is searched for
THOUSAND = 1000  # steps of a parameter that is a real number
PRICES = range(-600, 201)  # of a vote, in hundredths of a power of ten: 0.000001 to 100
SIZES = ("beta", "m", "tau", "price", "k")  # one of which ``coreset`` needs


@dataclass(frozen=True)
class Ladder:
    """The policies of a family, each rung more thrifty than the one before it.

    ``spelling(rung)`` is a policy; ``values`` are what its parameter is there.
    """

    family: str
    parameter: str
    values: Sequence[object]
    spelling: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Family:
    """What was asked for: a policy's name, the options that stand, and the one that is free."""

    name: str
    fixed: tuple[str, ...]  # "option=value"
    parameter: str

    @staticmethod
    def of(text: str) -> Family:
        """``des-vote:voters=before-eos``, or with the free one shown: ``coreset:m=?,vote=weight``.

        Raises CoterieError for what is unknown, or given where it is to be found.
        """
        name, _, rest = (part.strip() for part in respell(text).partition(":"))
        if name not in POLICIES:
            raise CoterieError(f"unknown policy family {name!r}; known: {', '.join(families())}")
        said = [part.strip() for part in rest.split(",") if part.strip()]
        pairs = {part.partition("=")[0].strip(): part.partition("=")[2].strip() for part in said}
        shown = [key for key, value in pairs.items() if value == FREE]
        free = shown or [key for key in searchable(name) if name != "coreset"]
        if len(free) != 1:
            raise CoterieError(_which(name, free))
        if free[0] not in searchable(name):
            known = ", ".join(searchable(name)) or "nothing"
            raise CoterieError(f"{name}: {free[0]} cannot be searched for; {known} can")
        if free[0] in pairs and not shown:
            raise CoterieError(f"{name}: {free[0]} is what is searched for; leave it out")
        fixed = tuple(part for part in said if part.partition("=")[2].strip() != FREE)
        return Family(name, fixed, free[0])

    def spelling(self, value: object) -> str:
        """The policy at this value (a tuple: one for each layer); raises where options are wrong.

        Of a single layer the tuple's one number is spelled as a number.
        """
        entries = value if isinstance(value, tuple) else (value,)
        said = ",".join((f"{self.parameter}={BETWEEN.join(map(repr, entries))}", *self.fixed))
        return spell(parse_policy(f"{self.name}:{said}"))

    def fixes(self, option: str) -> bool:
        """Whether a value was given for it."""
        return any(part.partition("=")[0].strip() == option for part in self.fixed)

    def fixing(self, option: str, value: object) -> Family:
        """The same family with one more option that stands."""
        return Family(self.name, (*self.fixed, f"{option}={value!r}"), self.parameter)

    def ladder(self, router: RouterSpec) -> Ladder:
        """From the gentlest value to the most thrifty one, for this model's router."""
        values = _values(POLICIES[self.name], self.parameter, router)
        self.spelling(values[0])  # what stands is wrong for each value or for none
        return Ladder(str(self), self.parameter, values, lambda rung: self.spelling(values[rung]))

    def __str__(self) -> str:
        return f"{self.name}:{','.join((f'{self.parameter}={FREE}', *self.fixed))}"


def families() -> list[str]:
    """The names of policies with something to search for."""
    return [name for name in POLICIES if searchable(name)]


def searchable(name: str) -> list[str]:
    """The parameters of a policy that decide how much it saves."""
    offered = options(POLICIES[name]).values()
    if name == "coreset":
        return [option.name for option in offered if option.name in SIZES]
    return [option.name for option in offered if option.default == "required"]


def share_of(count: int, experts: int) -> float:
    """The ``beta`` that elects exactly ``count`` of them: floor(beta * E + 1e-9) is ``count``."""
    return count / experts


def _values(cls: type, parameter: str, router: RouterSpec) -> Sequence[float]:
    drops = issubclass(cls, Naee | McMoe)  # the larger their beta, the more they drop
    match parameter:
        case "k":
            return range(router.k, 0, -1)
        case "m":
            return range(router.experts, 0, -1)
        case "tau":
            return [step / THOUSAND for step in range(THOUSAND, 0, -1)]
        case "price":
            return [float(f"{10 ** (step / 100):.4g}") for step in PRICES]
        case "beta" if drops:
            return [step / THOUSAND for step in range(THOUSAND + 1)]
        case "beta":
            return [share_of(count, router.experts) for count in range(router.experts, 0, -1)]
    raise CoterieError(f"{parameter} has no ladder; {', '.join(SIZES)} have")


def _which(name: str, free: Sequence[str]) -> str:
    known = searchable(name)
    if not known:
        return f"{name} has nothing to search for; families that have: {', '.join(families())}"
    if free:
        return f"{name}: one parameter is searched for, not {' and '.join(free)}"
    said = " or ".join(f"{name}:{key}={FREE}" for key in known)
    return f"{name}: say which parameter is searched for: {said}"
