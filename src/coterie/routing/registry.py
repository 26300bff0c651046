"""The policies by name, their text form, and checks of a policy against a model."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from coterie.errors import ConfigError, SpecError
from coterie.routing import coreset_policies
from coterie.routing.coreset import Election
from coterie.routing.token_policies import McMoe, Naee, TopK, Vanilla
from coterie.specs import format_spec, parse_spec, update_spec_text
from coterie.values import Policy


def parse_policy(text: str) -> Policy:
    """The policy of a text such as ``des-vote:beta=0.15,voters=before-eos``.

    Raises SpecError that names the valid names, options or values.
    """
    if text.startswith("@"):
        raise SpecError(
            f"policy {text!r}: only commands read a policy from a file; in Python, "
            "coterie.lab.calibration.read_calibrated_policy(path).policy is its text"
        )
    return parse_spec(text, POLICIES, "policy")


def format_policy(policy: Policy) -> str:
    """The text that ``parse_policy`` reads back as ``policy``, without defaults."""
    return format_spec(policy, POLICIES)


def update_policy_text(text: str) -> str:
    """A text of an older version, with the current option names in each policy that it contains.

    ``racing:m=4,lam=1 block=16`` becomes ``racing:m=4,resident_bonus=1 block=16``.
    """
    return _POLICY_TEXT.sub(lambda match: update_spec_text(match[0], POLICIES), text)


def update_policies_in_json(value: object, *, skip_keys: Collection[str] = ()) -> Any:
    """A JSON value with ``update_policy_text`` applied to every text and key in it.

    Values under ``skip_keys`` stay.
    """
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
    """Raises ConfigError if ``beta`` is a list of another length than ``layers``, the number of
    layers that route. Policies outside the table are not checked."""
    beta = getattr(policy, "beta", None)
    if isinstance(beta, tuple) and len(beta) != layers and type(policy) in POLICIES.values():
        raise ConfigError(
            f"policy {format_policy(policy)!r}: beta lists {len(beta)} shares, and the model has "
            f"{layers} layers that route; give one share for all layers, or {layers}"
        )


def check_coreset_reuse(policy: Policy) -> None:
    """Raises ConfigError for a policy of ours with coresets that a block cannot use again.

    A policy from elsewhere is checked by its first mask.
    """
    if isinstance(policy, TOKEN_POLICIES):
        raise ConfigError(
            f"`reuse_tolerance` reuses coresets, and {format_policy(policy)} elects none; use a "
            "coreset policy such as des-vote:beta=0.3"
        )
    election = getattr(policy, "election", None)
    if isinstance(election, Election) and election.scope == "batch":
        raise ConfigError(
            f"`reuse_tolerance` reuses the coreset of a block, and {format_policy(policy)} elects "
            "one for all rows of a batch; use scope=block"
        )


def needs_importance(policy: Policy) -> bool:
    """Whether the model must fill ``Scores.importance`` for this policy."""
    return isinstance(policy, McMoe)


TOKEN_POLICIES = (Vanilla, TopK, Naee, McMoe)  # which choose for each token alone
POLICIES: dict[str, type[Policy]] = {
    "vanilla": Vanilla,
    "topk": TopK,
    "naee": Naee,
    "mc-moe": McMoe,
    "des-seq": coreset_policies.DesSeq,
    "des-vote": coreset_policies.DesVote,
    "uniform-vote": coreset_policies.UniformVote,
    "xshare": coreset_policies.XShare,
    "racing": coreset_policies.Racing,
    "mass-vote": coreset_policies.MassVote,
    "proportional-vote": coreset_policies.ProportionalVote,
    "priced-vote": coreset_policies.PricedVote,
    "random": coreset_policies.Random,
    "resident-vote": coreset_policies.ResidentVote,
    "coreset": coreset_policies.Coreset,
}

_POLICY_TEXT = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, POLICIES))}):[^\s\"';)]+")
