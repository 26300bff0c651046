"""The embedded model's tokenizer: whole words and numbers, and single bytes for other text."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from coterie.files import atomic_write, atomic_write_json
from coterie.lab.problems import MAX_NUMBER, TRAINING_MAKERS, draw_equation

END_OF_TEXT = "<|endoftext|>"
MASK_TOKEN = "<|mask|>"
HUMAN = "<role>HUMAN</role>"
ASSISTANT = "<role>ASSISTANT</role>"
SYSTEM = "<role>SYSTEM</role>"
ROLE_END = "<|role_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, MASK_TOKEN, HUMAN, ASSISTANT, SYSTEM, ROLE_END]

PIECE_PATTERN = r"\n *| ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+| +"

CHAT_TEMPLATE = (
    "{% for message in messages %}<role>{{ {'user': 'HUMAN', 'assistant': 'ASSISTANT', "
    "'system': 'SYSTEM'}[message.role] }}</role>{{ message.content }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def piece_splitter() -> Sequence:
    """Splits text into words, short numbers, marks and line breaks with their indentation."""
    return Sequence(
        [
            Split(Regex(PIECE_PATTERN), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@cache  # it takes half a minute, and a run needs it twice
def build_tokenizer(num_problems: int = 20_000, seed: int = 0) -> Tokenizer:
    """A lossless tokenizer with each piece of ``num_problems`` problems per task."""
    splitter = piece_splitter()
    bytes_ = sorted(ByteLevel.alphabet())
    words = [piece for piece in _collect_pieces(splitter, num_problems, seed) if len(piece) > 1]
    scores = [(piece, -20.0) for piece in bytes_] + [(piece, -1.0) for piece in words]
    tokenizer = Tokenizer(
        Unigram(
            [(piece, 0.0) for piece in SPECIAL_TOKENS] + scores, unk_id=None, byte_fallback=False
        )
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str = CHAT_TEMPLATE) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template."""
    atomic_write(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "mask_token": MASK_TOKEN,
        "chat_template": chat_template,
    }
    atomic_write_json(folder / "tokenizer_config.json", config)


def _collect_pieces(splitter: Sequence, num_problems: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = [f" {n}{n}" for n in range(MAX_NUMBER + 1)]
    for maker in TRAINING_MAKERS.values():
        for _ in range(num_problems):
            problem = maker(rng)
            texts.append(f"{problem.prompt}\n{problem.answer}")
    texts.extend(draw_equation(rng) for _ in range(num_problems))
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    return sorted(counts, key=lambda piece: (-counts[piece], piece))
