"""One budget a layer: experts go to the layers where the next one holds most votes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.engine.observation import LayerObservation
from coterie.errors import CoterieError
from coterie.lab.calibration.measurement import PolicyEvaluator
from coterie.lab.calibration.search_space import SearchFamily, SearchSpace, beta_for_count
from coterie.routing import POLICIES, Election, parse_policy
from coterie.routing.votes import VOTES, vote_weights
from coterie.specs import spec_options


def per_layer_search_space(evaluator: PolicyEvaluator, family: SearchFamily) -> SearchSpace:
    """Rungs of ever fewer experts over all layers, shared out by ``order_of_taking``.

    From all experts in each layer down to one in each. Raises CoterieError for a family whose
    budget is one for all layers.
    """
    option = spec_options(POLICIES[family.name])[family.parameter]
    if not (option.accepts_list and family.parameter == "beta"):
        supported = [
            n for n, cls in POLICIES.items() for o in spec_options(cls).values() if o.accepts_list
        ]
        raise CoterieError(
            f"{family.name} has no budget for each layer; families that have: "
            f"{', '.join(dict.fromkeys(supported)) or 'none'}"
        )
    router = evaluator.engine.model.spec.router
    election = getattr(parse_policy(family.policy_with(1.0)), "election", Election())
    order = allocation_order(sorted_vote_sums(evaluator, election))
    budgets = [
        tuple(beta_for_count(count, router.experts) for count in experts_per_layer(order, total))
        for total in range(len(order), max(order), -1)
    ]
    return SearchSpace(
        str(family), family.parameter, budgets, lambda rung: family.policy_with(budgets[rung])
    )


def sorted_vote_sums(evaluator: PolicyEvaluator, election: Election) -> Tensor:
    """[layers, E] float64: votes of the expert elected first, second, .. of each layer that routes,
    added up over vanilla's decoding forwards. Nothing else of a forward is kept. They are plain
    votes, whatever is protected and however they are tallied."""
    spec = evaluator.engine.model.spec
    layer_index = {layer: number for number, layer in enumerate(spec.moe_layers)}
    sums = torch.zeros(len(layer_index), spec.router.experts, dtype=torch.float64)

    def on_layer(observation: LayerObservation, first_prompt: int) -> None:
        del first_prompt
        scores = observation.scores
        vote_weight = vote_weights(scores, election.voters)
        votes = VOTES[election.vote](scores, vote_weight, election.seed)  # [S, E]
        sums[layer_index[observation.layer]] += (
            votes.double().sort(descending=True).values.sum(0).cpu()
        )

    evaluator.observe_vanilla(on_layer, "votes on vanilla's forwards")
    return sums


def allocation_order(votes: Tensor) -> list[int]:
    """The layer that takes the next expert, one by one, until each has all of its E.

    ``votes`` [layers, E] fall along each row, so taking the largest one left is the best that can
    be had for every total: the votes held are a sum of concave functions. Each layer takes its
    first expert before any takes a second, for none may be without; ties go to the shorter layer,
    then to the earlier one.
    """
    layers, experts = votes.shape
    vote_sums = votes.tolist()
    allocations = [
        (-vote_sums[layer][n] if n else -torch.inf, n, layer)
        for layer in range(layers)
        for n in range(experts)
    ]
    return [layer for _, _, layer in sorted(allocations)]


def experts_per_layer(order: Sequence[int], total: int) -> tuple[int, ...]:
    """Experts of each layer after ``total`` were taken."""
    allocated = order[:total]
    return tuple(allocated.count(layer) for layer in range(max(order) + 1))
