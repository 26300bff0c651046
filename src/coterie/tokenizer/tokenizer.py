"""Codecs: how prompts become ids and ids become text, with a tokenizer file and without one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from coterie.tokenizer.chat_template import ChatTemplate, read_template, special_tokens
from coterie.tokenizer.errors import TokenizerError, read_json_object

MASK_TOKEN = "<|mask|>"


class TextTokenizer(Protocol):
    """Text to ids and back; ``mask`` and ``ends`` are missing where no file tells them."""

    @property
    def mask_id(self) -> int | None:
        """The id of an undecided position, or None where no file tells."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text, ascending; empty where no file tells."""
        ...

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """The ids of ``prompt`` as a user's turn, or of the bare text where ``raw``."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        ...

    def decode_token(self, token: int) -> str:
        """One id as a reader may see it, special tokens too."""
        ...

    def prompt_note(self, prompt: str) -> str | None:
        """What the user should know of how ``prompt`` was read, in one line; mostly nothing."""
        ...


@dataclass(frozen=True)
class SubwordTokenizer:
    """A ``tokenizer.json`` with its chat template."""

    tokenizer: Tokenizer
    template: ChatTemplate
    mask_id: int | None
    eos_ids: tuple[int, ...]

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        _encode_utf8(prompt)
        if raw:
            return self.tokenizer.encode(prompt).ids
        text = self.template.render([{"role": "user", "content": prompt}])
        # The template writes every special token itself: the tokenizer must add no second one.
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def decode_token(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def prompt_note(self, prompt: str) -> str | None:
        return None


@dataclass(frozen=True)
class IdTokenizer:
    """Without a tokenizer: a prompt is ids ("5 17 33"); any other text is its UTF-8 bytes."""

    vocab_size: int
    mask_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        parsed_ids = _parse_ids(prompt)
        ids = list(_encode_utf8(prompt)) if parsed_ids is None else parsed_ids
        out_of_range = [token for token in ids if token >= self.vocab_size]
        if out_of_range:
            raise TokenizerError(
                f"token id {out_of_range[0]} is outside the vocabulary of {self.vocab_size} "
                "(this model has no tokenizer, so a prompt is ids such as '5 17 33')"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)

    def decode_token(self, token: int) -> str:
        return f"{token} "

    def prompt_note(self, prompt: str) -> str | None:
        if _parse_ids(prompt) is not None:
            return None
        return "this model has no tokenizer: the prompt's UTF-8 bytes serve as token ids"


def load_tokenizer(folder: Path, *, template: str, vocab_size: int) -> TextTokenizer:
    """The codec of a checkpoint folder: its ``tokenizer.json``, else plain numbers.

    ``template`` (jinja) serves where the folder has none of its own. Raises TextError naming the
    file where the tokenizer is damaged or holds ids that the model lacks.
    """
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return IdTokenizer(vocab_size)
    tokenizer = _read_tokenizer(path, vocab_size)
    return SubwordTokenizer(
        tokenizer=tokenizer,
        template=read_template(folder, template),
        mask_id=tokenizer.token_to_id(MASK_TOKEN),
        eos_ids=_read_eos_ids(folder, tokenizer),
    )


def _encode_utf8(prompt: str) -> bytes:
    try:
        return prompt.encode("utf-8")
    # Bytes that were no UTF-8 where the prompt came from arrive as lone surrogates.
    except UnicodeEncodeError:
        raise TokenizerError("the prompt is not valid UTF-8 text") from None


def _parse_ids(prompt: str) -> list[int] | None:
    """The ids in "5 17 33" (also with commas), or None where the prompt is anything else."""
    words = prompt.replace(",", " ").split()
    if words and all(word.isascii() and word.isdigit() for word in words):
        return [int(word) for word in words]
    return None


def _read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises bare Exception for every kind of damage.
    except Exception as error:
        raise TokenizerError(f"{path}: not a tokenizer ({error})") from None
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= vocab_size:
        raise TokenizerError(f"{path}: holds token id {highest}, but the model knows {vocab_size} ids")
    return tokenizer


def _read_eos_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """End ids: eos_token of the tokenizer_config, eos_token_id of the generation_config."""
    eos_ids: set[int] = set()
    config = folder / "tokenizer_config.json"
    if os.path.lexists(config):
        token = special_tokens(read_json_object(config)).get("eos_token")
        token_id = None if token is None else tokenizer.token_to_id(token)
        if token is not None and token_id is None:
            raise TokenizerError(f"{config}: eos_token {token!r} is not in tokenizer.json")
        eos_ids |= set() if token_id is None else {token_id}
    generation = folder / "generation_config.json"
    if os.path.lexists(generation):
        configured = read_json_object(generation).get("eos_token_id")
        for value in configured if isinstance(configured, list) else [configured]:
            eos_ids |= {value} if isinstance(value, int) else set()
    return tuple(sorted(eos_ids))
