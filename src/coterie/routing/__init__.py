"""Expert-routing policies, their text form, and ``route``, which applies them."""

from coterie.routing.coreset import Election
from coterie.routing.coreset_policies import (
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
from coterie.routing.plugins import import_policies, load_installed_policies, register_policy
from coterie.routing.registry import (
    POLICIES,
    check_coreset_reuse,
    check_layers,
    format_policy,
    needs_importance,
    parse_policy,
    update_policies_in_json,
    update_policy_text,
)
from coterie.routing.router import route
from coterie.routing.token_policies import McMoe, Naee, TopK, Vanilla

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
    "check_coreset_reuse",
    "check_layers",
    "format_policy",
    "import_policies",
    "load_installed_policies",
    "needs_importance",
    "parse_policy",
    "register_policy",
    "route",
    "update_policies_in_json",
    "update_policy_text",
]
