"""Chat templates, rendered in a sandbox: the checkpoint's own, else the default of its family."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coterie.errors import TokenizerError
from coterie.strict_json import read_object


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source, its origin for errors, and the special tokens that it may use."""

    source: str
    origin: str
    special_tokens: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text that ends where the model's turn starts.

        Raises TokenizerError that names the origin of a template that fails.
        """
        try:
            template = _sandboxed_environment().from_string(self.source)
            return template.render(
                messages=messages, add_generation_prompt=True, **self.special_tokens
            )
        # A template is a program of the checkpoint: any error that it raises is bad input.
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise TokenizerError(f"{self.origin}: the chat template fails: {error}") from None


def read_template(folder: Path, default: str) -> ChatTemplate:
    """``chat_template.jinja``, else the one in ``tokenizer_config.json``, else ``default`` (jinja).

    Raises TokenizerError or CheckpointError that names a file that cannot be read.
    """
    config = folder / "tokenizer_config.json"
    settings = read_object(config) if os.path.lexists(config) else {}
    tokens = special_tokens(settings)
    template_file = folder / "chat_template.jinja"
    if os.path.lexists(template_file):
        return ChatTemplate(_read_text(template_file), str(template_file), tokens)
    if settings.get("chat_template") is not None:
        return ChatTemplate(
            _template_source(settings["chat_template"], config), str(config), tokens
        )
    return ChatTemplate(default, "the family's default template", tokens)


def special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    """``{"eos_token": "<|endoftext|>", ...}`` from a tokenizer_config in either format."""
    tokens = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _template_source(value: object, path: Path) -> str:
    """The template, from a string or from a list of named templates."""
    if isinstance(value, str):
        return value
    entries = value if isinstance(value, list) else []
    for entry in entries:
        if isinstance(entry, dict) and entry.get("name") == "default":
            return str(entry.get("template"))
    raise TokenizerError(f"{path}: chat_template is neither a string nor a list with a 'default'")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: not readable as text ({error})") from None


def _sandboxed_environment() -> ImmutableSandboxedEnvironment:
    """The environment that checkpoints expect: trimmed blocks, loop controls, raise_exception."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_template_error
    return environment


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)
