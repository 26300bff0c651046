"""A checkpoint's tokenizer and chat template, without remote code."""

from coterie.tokenizer.chat_template import ChatTemplate, read_template
from coterie.tokenizer.tokenizer import (
    MASK_TOKEN,
    IdTokenizer,
    SubwordTokenizer,
    TextTokenizer,
    load_tokenizer,
)

__all__ = [
    "MASK_TOKEN",
    "ChatTemplate",
    "IdTokenizer",
    "SubwordTokenizer",
    "TextTokenizer",
    "load_tokenizer",
    "read_template",
]
