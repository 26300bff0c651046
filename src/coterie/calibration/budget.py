"""One budget a layer: experts go to the layers where the next one holds most votes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.calibration.bench import Bench
from coterie.calibration.ladder import Family, Ladder, share_of
from coterie.engine.watch import Watched
from coterie.naming import CoterieError
from coterie.routing import POLICIES, Election, parse_policy
from coterie.routing.votes import VOTES, voices
from coterie.spelling import options


def layered_ladder(bench: Bench, family: Family) -> Ladder:
    """Rungs of ever fewer experts over all layers, shared out by ``order_of_taking``.

    From all experts in each layer down to one in each. Raises CoterieError for a family whose
    budget is one for all layers.
    """
    option = options(POLICIES[family.name])[family.parameter]
    if not (option.many and family.parameter == "beta"):
        able = [n for n, cls in POLICIES.items() for o in options(cls).values() if o.many]
        raise CoterieError(
            f"{family.name} has no budget for each layer; families that have: "
            f"{', '.join(dict.fromkeys(able)) or 'none'}"
        )
    router = bench.engine.model.spec.router
    election = getattr(parse_policy(family.spelling(1.0)), "election", Election())
    order = order_of_taking(falling_votes(bench, election))
    shares = [
        tuple(share_of(count, router.experts) for count in shared_out(order, total))
        for total in range(len(order), max(order), -1)
    ]
    return Ladder(str(family), family.parameter, shares, lambda rung: family.spelling(shares[rung]))


def falling_votes(bench: Bench, election: Election) -> Tensor:
    """[layers, E] float64: votes of the expert elected first, second, .. of each layer that routes,
    added up over vanilla's decoding forwards. Nothing else of a forward is kept. They are plain
    votes, whatever is protected and however they are tallied."""
    spec = bench.engine.model.spec
    place = {layer: number for number, layer in enumerate(spec.moe_layers)}
    sums = torch.zeros(len(place), spec.router.experts, dtype=torch.float64)

    def see(watched: Watched, first: int) -> None:
        del first
        scores = watched.scores
        voice = voices(scores, election.voters)
        votes = VOTES[election.vote](scores, voice, election.seed)  # [S, E]
        sums[place[watched.layer]] += votes.double().sort(descending=True).values.sum(0).cpu()

    bench.trace(see, "votes on vanilla's forwards")
    return sums


def order_of_taking(votes: Tensor) -> list[int]:
    """The layer that takes the next expert, one by one, until each has all of its E.

    ``votes`` [layers, E] fall along each row, so taking the largest one left is the best that can
    be had for every total: the votes held are a sum of concave functions. Each layer takes its
    first expert before any takes a second, for none may be without; ties go to the shorter layer,
    then to the earlier one.
    """
    layers, experts = votes.shape
    held = votes.tolist()
    places = [
        (-held[layer][n] if n else -torch.inf, n, layer)
        for layer in range(layers)
        for n in range(experts)
    ]
    return [layer for _, _, layer in sorted(places)]


def shared_out(order: Sequence[int], total: int) -> tuple[int, ...]:
    """Experts of each layer after ``total`` were taken."""
    taken = order[:total]
    return tuple(taken.count(layer) for layer in range(max(order) + 1))
