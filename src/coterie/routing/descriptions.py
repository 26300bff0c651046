"""The policies and their options in words, from docstrings and one table."""

from __future__ import annotations

import re

from coterie.routing.registry import POLICIES
from coterie.specs import spec_options

MEANINGS = {
    "k": "experts of each token", "beta": "share of experts, or of probability (naee, mc-moe)",
    "m": "experts of a block", "tau": "share of all votes that the coreset holds",
    "least": "fewest experts of a block (default k)", "price": "price of one more expert, in votes",
    "voters": "positions of the block that vote", "vote": "what a token gives each expert",
    "tally": "how votes become a coreset", "scope": "rows that share one coreset",
    "protect": "experts that are always elected; mc-moe: share of tokens that keep theirs",
    "max": "most experts of a coreset; slots: those that fit into memory",
    "resident_bonus": "factor on the votes of experts in fast memory",
    "max_vote_loss": "most votes that the bonus may cost, as a share",
    "seed": "seed of random coresets",
}  # fmt: skip


def spec_form(name: str) -> str:
    """The policy with the options that it needs: ``des-vote:beta=..``."""
    options = spec_options(POLICIES[name]).values()
    needed = ",".join(f"{option.name}=.." for option in options if option.default == "required")
    return f"{name}:{needed}" if needed else name


def policy_doc(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split())


def option_meaning(cls: type, name: str) -> str:
    """The meaning of an option; of one not in the table, what the policy's docstring says of it."""
    sentences = re.split(r"(?<=\.) ", policy_doc(cls))
    sentence = next((text for text in sentences if re.search(rf"\b{name}\b", text)), "")
    return MEANINGS.get(name) or sentence.replace("``", "").rstrip(".") or "not described"


def split_source(text: str) -> tuple[str, str]:
    """A docstring without its first parenthesis, which holds the source; and that source."""
    text = text.replace("``", "")
    match = re.search(r" \(([^()]*)\)", text)
    return (text, "") if match is None else (text[: match.start()] + text[match.end() :], match[1])
