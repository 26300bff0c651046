"""The candidates of a search, from the most experts to the fewest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.engine.observation import LayerObservation
from coterie.errors import SpecError
from coterie.lab.calibration.measurement import PolicyEvaluator
from coterie.routing import (
    POLICIES,
    Election,
    McMoe,
    Naee,
    format_policy,
    parse_policy,
    update_policy_text,
)
from coterie.routing.coreset import counted_votes
from coterie.routing.router import admitted_experts
from coterie.routing.votes import vote_weights
from coterie.specs import LIST_SEPARATOR, spec_options
from coterie.values import RouterSpec

FREE_MARK = "?"  # the value of the searched parameter
NUM_STEPS = 1000  # values of a real parameter
PRICE_STEPS = range(-600, 201)  # price of a vote, as hundredths of a power of ten: 1e-6 to 100
SIZE_PARAMETERS = ("beta", "m", "tau", "price", "k")  # ``coreset`` needs one of them


@dataclass(frozen=True)
class SearchFamily:
    """A policy with fixed options and one searched parameter."""

    name: str
    fixed_options: tuple[str, ...]  # "option=value"
    parameter: str

    @staticmethod
    def parse(text: str) -> SearchFamily:
        """A spec such as ``des-vote:voters=before-eos``, or ``coreset:m=?,vote=weight``.

        Raises SpecError for an unknown policy, and if not exactly one parameter is searched.
        """
        name, _, rest = (part.strip() for part in update_policy_text(text).partition(":"))
        if name not in POLICIES:
            raise SpecError(f"unknown policy {name!r}; known: {_families()}")
        if not (known := searchable_parameters(name)):
            raise SpecError(f"{name} has no parameter to search; policies with one: {_families()}")
        parts = [part.strip() for part in rest.split(",") if part.strip()]
        values = {part.partition("=")[0].strip(): part.partition("=")[2].strip() for part in parts}
        marked = [key for key, value in values.items() if value == FREE_MARK]
        free = marked or [key for key in known if name != "coreset" and key not in values]
        if len(free) != 1 or free[0] not in known:
            choices = " or ".join(f"{name}:{key}={FREE_MARK}" for key in known)
            raise SpecError(f"{name}: name one parameter to search: {choices}")
        fixed = tuple(part for part in parts if part.partition("=")[2].strip() != FREE_MARK)
        return SearchFamily(name, fixed, free[0])

    def policy_with(self, value: object) -> str:
        """The policy with this value of the parameter; a tuple has one value per layer."""
        entries = value if isinstance(value, tuple) else (value,)
        parameter = f"{self.parameter}={LIST_SEPARATOR.join(map(repr, entries))}"
        spec = f"{self.name}:{','.join((parameter, *self.fixed_options))}"
        return format_policy(parse_policy(spec))

    def is_fixed(self, option: str) -> bool:
        return any(part.partition("=")[0].strip() == option for part in self.fixed_options)

    def with_fixed(self, option: str, value: object) -> SearchFamily:
        return SearchFamily(self.name, (*self.fixed_options, f"{option}={value!r}"), self.parameter)

    def policies(self, router: RouterSpec) -> list[str]:
        """All candidates for a model's router. Raises SpecError for an invalid fixed option."""
        values = _parameter_values(POLICIES[self.name], self.parameter, router)
        return [self.policy_with(value) for value in values]

    def __str__(self) -> str:
        return f"{self.name}:{','.join((f'{self.parameter}={FREE_MARK}', *self.fixed_options))}"


def searchable_families() -> list[str]:
    return [name for name in POLICIES if searchable_parameters(name)]


def searchable_parameters(name: str) -> list[str]:
    """The parameters of a policy that set the number of experts."""
    options = spec_options(POLICIES[name]).values()
    if name == "coreset":
        return [option.name for option in options if option.name in SIZE_PARAMETERS]
    return [option.name for option in options if option.default == "required"]


def beta_for_count(count: int, experts: int) -> float:
    """The ``beta`` with a coreset of exactly ``count``: floor(beta * E + 1e-9)."""
    return count / experts


def per_layer_policies(evaluator: PolicyEvaluator, family: SearchFamily) -> list[str]:
    """Candidates from all experts in each layer down to one in each.

    Raises SpecError for a family without a budget per layer.
    """
    option = spec_options(POLICIES[family.name])[family.parameter]
    if not (option.accepts_list and family.parameter == "beta"):
        families = [
            name
            for name, policy in POLICIES.items()
            if any(option.accepts_list for option in spec_options(policy).values())
        ]
        raise SpecError(
            f"{family.name} has no budget for each layer; policies with one: {', '.join(families)}"
        )
    experts = evaluator.engine.model.spec.router.experts
    election = getattr(parse_policy(family.policy_with(1.0)), "election", Election())
    order = allocation_order(sorted_vote_sums(evaluator, election))
    return [
        family.policy_with(
            tuple(beta_for_count(count, experts) for count in experts_per_layer(order, total))
        )
        for total in range(len(order), max(order), -1)
    ]


def sorted_vote_sums(evaluator: PolicyEvaluator, election: Election) -> Tensor:
    """[layers, E] float64: votes of each MoE layer's first, second, ... expert by votes.

    Sums over the decode forwards of vanilla routing. Protection and tally are ignored.
    """
    if (step := f"votes {election}") in evaluator.journal.steps:
        return torch.tensor(evaluator.journal.steps[step], dtype=torch.float64)
    spec = evaluator.engine.model.spec
    ordinals = {layer: ordinal for ordinal, layer in enumerate(spec.moe_layers)}
    sums = torch.zeros(len(ordinals), spec.router.experts, dtype=torch.float64)

    def on_layer(observation: LayerObservation, first_prompt: int) -> None:
        del first_prompt
        scores = observation.scores
        scores = replace(scores, admitted=admitted_experts(scores))
        votes = counted_votes(scores, vote_weights(scores, election.voters), election).double()
        sums[ordinals[observation.layer]] += votes.sort(descending=True).values.sum(0).cpu()

    evaluator.observe_vanilla(on_layer, "votes on vanilla's forwards")
    evaluator.journal.add(step, sums.tolist())
    return sums


def allocation_order(votes: Tensor) -> list[int]:
    """The layer that gets the next expert, one by one, until each layer has all E.

    ``votes`` [layers, E] fall along each row, so the sum of votes is concave in each layer's count
    and taking the largest next value is optimal for every total. Each layer gets one expert first.
    Ties go to the layer with fewer experts, then to the earlier one.
    """
    layers, experts = votes.shape
    values = votes.tolist()
    candidates = [
        (-values[layer][n] if n else -torch.inf, n, layer)
        for layer in range(layers)
        for n in range(experts)
    ]
    return [layer for _, _, layer in sorted(candidates)]


def experts_per_layer(order: Sequence[int], total: int) -> tuple[int, ...]:
    """The count of each layer after ``total`` allocations."""
    allocated = order[:total]
    return tuple(allocated.count(layer) for layer in range(max(order) + 1))


def _parameter_values(cls: type, parameter: str, router: RouterSpec) -> Sequence[float]:
    match parameter:
        case "k":
            return range(router.k, 0, -1)
        case "m":
            return range(router.experts, 0, -1)
        case "tau":
            return [step / NUM_STEPS for step in range(NUM_STEPS, 0, -1)]
        case "price":
            return [float(f"{10 ** (step / 100):.4g}") for step in PRICE_STEPS]
        # A larger beta drops more experts here.
        case "beta" if issubclass(cls, Naee | McMoe):
            return [step / NUM_STEPS for step in range(NUM_STEPS + 1)]
        case "beta":
            return [beta_for_count(count, router.experts) for count in range(router.experts, 0, -1)]
    raise SpecError(f"{parameter} cannot be searched; {', '.join(SIZE_PARAMETERS)} can")


def _families() -> str:
    return ", ".join(searchable_families())
