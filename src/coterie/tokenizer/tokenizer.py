"""Tokenizers: prompts to ids and ids to text, with a ``tokenizer.json`` or without one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tokenizers import Tokenizer

from coterie.errors import TokenizerError, clip, quote
from coterie.strict_json import read_object
from coterie.tokenizer.chat_template import ChatTemplate, read_template, special_tokens
from coterie.tokenizer.token_ids import read_token_ids
from coterie.tokenizer.tokenizer_file import read_tokenizer_json

MASK_TOKEN = "<|mask|>"
OTHER_TOKENIZERS = (
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
MAX_CHARACTERS = 4_000_000  # of a prompt; on lack of memory, the library ends the process

T = TypeVar("T")
Turns = Sequence[Mapping[str, object]]  # {"role", "content", ..}, as chat templates read them


class TextTokenizer(Protocol):
    """Text to ids and back."""

    @property
    def mask_id(self) -> int | None:
        """The id of the mask token, or None if no file defines it."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-text ids, ascending; empty if no file defines any."""
        ...

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """The ids of ``prompt`` in the chat template; with ``raw``, of the text alone."""
        ...

    def encode_chat(self, turns: Turns, tools: Turns | None = None) -> list[int]:
        """The ids of a conversation up to the model's next turn.

        Raises TokenizerError for tools that the chat template does not take.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        ...

    def decode_token(self, token: int) -> str:
        """The text of one id, including special tokens."""
        ...

    def prompt_note(self, prompt: str) -> str | None:
        """A note for the user about how ``prompt`` was read, in one line; usually None."""
        ...


@dataclass(frozen=True)
class SubwordTokenizer:
    """A ``tokenizer.json`` with its chat template. Methods raise TokenizerError if it fails."""

    file: Path
    tokenizer: Tokenizer
    template: ChatTemplate
    mask_id: int | None
    eos_ids: tuple[int, ...]
    hidden_span: tuple[int, int] | None = None  # marks around ids that are no part of an answer

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        _encode_utf8(prompt)
        if not raw:
            return self.encode_chat([{"role": "user", "content": prompt}])
        return _call(self.file, lambda: self.tokenizer.encode(prompt, add_special_tokens=True).ids)

    def encode_chat(self, turns: Turns, tools: Turns | None = None) -> list[int]:
        text = self.template.render(turns, tools)
        _encode_utf8(text)
        # A template already contains every special token.
        return _call(self.file, lambda: self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        shown = list(ids) if self.hidden_span is None else _without_spans(ids, *self.hidden_span)
        return _call(self.file, lambda: self.tokenizer.decode(shown, skip_special_tokens=True))

    def decode_token(self, token: int) -> str:
        return _call(self.file, lambda: self.tokenizer.decode([token], skip_special_tokens=False))

    def prompt_note(self, prompt: str) -> str | None:
        return None


@dataclass(frozen=True)
class IdTokenizer:
    """A model without a tokenizer: a prompt is ids ("5 17 33"), or its UTF-8 bytes are the ids."""

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
                "(this model has no tokenizer: give ids such as '5 17 33')"
            )
        return ids

    def encode_chat(self, turns: Turns, tools: Turns | None = None) -> list[int]:
        if tools:
            raise TokenizerError("this model has no tokenizer, so it takes no tools")
        return [token for turn in turns for token in self.encode(str(turn.get("content", "")))]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)

    def decode_token(self, token: int) -> str:
        return f"{token} "

    def prompt_note(self, prompt: str) -> str | None:
        if _parse_ids(prompt) is not None:
            return None
        return "this model has no tokenizer: the prompt's UTF-8 bytes serve as token ids"


def load_tokenizer(
    folder: Path, *, template: str, vocab_size: int, hidden_span: tuple[str, str] | None = None
) -> TextTokenizer:
    """The tokenizer of a checkpoint folder: its ``tokenizer.json``, else ids as text.

    ``template`` (jinja) is used if the folder has none. ``hidden_span`` are the marks around text
    that is no part of an answer. Raises TokenizerError that names the file
    if the tokenizer is damaged or has ids outside the vocabulary.
    """
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        _check_no_other_tokenizer(folder)
        return IdTokenizer(vocab_size)
    tokenizer = _read_tokenizer(path, vocab_size)
    return SubwordTokenizer(
        file=path,
        tokenizer=tokenizer,
        template=read_template(folder, template),
        mask_id=tokenizer.token_to_id(MASK_TOKEN),
        eos_ids=_read_eos_ids(folder, tokenizer, vocab_size),
        hidden_span=None if hidden_span is None else _span_ids(tokenizer, *hidden_span),
    )


def _span_ids(tokenizer: Tokenizer, first: str, last: str) -> tuple[int, int] | None:
    """The ids of two marks; None if the vocabulary lacks one."""
    ids = tokenizer.token_to_id(first), tokenizer.token_to_id(last)
    return None if ids[0] is None or ids[1] is None else (ids[0], ids[1])


def _without_spans(ids: Sequence[int], first: int, last: int) -> list[int]:
    """The ids outside every span from ``first`` to ``last``; an open span lasts to the end."""
    shown, is_hidden = [], False
    for token in ids:
        is_hidden = (is_hidden or token == first) and token != last
        if not is_hidden and token != last:
            shown.append(token)
    return shown


def _check_no_other_tokenizer(folder: Path) -> None:
    """Raises TokenizerError if the folder has a tokenizer of another kind: ids would be wrong."""
    names = [name for name in OTHER_TOKENIZERS if os.path.lexists(folder / name)]
    names += sorted(path.name for path in folder.glob("*.tiktoken"))
    if names:
        raise TokenizerError(
            f"{folder}: has {names[0]} but no tokenizer.json, which is the only tokenizer that is "
            "read; transformers' AutoTokenizer writes one with save_pretrained"
        )


def _call(file: Path, use: Callable[[], T]) -> T:
    """What the library returns; raises TokenizerError for each of its many kinds of error."""
    try:
        return use()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # It raises a bare Exception, or where its own code panics, a BaseException.
    except BaseException as error:
        reason = clip(str(error), 300) or type(error).__name__
        raise TokenizerError(f"{file}: the tokenizer fails: {reason}") from None


def _encode_utf8(prompt: str) -> bytes:
    if len(prompt) > MAX_CHARACTERS:
        raise TokenizerError(f"the prompt has {len(prompt):,} characters, too many for a model")
    try:
        return prompt.encode("utf-8")
    # Bytes that are not UTF-8 arrive from the command line as lone surrogates.
    except UnicodeEncodeError:
        raise TokenizerError("the prompt is not valid UTF-8 text") from None


def _parse_ids(prompt: str) -> list[int] | None:
    """The ids in "5 17 33" (also with commas), or None for any other text."""
    parts = prompt.replace(",", " ").split()
    if parts and all(part.isascii() and part.isdigit() for part in parts):
        return [int(part[:20]) for part in parts]  # a longer number is in no vocabulary
    return None


def _read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    content = read_tokenizer_json(path)
    tokenizer = _call(path, lambda: Tokenizer.from_str(content))
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= vocab_size:
        raise TokenizerError(
            f"{path}: has token id {highest}, but the model's vocabulary has {vocab_size} ids"
        )
    return tokenizer


def _read_eos_ids(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """``eos_token`` of tokenizer_config.json and ``eos_token_id`` of generation_config.json."""
    eos_ids: set[int] = set()
    config, generation = (folder / f"{name}_config.json" for name in ("tokenizer", "generation"))
    if os.path.lexists(config):
        token = special_tokens(read_object(config)).get("eos_token")
        token_id = None if token is None else _call(config, lambda: tokenizer.token_to_id(token))
        if token is not None and token_id is None:
            raise TokenizerError(f"{config}: eos_token {quote(token)} is not in tokenizer.json")
        eos_ids |= set() if token_id is None else {token_id}
    if os.path.lexists(generation):
        values = read_object(generation)
        eos_ids |= set(
            read_token_ids(values, "eos_token_id", file=generation, vocab_size=vocab_size)
        )
    return tuple(sorted(eos_ids))
