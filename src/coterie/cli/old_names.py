"""Old names of options and values, accepted until 0.2 with one note each."""

from collections.abc import Mapping, Sequence

from coterie.cli.output import OLD_NAMES, print_note

LAST_VERSION = "0.2"
END_OF_OPTIONS = "--"
OLD_OPTIONS: Mapping[str, str] = OLD_NAMES["options"]
OLD_OPTIONS_OF: Mapping[str, Mapping[str, str]] = OLD_NAMES["options_of"]  # by command
OLD_VALUES: Mapping[str, Mapping[str, str]] = OLD_NAMES["values"]  # by option
UNTOUCHED = ("lm-eval",)  # commands with the options of another program


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """The command line with each old option or value under its new name.

    Arguments after ``--`` stay as they are. Each old name prints one note on stderr.
    """
    command = arguments[0] if arguments else ""
    if command in UNTOUCHED:
        return list(arguments)
    options = {**OLD_OPTIONS, **OLD_OPTIONS_OF.get(command, {})}
    options |= OLD_OPTIONS_OF.get(" ".join(arguments[:2]), {})
    translated: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == END_OF_OPTIONS:
            return [*translated, *arguments[position:]]
        previous = translated[-1] if translated else ""
        if previous in OLD_VALUES:
            translated.append(_new_value(previous, argument))
            continue
        name, equals, value = argument.partition("=")
        new_name = _noted(name, options.get(name, name))
        translated.append(new_name + equals + _new_value(new_name, value))
    return translated


def _new_value(option: str, value: str) -> str:
    """The value under its new name; a spec ``NAME:options`` keeps its options."""
    name, colon, rest = value.partition(":")
    return _noted(name, OLD_VALUES.get(option, {}).get(name, name)) + colon + rest


def _noted(old: str, new: str) -> str:
    if new != old:
        print_note(f"{old} is now {new}; the old name goes with {LAST_VERSION}")
    return new
