"""The policies by name, and the spelling that they have."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from coterie.errors import CoterieError
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
from coterie.routing.token_policies import McMoe, Naee, TopK, Vanilla
from coterie.specs import format_spec, parse_spec, update_spec_text
from coterie.values import Policy


def parse_policy(text: str) -> Policy:
    """The policy that ``text`` spells, such as ``des-vote:beta=0.15,voters=before-eos``."""
    return parse_spec(text, POLICIES, "policy")


def format_policy(policy: Policy) -> str:
    """The text that ``parse_policy`` reads back as ``policy``; defaults are left out."""
    return format_spec(policy, POLICIES)


def update_policy_text(text: str) -> str:
    """A text that another version wrote, each policy in it with the present names of its options:
    ``racing:m=4,lam=1 block=16`` becomes ``racing:m=4,resident_bonus=1 block=16``."""
    return _POLICY_TEXT.sub(lambda found: update_spec_text(found[0], POLICIES), text)


def update_policies_in_json(value: object, *, skip_keys: Collection[str] = ()) -> Any:
    """A JSON value with all policies in it respelled, keys too; what is under the keys ``but``
    stays."""
    if isinstance(value, str):
        return update_policy_text(value)
    if isinstance(value, list):
        return [update_policies_in_json(item, skip_keys=skip_keys) for item in value]
    if isinstance(value, dict):
        return {
            update_policy_text(key): item
            if key in skip_keys
            else update_policies_in_json(item, skip_keys=skip_keys)
            for key, item in value.items()
        }
    return value


def check_layers(policy: Policy, layers: int) -> None:
    """Raises CoterieError for a list of budgets that is not one for each of the ``layers`` that
    route; what it checks is ``beta``, of the policies in the table."""
    beta = getattr(policy, "beta", None)
    if isinstance(beta, tuple) and len(beta) != layers and type(policy) in POLICIES.values():
        raise CoterieError(
            f"policy {format_policy(policy)!r}: beta lists {len(beta)} shares, and the model has {layers} "
            f"layers that route; give one share for all, or {layers}"
        )


def check_coreset_reuse(policy: Policy) -> None:
    """Raises CoterieError for a policy of the table whose blocks cannot keep a coreset."""
    if type(policy) not in POLICIES.values():
        return
    election = vars(policy).get("election")
    if not isinstance(election, Election):
        raise CoterieError(
            f"drift keeps coresets, and {format_policy(policy)} elects none; use it with one that does, "
            "such as des-vote:beta=0.3"
        )
    if election.scope == "batch":
        raise CoterieError(
            f"drift keeps the coresets of a row's block, and {format_policy(policy)} elects one for the "
            "rows that happen to share a forward; use it with scope=block"
        )


def needs_importance(policy: Policy) -> bool:
    """Whether the model must fill ``Scores.importance`` for this policy."""
    return isinstance(policy, McMoe)


POLICIES: dict[str, type[Policy]] = {
    "vanilla": Vanilla,
    "topk": TopK,
    "naee": Naee,
    "mc-moe": McMoe,
    "des-seq": DesSeq,
    "des-vote": DesVote,
    "uniform-vote": UniformVote,
    "xshare": XShare,
    "racing": Racing,
    "mass-vote": MassVote,
    "proportional-vote": ProportionalVote,
    "priced-vote": PricedVote,
    "random": Random,
    "resident-vote": ResidentVote,
    "coreset": Coreset,
}

_POLICY_TEXT = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, POLICIES))}):[^\s\"';)]+")
