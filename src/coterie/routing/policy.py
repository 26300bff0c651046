"""The policies by name, and the one spelling they have: ``name:option=value,option=value``."""

from __future__ import annotations

from dataclasses import replace

from coterie.naming import CoterieError
from coterie.routing.named import (
    Coreset,
    DesSeq,
    DesVote,
    MassVote,
    Racing,
    Random,
    ResidentVote,
    UniformVote,
    XShare,
)
from coterie.routing.option import Option, Value, options
from coterie.routing.token import McMoe, Naee, TopK, Vanilla
from coterie.values import Policy


def parse_policy(text: str) -> Policy:
    """The policy that ``text`` spells, such as ``des-vote:beta=0.15,voters=unfilled``."""
    name, _, rest = text.strip().partition(":")
    if name not in POLICIES:
        raise CoterieError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    offered = options(POLICIES[name])
    try:
        given = {key: offered[key].read(value) for key, value in _pairs(rest, offered)}
        missing = [o.name for o in offered.values() if o.default == "required"]
        missing = [key for key in missing if key not in given]
        if missing:
            raise CoterieError(f"needs {', '.join(missing)}")
        return _build(POLICIES[name], offered, given)
    except CoterieError as error:
        raise CoterieError(f"policy {text!r}: {error}") from None


def spell(policy: Policy) -> str:
    """The text that ``parse_policy`` reads back as ``policy``; defaults are left out."""
    name = next((name for name, cls in POLICIES.items() if type(policy) is cls), None)
    if name is None:
        raise CoterieError(f"{policy!r} has no name; known: {', '.join(sorted(POLICIES))}")
    values = {o: _value(policy, o) for o in options(type(policy)).values()}
    said = [
        f"{o.name}={_text(value)}"
        for o, value in values.items()
        if value is not None and (o.shown or value != o.default)
    ]
    return f"{name}:{','.join(said)}" if said else name


def needs_importance(policy: Policy) -> bool:
    """Whether the model must fill ``Scores.importance`` for this policy."""
    return isinstance(policy, NEED_IMPORTANCE)


def _pairs(rest: str, offered: dict[str, Option]) -> list[tuple[str, str]]:
    pairs = []
    for item in rest.split(",") if rest.strip() else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise CoterieError(f"{item.strip()!r} is not of the form option=value")
        if key not in offered:
            known = ", ".join(offered) or "none"
            raise CoterieError(f"unknown option {key!r}; it has: {known}")
        if key in dict(pairs):
            raise CoterieError(f"{key} is given twice")
        pairs.append((key, value))
    return pairs


def _build(cls: type[Policy], offered: dict[str, Option], given: dict[str, Value]) -> Policy:
    """An instance of ``cls``; options of a shared part change that part's default."""
    parts: dict[str, dict[str, Value]] = {}
    for key, value in given.items():
        parts.setdefault(offered[key].part, {})[key] = value
    arguments: dict[str, object] = dict(parts.pop("", {}))
    for part, values in parts.items():
        arguments[part] = replace(getattr(cls, part), **values)
    return cls(**arguments)


def _value(policy: Policy, option: Option) -> Value:
    holder = getattr(policy, option.part) if option.part else policy
    return getattr(holder, option.name)


def _text(value: Value) -> str:
    """Shortest text that reads back as the same value: 1 for 1.0."""
    text = str(value)
    return text.removesuffix(".0") if isinstance(value, float) else text


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
    "random": Random,
    "resident-vote": ResidentVote,
    "coreset": Coreset,
}

NEED_IMPORTANCE = (McMoe,)
