"""A program that renders chat templates: one JSON object a line in, one out.

A template is a program of a stranger. It runs in a sandbox in a process of its own, so that the
system can end it when it takes too much time or memory. This file is run by path, and imports
nothing of the package.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import NoReturn

sys.path += sys.argv[1:]

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES, MAX_SECONDS, MAX_CHARACTERS = 1 << 29, 5, 4_000_000


class GenerationBlock(Extension):
    """``{% generation %}``, with which training marks the model's turns; it prints its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    """Answers requests until standard input ends."""
    _, limit = resource.getrlimit(resource.RLIMIT_AS)
    limit = MAX_BYTES if limit == resource.RLIM_INFINITY else min(limit, MAX_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # standard input ends with the parent
    for line in sys.stdin:
        # Unhandled, the alarm ends the process, even within one long operation.
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        answer = json.dumps(respond(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


def respond(request: dict) -> dict[str, str]:
    """The text, or the error of a template."""
    try:
        text = compiled(request["source"]).render(request["variables"])
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"it makes a prompt of {len(text):,} characters"}
    return {"text": text}


@lru_cache(maxsize=4)
def compiled(source: str) -> Template:
    """The template, in the environment that checkpoints expect."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.filters["tojson"] = to_json
    return environment.from_string(source)


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """The local time of the prompt."""
    return datetime.now().strftime(form)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers; Jinja's own filter escapes for HTML."""
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


main()
