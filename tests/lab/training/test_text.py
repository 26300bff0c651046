"""Training of the text model: its tokenizer, its rows, and the engine's forward of its weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.checkpoints import source
from coterie.errors import CheckpointError, CoterieError
from coterie.lab.training import text, vocabulary
from coterie.lab.training.checkpoint import save_network, train_checkpoint
from coterie.lab.training.network import NetworkShape, TrainingNetwork, attention_groups
from coterie.loading.load import load_model
from coterie.model.forward_context import ForwardContext
from coterie.routing import Vanilla
from coterie.telemetry import Recorder
from coterie.values import Window

SAMPLE = "def add(a, b):\n    return a + b\n\nThe quick brown fox adds 12 numbers.\n"
TOKENIZER = text.train_tokenizer(iter([SAMPLE] * 3), 300)
IDS = TOKENIZER.get_vocab()
MASK = IDS[vocabulary.MASK_TOKEN]
SMALL = NetworkShape(
    vocab_size=TOKENIZER.get_vocab_size(),
    hidden_size=16,
    layers=3,
    heads=2,
    kv_heads=1,
    head_dim=16,
    dense_width=16,
    experts=16,
    k=2,
    groups=2,
    topk_groups=1,
    expert_width=16,
    block=8,
)


def random_network(seed: int) -> TrainingNetwork:
    """Random weights that bf16 represents exactly."""
    network = TrainingNetwork(SMALL, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for weight in network.checkpoint_tensors().values():
        weight.copy_((weight + 0.2 * torch.randn(weight.shape, generator=draw)).bfloat16().float())
    return network


@given(st.text())
def test_the_tokenizer_loses_nothing_and_counts_bytes(written: str) -> None:
    ids = TOKENIZER.encode(written, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == written
    assert text.piece_bytes(TOKENIZER)[ids].sum() == len(written.encode())


def test_the_tokenizer_depends_on_the_text_only() -> None:
    assert text.train_tokenizer(iter([SAMPLE] * 3), 300).to_str() == TOKENIZER.to_str()


@given(step=st.integers(0, 1000), rows=st.integers(1, 4), blocks=st.integers(2, 5))
def test_each_token_is_masked_in_one_of_two_copies(step: int, rows: int, blocks: int) -> None:
    make = text.TextBatches(np.arange(5, 250), 1, seed=3, block=8, rows=rows, blocks=blocks)
    batch, again = make(step), make(step)
    assert torch.equal(batch.tokens, again.tokens)
    clean, first, second = batch.targets.split([8 * (blocks - 1), 8 * blocks, 8 * blocks], 1)
    assert (clean == -100).all()
    assert ((first >= 0) ^ (second >= 0)).all()
    row = torch.maximum(first, second)
    assert (row.diff() == 1).all()
    assert torch.equal(batch.tokens[:, : 8 * (blocks - 1)], row[:, : 8 * (blocks - 1)])
    assert torch.equal(batch.tokens == 1, batch.targets >= 0)


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_a_training_row_equals_the_engine_block_by_block(tmp_path: Path, seed: int) -> None:
    network = random_network(seed)
    names = {"pad_token_id": vocabulary.END_OF_TEXT, "mask_token_id": vocabulary.MASK_TOKEN}
    save_network(network, tmp_path, **{key: IDS[name] for key, name in names.items()})
    vocabulary.save_tokenizer(TOKENIZER, tmp_path, text.CHAT_TEMPLATE)
    model = load_model(tmp_path, dtype=torch.float32)
    batch = text.TextBatches(np.arange(5, 250), MASK, seed, block=8, rows=2, blocks=4)(seed)
    logits, _ = network(batch.tokens, batch.positions, attention_groups(batch.block_mask, 8))
    logits = logits.view(2, 11, 8, -1)
    blocks = batch.tokens.view(2, 11, 8)
    for copy in (3, 7):
        for i in range(4):
            ids = torch.cat([blocks[:, :i], blocks[:, copy + i, None]], 1).flatten(1)
            found = _engine_logits(model.transformer, ids)[:, -8:]
            torch.testing.assert_close(found, logits[:, copy + i], atol=2e-4, rtol=1e-3)


def _engine_logits(transformer: torch.nn.Module, ids: Tensor) -> Tensor:
    rows, length = ids.shape
    window = Window(torch.zeros(rows, dtype=torch.int64), length, torch.full((rows,), length), 8)
    context = ForwardContext(window, cache=None, policy=Vanilla(), recorder=Recorder())
    return transformer(ids, context).unflatten(0, (rows, length))


@given(st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_held_out_bits_of_a_uniform_model_are_those_of_its_vocabulary(seed: int) -> None:
    network = TrainingNetwork(SMALL, seed=seed)  # whose head is 0
    tokens = np.random.default_rng(seed).integers(6, SMALL.vocab_size, 700)
    corpus = text.TextCorpus(TOKENIZER, tokens, tokens, text.piece_bytes(TOKENIZER))
    measured = text.held_out_bits(network, corpus, rows=4)
    assert measured["held_out_bits_per_token"] == pytest.approx(math.log2(SMALL.vocab_size))


def test_a_run_makes_a_model_and_states_its_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "SHAPE", replace(SMALL, block=32))
    corpus = tmp_path / "corpus"
    for half in ("train", "held-out"):
        (corpus / half).mkdir(parents=True)
        (corpus / half / "a.txt").write_text(SAMPLE * 40)
    run, again = (
        text.text_run(
            text.TextCorpus.open(corpus, tmp_path, SMALL.vocab_size),
            text.make_config(steps=2, workers=1),
        )
        for _ in range(2)
    )
    assert torch.equal(run.make_batch(1).tokens, again.make_batch(1).tokens)
    folder = train_checkpoint(tmp_path, run)
    assert load_model(folder).tokenizer.encode("add") == TOKENIZER.encode("add").ids
    record = json.loads((tmp_path / "text-training.json").read_text())
    assert 0 < record["facts"]["held_out_bits_per_byte"] < 16
    with pytest.raises(CoterieError, match="rows evenly"):
        text.make_config(workers=3)
    with pytest.raises(CoterieError, match="no text files"):
        text.TextCorpus.open(tmp_path / "nothing", tmp_path / "other", 300)


def test_a_model_without_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source.resources, "files", lambda name: tmp_path)
    with pytest.raises(CheckpointError, match="weights of the text model are not installed"):
        load_model("text")
