"""The token ids of a model: all files agree, and none is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizer import write_tokenizer

from coterie.errors import CoterieError
from coterie.loading.load import load_model
from coterie.testing import FAMILY_CONFIGS, write_checkpoint
from coterie.tokenizer import MASK_TOKEN
from coterie.values import NO_MASK

MASK, END = 256, 257  # of the tiny tokenizer


def folder_with(path: Path, family: str = "llada2", **ids: object) -> Path:
    ids = {"mask_token_id": None, "eos_token_id": None} | ids
    return write_checkpoint(path, family, vocab_size=300, **ids)


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS.keys() - {"diffusion-gemma"}))
def test_a_model_without_a_mask_is_refused(tmp_path: Path, family: str) -> None:
    write_tokenizer(folder_with(tmp_path, family))
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace(MASK_TOKEN, "<|other|>"), "utf-8")
    with pytest.raises(CoterieError, match=r"config\.json: mask_token_id is missing"):
        load_model(tmp_path, device="cpu")


def test_a_family_that_denoises_random_tokens_needs_no_mask(tmp_path: Path) -> None:
    write_tokenizer(folder_with(tmp_path, "diffusion-gemma"))
    model = load_model(tmp_path, device="cpu")
    assert (model.mask_id, model.plain_ids, model.notes) == (NO_MASK, 300, ())


def test_token_ids_as_text_have_the_last_id_as_mask_and_say_so(tmp_path: Path) -> None:
    model = load_model(folder_with(tmp_path), device="cpu")
    assert model.mask_id == 299
    assert "299" in model.notes[0]
    assert load_model(folder_with(tmp_path / "named", mask_token_id=7), device="cpu").notes == ()


def test_one_file_that_names_the_mask_is_enough(tmp_path: Path) -> None:
    named = folder_with(tmp_path / "config", mask_token_id=7)
    assert load_model(named, device="cpu").mask_id == 7
    write_tokenizer(folder_with(tmp_path / "tokenizer"))
    assert load_model(tmp_path / "tokenizer", device="cpu").mask_id == MASK
    write_tokenizer(folder_with(tmp_path / "both", mask_token_id=MASK))
    assert load_model(tmp_path / "both", device="cpu").mask_id == MASK


def test_two_files_must_name_the_same_mask(tmp_path: Path) -> None:
    write_tokenizer(folder_with(tmp_path, mask_token_id=7))
    with pytest.raises(CoterieError, match="mask_token_id is 7, but tokenizer"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["config", "tokenizer_config", "generation_config"])
def test_the_mask_ends_no_text(tmp_path: Path, name: str) -> None:
    ids = {"eos_token_id": MASK if name == "config" else END}
    write_tokenizer(folder_with(tmp_path, **ids))
    if name != "config":
        content = {"eos_token": "<|mask|>", "eos_token_id": MASK}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(CoterieError, match=f"token {MASK} is both the mask and an end of text"):
        load_model(tmp_path, device="cpu")
