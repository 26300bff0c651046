"""``coterie policies``: the routing policies and their options."""

from collections.abc import Iterable

from rich.table import Table

from coterie.cli.output import plain_table, print_result
from coterie.routing import POLICIES
from coterie.routing.descriptions import option_meaning, policy_doc, spec_form, split_source
from coterie.specs import spec_options, unknown_name


def policies(name: str | None = None, *, json: bool = False) -> None:
    """List every routing policy with its meaning and its source, or explain one.

    \b
    coterie policies
    coterie policies des-vote
    coterie policies --json
    """
    name = name and name.partition(":")[0]  # also of des-vote:beta=0.3
    if name is not None and name not in POLICIES:
        raise unknown_name(name, POLICIES, "policy")
    shown = POLICIES if name is None else {name: POLICIES[name]}
    documents = []
    for policy, cls in shown.items():
        defaults = {option.name: option.default for option in spec_options(cls).values()}
        documents.append({"name": policy, "meaning": policy_doc(cls), "options": defaults})
    if name is None:
        last = "\nOptions of one policy: coterie policies des-vote"
        parts = (policy_table(), "", option_table(POLICIES.values()), last)
    else:
        cls = shown[name]
        parts = (f"{spec_form(name)}\n{policy_doc(cls).replace('``', '')}\n",)
        has_options = bool(spec_options(cls))
        parts += (option_table([cls], defaults=True) if has_options else "It has no options.",)
    print_result(documents, *parts, json=json)


def policy_table() -> Table:
    rows = ((spec_form(name), *split_source(policy_doc(cls))) for name, cls in POLICIES.items())
    return plain_table("policy", "meaning", "source", rows=rows, unwrapped=("policy",))


def option_table(policy_types: Iterable[type], *, defaults: bool = False) -> Table:
    """Each option once, with its values and its meaning."""
    values: dict[str, dict[str, None]] = {}
    default_texts: dict[str, str] = {}
    meanings: dict[str, str] = {}
    pairs = ((cls, option) for cls in policy_types for option in spec_options(cls).values())
    for cls, option in pairs:
        text = str(option) + (", or one a layer: 0.3/0.2/0.25" if option.accepts_list else "")
        values.setdefault(option.name, {})[text] = None
        default_texts[option.name] = "none" if option.default is None else str(option.default)
        meanings[option.name] = meanings.get(option.name) or option_meaning(cls, option.name)
    rows = (
        (name, *([default_texts[name]] if defaults else []), meanings[name], ", or ".join(texts))
        for name, texts in values.items()
    )
    heads = ("option", *(["default"] if defaults else []), "meaning", "values")
    return plain_table(*heads, rows=rows, unwrapped=("option", "default"))
