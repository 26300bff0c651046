"""Which experts each token uses: policies, their spelling, and the one ``route`` they share."""

from coterie.routing.coreset import Election
from coterie.routing.named import (
    Coreset,
    DesSeq,
    DesVote,
    MassVote,
    PricedVote,
    ProportionalVote,
    Racing,
    Random,
    ResidentVote,
    UniformVote,
    XShare,
)
from coterie.routing.policy import (
    POLICIES,
    check_keeps,
    check_layers,
    needs_importance,
    parse_policy,
    respell,
    respell_all,
    spell,
)
from coterie.routing.select import route
from coterie.routing.token import McMoe, Naee, TopK, Vanilla

__all__ = [
    "POLICIES",
    "Coreset",
    "DesSeq",
    "DesVote",
    "Election",
    "MassVote",
    "McMoe",
    "Naee",
    "PricedVote",
    "ProportionalVote",
    "Racing",
    "Random",
    "ResidentVote",
    "TopK",
    "UniformVote",
    "Vanilla",
    "XShare",
    "check_keeps",
    "check_layers",
    "needs_importance",
    "parse_policy",
    "respell",
    "respell_all",
    "route",
    "spell",
]
