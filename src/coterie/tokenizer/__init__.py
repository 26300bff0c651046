"""Text in, ids out, and back: a checkpoint's tokenizer and chat template, and no remote code."""

from coterie.tokenizer.chat_template import ChatTemplate, read_template
from coterie.tokenizer.tokenizer import (
    IdTokenizer,
    SubwordTokenizer,
    TokenizerError,
    TextTokenizer,
    load_tokenizer,
)

__all__ = [
    "ChatTemplate",
    "IdTokenizer",
    "SubwordTokenizer",
    "TokenizerError",
    "TextTokenizer",
    "load_tokenizer",
    "read_template",
]
