"""A policy family as a ladder: one parameter, from the gentlest policy to the most thrifty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coterie.errors import CoterieError
from coterie.routing import POLICIES, McMoe, Naee, format_policy, parse_policy, update_policy_text
from coterie.specs import LIST_SEPARATOR, spec_options
from coterie.values import RouterSpec

FREE_MARK = "?"  # in place of a value: this is what is searched for
NUM_STEPS = 1000  # steps of a parameter that is a real number
PRICE_STEPS = range(-600, 201)  # of a vote, in hundredths of a power of ten: 0.000001 to 100
SIZE_PARAMETERS = ("beta", "m", "tau", "price", "k")  # one of which ``coreset`` needs


@dataclass(frozen=True)
class SearchSpace:
    """The policies of a family, each rung more thrifty than the one before it.

    ``spelling(rung)`` is a policy; ``values`` are what its parameter is there.
    """

    family: str
    parameter: str
    values: Sequence[object]
    policy_at: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class SearchFamily:
    """What was asked for: a policy's name, the options that stand, and the one that is free."""

    name: str
    fixed_options: tuple[str, ...]  # "option=value"
    parameter: str

    @staticmethod
    def parse(text: str) -> SearchFamily:
        """``des-vote:voters=before-eos``, or with the free one shown: ``coreset:m=?,vote=weight``.

        Raises CoterieError for what is unknown, or given where it is to be found.
        """
        name, _, rest = (part.strip() for part in update_policy_text(text).partition(":"))
        if name not in POLICIES:
            raise CoterieError(
                f"unknown policy family {name!r}; known: {', '.join(searchable_families())}"
            )
        parts = [part.strip() for part in rest.split(",") if part.strip()]
        values = {part.partition("=")[0].strip(): part.partition("=")[2].strip() for part in parts}
        marked_free = [key for key, value in values.items() if value == FREE_MARK]
        free = marked_free or [key for key in searchable_parameters(name) if name != "coreset"]
        if len(free) != 1:
            raise CoterieError(_ambiguous_parameter_message(name, free))
        if free[0] not in searchable_parameters(name):
            known = ", ".join(searchable_parameters(name)) or "nothing"
            raise CoterieError(f"{name}: {free[0]} cannot be searched for; {known} can")
        if free[0] in values and not marked_free:
            raise CoterieError(f"{name}: {free[0]} is what is searched for; leave it out")
        fixed = tuple(part for part in parts if part.partition("=")[2].strip() != FREE_MARK)
        return SearchFamily(name, fixed, free[0])

    def policy_with(self, value: object) -> str:
        """The policy at this value (a tuple: one for each layer); raises where options are wrong.

        Of a single layer the tuple's one number is spelled as a number.
        """
        entries = value if isinstance(value, tuple) else (value,)
        option_text = ",".join(
            (f"{self.parameter}={LIST_SEPARATOR.join(map(repr, entries))}", *self.fixed_options)
        )
        return format_policy(parse_policy(f"{self.name}:{option_text}"))

    def is_fixed(self, option: str) -> bool:
        """Whether a value was given for it."""
        return any(part.partition("=")[0].strip() == option for part in self.fixed_options)

    def with_fixed(self, option: str, value: object) -> SearchFamily:
        """The same family with one more option that stands."""
        return SearchFamily(self.name, (*self.fixed_options, f"{option}={value!r}"), self.parameter)

    def search_space(self, router: RouterSpec) -> SearchSpace:
        """From the gentlest value to the most thrifty one, for this model's router."""
        values = _parameter_values(POLICIES[self.name], self.parameter, router)
        self.policy_with(values[0])  # what stands is wrong for each value or for none
        return SearchSpace(
            str(self), self.parameter, values, lambda rung: self.policy_with(values[rung])
        )

    def __str__(self) -> str:
        return f"{self.name}:{','.join((f'{self.parameter}={FREE_MARK}', *self.fixed_options))}"


def searchable_families() -> list[str]:
    """The names of policies with something to search for."""
    return [name for name in POLICIES if searchable_parameters(name)]


def searchable_parameters(name: str) -> list[str]:
    """The parameters of a policy that decide how much it saves."""
    policy_options = spec_options(POLICIES[name]).values()
    if name == "coreset":
        return [option.name for option in policy_options if option.name in SIZE_PARAMETERS]
    return [option.name for option in policy_options if option.default == "required"]


def beta_for_count(count: int, experts: int) -> float:
    """The ``beta`` that elects exactly ``count`` of them: floor(beta * E + 1e-9) is ``count``."""
    return count / experts


def _parameter_values(cls: type, parameter: str, router: RouterSpec) -> Sequence[float]:
    drops = issubclass(cls, Naee | McMoe)  # the larger their beta, the more they drop
    match parameter:
        case "k":
            return range(router.k, 0, -1)
        case "m":
            return range(router.experts, 0, -1)
        case "tau":
            return [step / NUM_STEPS for step in range(NUM_STEPS, 0, -1)]
        case "price":
            return [float(f"{10 ** (step / 100):.4g}") for step in PRICE_STEPS]
        case "beta" if drops:
            return [step / NUM_STEPS for step in range(NUM_STEPS + 1)]
        case "beta":
            return [beta_for_count(count, router.experts) for count in range(router.experts, 0, -1)]
    raise CoterieError(f"{parameter} has no ladder; {', '.join(SIZE_PARAMETERS)} have")


def _ambiguous_parameter_message(name: str, free: Sequence[str]) -> str:
    known = searchable_parameters(name)
    if not known:
        return f"{name} has nothing to search for; families that have: {', '.join(searchable_families())}"
    if free:
        return f"{name}: one parameter is searched for, not {' and '.join(free)}"
    choices = " or ".join(f"{name}:{key}={FREE_MARK}" for key in known)
    return f"{name}: say which parameter is searched for: {choices}"
