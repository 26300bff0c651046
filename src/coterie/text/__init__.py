"""Text in, ids out, and back: a checkpoint's tokenizer and chat template, and no remote code."""

from coterie.text.codec import Codec, Numbers, Subwords, TextError, load_codec
from coterie.text.template import ChatTemplate, read_template

__all__ = [
    "ChatTemplate",
    "Codec",
    "Numbers",
    "Subwords",
    "TextError",
    "load_codec",
    "read_template",
]
