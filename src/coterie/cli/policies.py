"""``coterie policies``: the routing policies and their options."""

import re

from rich.table import Table

from coterie.cli import options as o
from coterie.cli.output import plain_table, print_result
from coterie.routing import POLICIES
from coterie.specs import spec_options


def policies(json: o.Json = False) -> None:
    """List every routing policy with its meaning, its source and its options.

    \b
    coterie policies
    coterie policies --json
    """
    documents = []
    for name, cls in POLICIES.items():
        options = {option.name: option.default for option in spec_options(cls).values()}
        documents.append({"name": name, "meaning": policy_doc(cls), "options": options})
    last = "\nSeveral options: des-vote:beta=0.15,voters=before-eos,protect=top1"
    print_result(documents, policy_table(), "", option_table(), last, json=json)


def policy_table() -> Table:
    rows = []
    for name, cls in POLICIES.items():
        options = spec_options(cls).values()
        needed = [option.name for option in options if option.default == "required"]
        optional = " ".join(option.name for option in options if option.name not in needed)
        required = ",".join(f"{option}=.." for option in needed)
        spec = f"{name}:{required}" if required else name
        rows.append((spec, *split_source(policy_doc(cls)), optional))
    return plain_table("policy", "meaning", "source", "options", rows=rows)


def option_table() -> Table:
    """Each option of any policy, once, with its values."""
    values_by_option: dict[str, dict[str, None]] = {}
    for option in (each for cls in POLICIES.values() for each in spec_options(cls).values()):
        values = str(option)
        values += " (or one for each layer: 0.3/0.2/0.25)" if option.accepts_list else ""
        values_by_option.setdefault(option.name, {})[values] = None
    rows = [(name, ", or ".join(values)) for name, values in values_by_option.items()]
    return plain_table("option", "values", rows=rows)


def policy_doc(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split())


def split_source(text: str) -> tuple[str, str]:
    """A docstring without its first parenthesis, which holds the source; and that source."""
    text = text.replace("``", "")
    match = re.search(r" \(([^()]*)\)", text)
    return (text, "") if match is None else (text[: match.start()] + text[match.end() :], match[1])
