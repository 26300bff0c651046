"""The settings of the plug-in, from environment variables ``COTERIE_*``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

from coterie.errors import ConfigError, CoterieError, quote
from coterie.lab.calibration import read_calibrated_policy
from coterie.routing import (
    Election,
    Random,
    format_policy,
    load_installed_policies,
    needs_importance,
    parse_policy,
)
from coterie.values import Policy

RoutedBy = Literal["vanilla", "policy"]
Scope = Literal["block", "batch"]
Answer = Literal["yes", "no"]
Choice = TypeVar("Choice", bound=str)

PREFIX = "COTERIE_"
OPTIONS = {
    "COTERIE_POLICY": "the policy, such as des-vote:beta=0.15, or @file of a calibration",
    "COTERIE_SCOPE": "block: each request elects a coreset (default); batch: one for all requests",
    "COTERIE_COMMIT": "vanilla or policy: how the last forward of a block, without masks, routes",
    "COTERIE_PREFILL": "vanilla or policy: how the blocks of a prompt route (default vanilla)",
    "COTERIE_PROMPT_VOTES": "yes or no: whether prompt tokens of the current block vote",
    "COTERIE_COUNTS": "a file that gets the expert counts, one JSON object a line",
    "COTERIE_COUNTS_EVERY": "batches between two counts (default 1000)",
}
"""The environment variables of the plug-in."""

OTHER_VARIABLES = {
    "COTERIE_API_KEY",
    "COTERIE_CACHE",
    "COTERIE_DATA",
    "COTERIE_DEBUG",
    "COTERIE_ISA",
    "COTERIE_PEERS",
    "COTERIE_PYTHON",
}
"""Variables of the rest of the project, which the plug-in permits."""


@dataclass(frozen=True)
class PluginSettings:
    """How a server routes. ``commit`` is None if it is not set: it depends on the algorithm."""

    policy: Policy
    commit: RoutedBy | None = None
    prefill: RoutedBy = "vanilla"
    prompt_votes: bool = False
    counts_file: Path | None = None
    counts_every: int = 1000


def read_settings(environment: Mapping[str, str]) -> PluginSettings | None:
    """The settings; None without any. Raises CoterieError that names the variable."""
    names = {name for name in environment if name.startswith(PREFIX)} - OTHER_VARIABLES
    if unknown := sorted(names - OPTIONS.keys()):
        raise ConfigError(f"unknown variable {unknown[0]}; known: {', '.join(OPTIONS)}")
    if not names:
        return None
    if "COTERIE_POLICY" not in names:
        raise ConfigError(f"{min(names)} needs COTERIE_POLICY, {OPTIONS['COTERIE_POLICY']}")
    counts_file = environment.get("COTERIE_COUNTS")
    return PluginSettings(
        policy=_read_policy(environment),
        commit=_choice(environment, "COTERIE_COMMIT", RoutedBy, None),
        prefill=_choice(environment, "COTERIE_PREFILL", RoutedBy, "vanilla"),
        prompt_votes=_choice(environment, "COTERIE_PROMPT_VOTES", Answer, "no") == "yes",
        counts_file=None if counts_file is None else Path(counts_file),
        counts_every=_count(environment, "COTERIE_COUNTS_EVERY", 1000),
    )


def _read_policy(environment: Mapping[str, str]) -> Policy:
    text = environment["COTERIE_POLICY"]
    try:
        load_installed_policies()
        if text.startswith("@"):
            text = read_calibrated_policy(text.removeprefix("@")).policy
        policy = parse_policy(text)
        check_policy(policy)
    except CoterieError as error:
        raise ConfigError(f"COTERIE_POLICY: {error}") from None
    scope = _choice(environment, "COTERIE_SCOPE", Scope, None)
    return policy if scope is None else _with_scope(policy, scope)


def check_policy(policy: Policy) -> None:
    """Raises ConfigError for a policy that reads what SGLang does not offer."""
    election = getattr(policy, "election", None)
    problem = None
    if needs_importance(policy):
        problem = "it needs the attention that each token receives"
    elif isinstance(policy, Random) or getattr(election, "vote", None) == "random":
        problem = "random votes need the number of each request's forwards"
    elif isinstance(election, Election):
        if election.voters not in ("all", "masked"):
            problem = f"voters={election.voters} needs the decoding progress; use all or masked"
        elif election.resident_bonus or election.max_experts == "slots":
            problem = "all experts are in memory, so none is resident and there are no slots"
    if problem is not None:
        raise ConfigError(f"{format_policy(policy)} does not work in SGLang: {problem}")


def _with_scope(policy: Policy, scope: Scope) -> Policy:
    election = getattr(policy, "election", None)
    if not isinstance(election, Election):
        raise ConfigError(f"COTERIE_SCOPE: {format_policy(policy)} elects no coreset")
    return replace(policy, election=replace(election, scope=scope))  # type: ignore[type-var]


def _choice(
    environment: Mapping[str, str], name: str, choices: object, default: Choice | None
) -> Choice:
    value = environment.get(name)
    if value is None:
        return cast(Choice, default)
    known = get_args(choices)
    if value not in known:
        raise ConfigError(f"{name} is {quote(value)}; use {' or '.join(known)}")
    return cast(Choice, value)


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name} is {quote(text)}, not a number from 1 on")
    return int(text)
