"""Training of the text model: tokenizer, rows and settings, from a folder of text files.

The folder has the files of ``train`` and ``held-out``, at any depth. Shapes: N tokens, B rows, n
blocks of text in a row, b positions of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from coterie.errors import ConfigError
from coterie.files import atomic_write, read_text
from coterie.lab.training.checkpoint import TrainingRun
from coterie.lab.training.data import IGNORE_INDEX, block_visibility
from coterie.lab.training.feed import TrainingBatch
from coterie.lab.training.loop import TrainingConfig
from coterie.lab.training.network import NetworkShape, TrainingNetwork, attention_groups
from coterie.lab.training.optim import OptimizerOptions
from coterie.lab.training.vocabulary import (
    END_OF_TEXT,
    MASK_TOKEN,
    SPECIAL_TOKENS,
    piece_splitter,
)

DEFAULT_STEPS = 20_000
MAX_TEXT_BYTES = 1 << 28  # of one file
SHAPE = NetworkShape(vocab_size=4096, layers=4, experts=256)
# Half of the embedded model's: a batch has 2,048 targets, and their noise bounds the rates.
RATES = OptimizerOptions(matrix=0.01, embedding=0.005, head=0.0015, router=0.001, norm=0.0015)
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"  # a completion
ROWS, BLOCKS = 4, 16  # of a batch; of a row's text
SUFFIX_SHARE = 0.25  # blocks that are masked from some position on, as after a prompt
HELD_OUT_ROWS = 64  # of the final estimate


def make_config(
    *, steps: int = DEFAULT_STEPS, seed: int = 0, workers: int = 2, save_every: int = 50
) -> TrainingConfig:
    """The training run of the text model, which may be continued with more steps."""
    if ROWS % workers:
        raise ConfigError(f"`workers` must divide {ROWS} rows evenly, not {workers}")
    return TrainingConfig(
        steps=steps,
        seed=seed,
        workers=workers,
        precision="fp32",
        save_every=save_every,
        shape=SHAPE,
        optimizer=RATES,
        decay_fraction=0.6,
    )


@dataclass(frozen=True)
class TextCorpus:
    """A corpus as tokens [N] of its own tokenizer, with an end-of-text after each file."""

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    sizes: np.ndarray  # [V], bytes of each token

    @staticmethod
    def open(folder: Path, cache: Path, vocabulary_size: int) -> TextCorpus:
        """Read a corpus; its tokenizer and its tokens are made once, and kept in ``cache``."""
        tokenizer = _cached_tokenizer(folder / "train", cache, vocabulary_size)
        train, held_out = (
            _cached_tokens(folder / half, cache / f"{half}.tokens", tokenizer)
            for half in ("train", "held-out")
        )
        return TextCorpus(tokenizer, train, held_out, piece_bytes(tokenizer))

    @property
    def mask_id(self) -> int:
        return self.tokenizer.get_vocab()[MASK_TOKEN]


def text_run(corpus: TextCorpus, config: TrainingConfig) -> TrainingRun:
    """The run that trains the text model."""
    return TrainingRun(
        "Text training",
        config,
        corpus.tokenizer,
        TextBatches(corpus.train, corpus.mask_id, config.seed, block=config.shape.block),
        chat_template=CHAT_TEMPLATE,
        measure=partial(held_out_bits, corpus=corpus),
    )


@dataclass(frozen=True)
class TextBatches:
    """Makes the batch of a step: clean blocks, and two noised copies with complementary masks.

    Each token is masked in one of the copies. A noised block attends to itself and to the clean
    blocks before it. Rows start anywhere in the text.
    """

    tokens: np.ndarray  # [N]
    mask_id: int
    seed: int
    block: int = 32
    rows: int = ROWS
    blocks: int = BLOCKS

    def __call__(self, step: int) -> TrainingBatch:
        rng = np.random.default_rng([self.seed, step])
        length = self.blocks * self.block
        starts = rng.integers(0, len(self.tokens) - length + 1, (self.rows, 1))
        text = self.tokens[starts + np.arange(length)].reshape(-1, self.blocks, self.block)
        masked = _draw_masks(rng, text.shape)
        return noised_rows(text, [masked, ~masked], self.mask_id)


def _draw_masks(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Masks [B, n, b] with a rate per block, evenly spread over the batch."""
    rows, blocks, block = shape
    rates = (rng.permutation(rows * blocks) + rng.random(rows * blocks)) / (rows * blocks)
    rates = rates.reshape(rows, blocks, 1)
    suffix = np.arange(block) >= (1 - rates) * block
    return np.where(rng.random(rates.shape) < SUFFIX_SHARE, suffix, rng.random(shape) < rates)


def noised_rows(text: np.ndarray, masks: list[np.ndarray], mask_id: int) -> TrainingBatch:
    """Rows of the clean text [B, n, b] without its last block, then a copy for each mask."""
    rows, blocks, block = text.shape
    copies = len(masks)
    clean = torch.from_numpy(text.astype(np.int64))
    ids = torch.cat([clean[:, :-1], *[clean] * copies], 1)  # [B, n - 1 + copies * n, b]
    noised = torch.from_numpy(np.concatenate(masks, 1))
    masked = torch.cat([torch.zeros_like(clean[:, :-1], dtype=torch.bool), noised], 1)
    order = torch.arange(blocks)
    index = torch.cat([order[:-1], order.repeat(copies)])
    visible = block_visibility(
        torch.zeros_like(index), index, torch.arange(len(index)) < blocks - 1
    )
    positions = (index[:, None] * block + torch.arange(block)).flatten()
    return TrainingBatch(
        tokens=ids.where(~masked, mask_id).flatten(1),
        positions=positions.expand(rows, -1).clone(),
        block_mask=visible.expand(rows, -1, -1).clone(),
        targets=ids.where(masked, IGNORE_INDEX).flatten(1),
        weights=torch.ones(rows, len(positions)),
    )


@torch.no_grad()
def held_out_bits(
    network: TrainingNetwork, corpus: TextCorpus, rows: int = HELD_OUT_ROWS
) -> dict[str, float]:
    """Bits of held-out text by the denoising bound (LLaDA, Eq. 5), over evenly spread rows.

    Each block has two noised copies with m masks, m uniform over 1 .. b; a target counts b / m.
    """
    tokens = corpus.held_out
    block = network.shape.block
    rows = min(rows, len(tokens) // (BLOCKS * block))
    starts = np.linspace(0, len(tokens) - BLOCKS * block, rows).astype(np.int64)[:, None]
    text = tokens[starts + np.arange(BLOCKS * block)].reshape(rows, BLOCKS, block)
    nats = sum(
        _row_nats(network, row, np.random.default_rng([0, i]), corpus.mask_id)
        for i, row in enumerate(text[:, None])
    )
    num_bytes = int(corpus.sizes[text].sum())
    return {
        "held_out_bits_per_byte": nats / math.log(2) / num_bytes,
        "held_out_bits_per_token": nats / math.log(2) / text.size,
        "held_out_bytes": num_bytes,
    }


def _row_nats(
    network: TrainingNetwork, text: np.ndarray, rng: np.random.Generator, mask_id: int
) -> float:
    """The estimate of one row [1, n, b]."""
    block = text.shape[-1]
    counts = [rng.integers(1, block + 1, (*text.shape[:-1], 1)) for _ in range(2)]
    masks = [rng.random(text.shape).argsort(-1).argsort(-1) < m for m in counts]
    batch = noised_rows(text, masks, mask_id)
    scale = np.concatenate([np.zeros_like(counts[0][:, :-1]), *(block / m for m in counts)], 1)
    weights = torch.from_numpy(scale).float().repeat_interleave(block, 1).flatten()
    targets = batch.targets.flatten()
    chosen = (targets >= 0).nonzero().squeeze(1)
    groups = attention_groups(batch.block_mask, block)
    logits, _ = network(batch.tokens, batch.positions, groups, chosen)
    losses = F.cross_entropy(logits, targets[chosen], reduction="none")
    return float(torch.dot(losses, weights[chosen])) / len(masks)


def piece_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """The number of bytes of each token; 0 for special tokens."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return np.array([0 if piece in SPECIAL_TOKENS else len(piece) for piece, _ in pieces])


def train_tokenizer(texts: Iterator[str], vocabulary_size: int) -> Tokenizer:
    """A lossless byte-pair tokenizer."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = piece_splitter()
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_texts(folder: Path) -> Iterator[str]:
    """The text files below a folder, in the order of their paths."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise ConfigError(f"{folder}: no text files; a corpus has them in `train` and `held-out`")
    return (read_text(path, MAX_TEXT_BYTES) for path in paths)


def _cached_tokenizer(folder: Path, cache: Path, vocabulary_size: int) -> Tokenizer:
    path = cache / "tokenizer.json"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(read_texts(folder), vocabulary_size)
        atomic_write(path, tokenizer.to_str().encode())
    return Tokenizer.from_file(str(path))


def _cached_tokens(folder: Path, path: Path, tokenizer: Tokenizer) -> np.ndarray:
    if not path.exists():
        end = tokenizer.get_vocab()[END_OF_TEXT]
        parts = [
            np.array([*tokenizer.encode(text).ids, end], np.uint16) for text in read_texts(folder)
        ]
        atomic_write(path, np.concatenate(parts).tobytes())
    return np.fromfile(path, np.uint16)
