"""Text in, ids out, and back: a checkpoint's tokenizer and chat template, and no remote code."""

from coterie.text.codec import (
    TextTokenizer,
    IdTokenizer,
    SubwordTokenizer,
    TextError,
    load_tokenizer,
)
from coterie.text.template import ChatTemplate, read_template

__all__ = [
    "ChatTemplate",
    "TextTokenizer",
    "IdTokenizer",
    "SubwordTokenizer",
    "TextError",
    "load_tokenizer",
    "read_template",
]
