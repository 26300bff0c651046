"""Chat templates: the checkpoint's own, else the default of its family."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import TokenizerError, clip
from coterie.files import MIB, read_text
from coterie.strict_json import read_object
from coterie.tokenizer.template_process import RENDERER

TEMPLATE_LIMIT = 4 * MIB


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source, its origin for errors, and the special tokens that it may use."""

    source: str
    origin: str
    special_tokens: Mapping[str, str]

    @property
    def takes_tools(self) -> bool:
        """Whether the template reads the list of tools."""
        return re.search(r"\btools\b", self.source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """The prompt text that ends where the model's turn starts.

        Raises TokenizerError that names the origin of a template that fails, that takes no tools,
        or that leaves out a system turn.
        """
        if tools and not self.takes_tools:
            raise TokenizerError(f"{self.origin}: the chat template takes no tools")
        text = self._render(messages, tools)
        for message in messages:
            content = str(message.get("content", "")).strip()
            if message.get("role") == "system" and content not in text:
                raise TokenizerError(f"{self.origin}: the chat template leaves out a system turn")
        return text

    def _render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] | None
    ) -> str:
        turns: dict[str, object] = {"messages": messages, "add_generation_prompt": True}
        turns |= {"tools": tools} if tools else {}
        try:
            return RENDERER.render(self.source, {**self.special_tokens, **turns})
        except TokenizerError as error:
            problem = clip(str(error), 300)
            raise TokenizerError(f"{self.origin}: the chat template fails: {problem}") from None


def read_template(folder: Path, default: str) -> ChatTemplate:
    """``chat_template.jinja``, else the one in ``tokenizer_config.json``, else ``default`` (jinja).

    Raises TokenizerError or CheckpointError that names a file that cannot be read.
    """
    config = folder / "tokenizer_config.json"
    settings = read_object(config) if os.path.lexists(config) else {}
    template_file = folder / "chat_template.jinja"
    source, origin = default, "the family's default template"
    if os.path.lexists(template_file):
        source, origin = read_text(template_file, TEMPLATE_LIMIT), str(template_file)
    elif settings.get("chat_template") is not None:
        source, origin = _template_source(settings["chat_template"], config), str(config)
    if not source.strip():
        raise TokenizerError(f"{origin}: the chat template is empty: every prompt would be")
    return ChatTemplate(source, origin, special_tokens(settings))


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
    for entry in value if isinstance(value, list) else [{"name": "default", "template": value}]:
        if isinstance(entry, dict) and entry.get("name") == "default":
            value = entry.get("template")
    if isinstance(value, str):
        return value
    raise TokenizerError(f"{path}: chat_template is neither a string nor a list with a 'default'")
