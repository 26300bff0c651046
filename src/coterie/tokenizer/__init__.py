"""Text in, ids out, and back: a checkpoint's tokenizer and chat template, and no remote code."""

from coterie.tokenizer.chat_template import ChatTemplate, read_template
from coterie.tokenizer.tokenizer import (
    IdTokenizer,
    SubwordTokenizer,
    TextError,
    TextTokenizer,
    load_tokenizer,
)

__all__ = [
    "ChatTemplate",
    "IdTokenizer",
    "SubwordTokenizer",
    "TextError",
    "TextTokenizer",
    "load_tokenizer",
    "read_template",
]
