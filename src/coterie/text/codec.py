"""Codecs: how prompts become ids and ids become text, with a tokenizer file and without one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from coterie.text.errors import TextError, read_object
from coterie.text.template import ChatTemplate, read_template, special_tokens

MASK_TOKEN = "<|mask|>"


class Codec(Protocol):
    """Text to ids and back; ``mask`` and ``ends`` are missing where no file tells them."""

    @property
    def mask(self) -> int | None:
        """The id of an undecided position, or None where no file tells."""
        ...

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text, ascending; empty where no file tells."""
        ...

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """The ids of ``prompt`` as a user's turn, or of the bare text where ``raw``."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        ...

    def piece(self, token: int) -> str:
        """One id as a reader may see it, special tokens too."""
        ...

    def remark(self, prompt: str) -> str | None:
        """What the user should know of how ``prompt`` was read, in one line; mostly nothing."""
        ...


@dataclass(frozen=True)
class Subwords:
    """A ``tokenizer.json`` with its chat template."""

    tokenizer: Tokenizer
    template: ChatTemplate
    mask: int | None
    ends: tuple[int, ...]

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        _utf8(prompt)
        if raw:
            return self.tokenizer.encode(prompt).ids
        text = self.template.render([{"role": "user", "content": prompt}])
        # The template writes every special token itself: the tokenizer must add no second one.
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def remark(self, prompt: str) -> str | None:
        return None


@dataclass(frozen=True)
class Numbers:
    """Without a tokenizer: a prompt is ids ("5 17 33"); any other text is its UTF-8 bytes."""

    vocabulary: int
    mask: int | None = None
    ends: tuple[int, ...] = ()

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        ids = _numbers(prompt)
        found = list(_utf8(prompt)) if ids is None else ids
        beyond = [token for token in found if token >= self.vocabulary]
        if beyond:
            raise TextError(
                f"token id {beyond[0]} is outside the vocabulary of {self.vocabulary} "
                "(this model has no tokenizer, so a prompt is ids such as '5 17 33')"
            )
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)

    def piece(self, token: int) -> str:
        return f"{token} "

    def remark(self, prompt: str) -> str | None:
        if _numbers(prompt) is not None:
            return None
        return "this model has no tokenizer: the prompt's UTF-8 bytes serve as token ids"


def load_codec(folder: Path, *, template: str, vocabulary: int) -> Codec:
    """The codec of a checkpoint folder: its ``tokenizer.json``, else plain numbers.

    ``template`` (jinja) serves where the folder has none of its own. Raises TextError naming the
    file where the tokenizer is damaged or holds ids that the model lacks.
    """
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return Numbers(vocabulary)
    tokenizer = _read_tokenizer(path, vocabulary)
    return Subwords(
        tokenizer=tokenizer,
        template=read_template(folder, template),
        mask=tokenizer.token_to_id(MASK_TOKEN),
        ends=_ends(folder, tokenizer),
    )


def _utf8(prompt: str) -> bytes:
    try:
        return prompt.encode("utf-8")
    # Bytes that were no UTF-8 where the prompt came from arrive as lone surrogates.
    except UnicodeEncodeError:
        raise TextError("the prompt is not valid UTF-8 text") from None


def _numbers(prompt: str) -> list[int] | None:
    """The ids in "5 17 33" (also with commas), or None where the prompt is anything else."""
    words = prompt.replace(",", " ").split()
    if words and all(word.isascii() and word.isdigit() for word in words):
        return [int(word) for word in words]
    return None


def _read_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises bare Exception for every kind of damage.
    except Exception as error:
        raise TextError(f"{path}: not a tokenizer ({error})") from None
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= vocabulary:
        raise TextError(f"{path}: holds token id {highest}, but the model knows {vocabulary} ids")
    return tokenizer


def _ends(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """End ids: eos_token of the tokenizer_config, eos_token_id of the generation_config."""
    ends: set[int] = set()
    config = folder / "tokenizer_config.json"
    if os.path.lexists(config):
        token = special_tokens(read_object(config)).get("eos_token")
        identity = None if token is None else tokenizer.token_to_id(token)
        if token is not None and identity is None:
            raise TextError(f"{config}: eos_token {token!r} is not in tokenizer.json")
        ends |= set() if identity is None else {identity}
    generation = folder / "generation_config.json"
    if os.path.lexists(generation):
        listed = read_object(generation).get("eos_token_id")
        for value in listed if isinstance(listed, list) else [listed]:
            ends |= {value} if isinstance(value, int) else set()
    return tuple(sorted(ends))
