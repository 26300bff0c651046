"""Text: what goes in comes out, templates are data in a sandbox, damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from coterie.families import FAMILIES
from coterie.tokenizer import (
    IdTokenizer,
    SubwordTokenizer,
    TokenizerError,
    load_tokenizer,
    read_template,
)

LLADA2 = FAMILIES["LLaDA2MoeModelLM"].defaults.chat_template
SDAR = FAMILIES["SDARMoeForCausalLM"].defaults.chat_template
SPECIAL = ["<|mask|>", "<|endoftext|>", "<role>", "</role>", "<|role_end|>"]


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer of 256 bytes and five special tokens, ids 256 - 260."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def codec(folder: Path, vocabulary: int = 300) -> SubwordTokenizer:
    found = load_tokenizer(folder, template=LLADA2, vocab_size=vocabulary)
    assert isinstance(found, SubwordTokenizer)
    return found


@given(ids=st.lists(st.integers(0, 99), min_size=1, max_size=20))
def test_numbers_read_their_own_writing(ids: list[int]) -> None:
    numbers = IdTokenizer(100)
    assert numbers.encode(numbers.decode(ids)) == ids
    assert numbers.prompt_note(numbers.decode(ids)) is None


@given(prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_numbers_fall_back_to_bytes_and_say_so(prompt: str) -> None:
    numbers = IdTokenizer(256)
    if numbers.prompt_note(prompt) is not None:
        assert bytes(numbers.encode(prompt)).decode("utf-8") == prompt


def test_numbers_refuse_what_the_vocabulary_lacks() -> None:
    with pytest.raises(TokenizerError, match="token id 512 is outside the vocabulary of 512"):
        IdTokenizer(512).encode("5 512")
    with pytest.raises(TokenizerError, match="token id 195"):
        IdTokenizer(128).encode("Ü")


def test_what_was_no_utf8_is_refused(tmp_path: Path) -> None:
    for text in (IdTokenizer(512), codec(write_tokenizer(tmp_path))):
        with pytest.raises(TokenizerError, match="not valid UTF-8"):
            text.encode("a\udcff")


def test_a_folder_without_a_tokenizer_speaks_numbers(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path, template="", vocab_size=512) == IdTokenizer(512)


def test_raw_text_comes_back_unchanged(tmp_path: Path) -> None:
    text = codec(write_tokenizer(tmp_path))
    for line in ["Tom has 3 boxes.", "def f(x):\n    return x\n", "Grüße, ☕"]:
        assert text.decode(text.encode(line, raw=True)) == line


def test_special_ids_come_from_the_files(tmp_path: Path) -> None:
    text = codec(write_tokenizer(tmp_path))
    assert (text.mask_id, text.eos_ids) == (256, ())
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<|endoftext|>"}})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [260, 257]})
    assert codec(tmp_path).eos_ids == (257, 260)


def test_decoding_drops_special_tokens_and_a_piece_shows_them(tmp_path: Path) -> None:
    text = codec(write_tokenizer(tmp_path))
    ids = [*text.encode("yes", raw=True), 257]
    assert text.decode(ids) == "yes"
    assert text.decode_token(257) == "<|endoftext|>"


def test_llada2_asks_in_its_own_words(tmp_path: Path) -> None:
    text = codec(write_tokenizer(tmp_path))
    assert text.tokenizer.decode(text.encode("Hi"), skip_special_tokens=False) == (
        "<role>SYSTEM</role>detailed thinking off<|role_end|>"
        "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>"
    )


def test_a_system_turn_stands_before_the_thinking_line(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (
        read_template(tmp_path, LLADA2)
        .render(messages)
        .startswith(
            "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|><role>HUMAN</role>Hi"
        )
    )


def test_sdar_speaks_chatml(tmp_path: Path) -> None:
    rendered = read_template(tmp_path, SDAR).render([{"role": "user", "content": "Hi"}])
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_checkpoints_own_template_wins(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "two"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert read_template(tmp_path, LLADA2).render([]) == "two"
    (tmp_path / "chat_template.jinja").write_text("one{{ eos_token }}", encoding="utf-8")
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "x", "eos_token": "!"})
    assert read_template(tmp_path, LLADA2).render([]) == "one!"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for %}",
        "{{ raise_exception('only one turn') }}",
        "{{ messages[7]['role'].upper() }}",
        "{{ 1 / 0 }}",
        "{% include 'other' %}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error_not_an_act(tmp_path: Path, source: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        read_template(tmp_path, LLADA2).render([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        codec(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        codec(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="holds token id 260, but the model knows 200 ids"):
        codec(write_tokenizer(tmp_path), vocabulary=200)


def test_an_unknown_end_token_is_refused(tmp_path: Path) -> None:
    write_json(write_tokenizer(tmp_path) / "tokenizer_config.json", {"eos_token": "<end>"})
    with pytest.raises(TokenizerError, match="'<end>' is not in tokenizer"):
        codec(tmp_path)
