"""``coterie policies``: the routing policies and their options."""

from collections.abc import Iterable

from rich.table import Table

from coterie.cli.output import plain_table, print_result
from coterie.errors import ConfigError
from coterie.routing import POLICIES
from coterie.routing.descriptions import MEANINGS, policy_doc, spec_form, split_source
from coterie.specs import Option, spec_options


def policies(name: str | None = None, *, json: bool = False) -> None:
    """List every routing policy with its meaning and its source, or explain one.

    \b
    coterie policies
    coterie policies des-vote
    coterie policies --json
    """
    name = name and name.partition(":")[0]  # also of des-vote:beta=0.3
    if name is not None and name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    shown = POLICIES if name is None else {name: POLICIES[name]}
    documents = []
    for policy, cls in shown.items():
        defaults = {option.name: option.default for option in spec_options(cls).values()}
        documents.append({"name": policy, "meaning": policy_doc(cls), "options": defaults})
    if name is None:
        options = (option for cls in POLICIES.values() for option in spec_options(cls).values())
        last = "\nOptions of one policy: coterie policies des-vote"
        parts = (policy_table(), "", option_table(options), last)
    else:
        options = list(spec_options(shown[name]).values())
        parts = (f"{spec_form(name)}\n{policy_doc(shown[name]).replace('``', '')}\n",)
        parts += (option_table(options, defaults=True),) if options else ("It has no options.",)
    print_result(documents, *parts, json=json)


def policy_table() -> Table:
    rows = ((spec_form(name), *split_source(policy_doc(cls))) for name, cls in POLICIES.items())
    return plain_table("policy", "meaning", "source", rows=rows, unwrapped=("policy",))


def option_table(options: Iterable[Option], *, defaults: bool = False) -> Table:
    """Each option once, with its values and its meaning."""
    values: dict[str, dict[str, None]] = {}
    default_texts: dict[str, str] = {}
    for option in options:
        text = str(option) + (", or one a layer: 0.3/0.2/0.25" if option.accepts_list else "")
        values.setdefault(option.name, {})[text] = None
        default_texts[option.name] = "none" if option.default is None else str(option.default)
    rows = (
        (
            name,
            *([default_texts[name]] if defaults else []),
            MEANINGS.get(name, ""),
            ", or ".join(v),
        )
        for name, v in values.items()
    )
    heads = ("option", *(["default"] if defaults else []), "meaning", "values")
    return plain_table(*heads, rows=rows, unwrapped=("option", "default"))
