"""Tokenizers round-trip, templates run in a sandbox, and damaged files are named."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_data import field_case, field_cases
from tiny_tokenizer import write_tokenizer

from coterie.checkpoints.source import find_folder
from coterie.errors import CoterieError, TokenizerError
from coterie.families import FAMILIES
from coterie.tokenizer import IdTokenizer, SubwordTokenizer, load_tokenizer, read_template

LLADA2 = FAMILIES["LLaDA2MoeModelLM"].defaults.chat_template
SDAR = FAMILIES["SDARMoeForCausalLM"].defaults.chat_template


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change_tokenizer(folder: Path, **parts: object) -> Path:
    """The folder, with parts of its tokenizer.json replaced."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer.json", content | parts)
    return folder


def character_map(size: int, table: bytes = b"") -> dict[str, str]:
    raw = size.to_bytes(4, "little") + table
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


def subword_tokenizer(folder: Path, vocab_size: int = 300) -> SubwordTokenizer:
    tokenizer = load_tokenizer(folder, template=LLADA2, vocab_size=vocab_size)
    assert isinstance(tokenizer, SubwordTokenizer)
    return tokenizer


@given(ids=st.lists(st.integers(0, 99), min_size=1, max_size=20))
def test_decoded_ids_encode_to_the_same_ids(ids: list[int]) -> None:
    tokenizer = IdTokenizer(100)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.prompt_note(tokenizer.decode(ids)) is None


@given(prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_text_without_a_tokenizer_is_its_bytes_with_a_note(prompt: str) -> None:
    tokenizer = IdTokenizer(256)
    if tokenizer.prompt_note(prompt) is not None:
        assert bytes(tokenizer.encode(prompt)).decode("utf-8") == prompt


def test_ids_outside_the_vocabulary_are_an_error() -> None:
    with pytest.raises(TokenizerError, match="token id 512 is outside the vocabulary of 512"):
        IdTokenizer(512).encode("5 512")
    with pytest.raises(TokenizerError, match="token id 195"):
        IdTokenizer(128).encode("Ü")


def test_a_prompt_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    for tokenizer in (IdTokenizer(512), subword_tokenizer(write_tokenizer(tmp_path))):
        with pytest.raises(TokenizerError, match="not valid UTF-8"):
            tokenizer.encode("a\udcff")


def test_a_folder_without_a_tokenizer_uses_ids(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path, template="", vocab_size=512) == IdTokenizer(512)


def test_raw_text_comes_back_unchanged(tmp_path: Path) -> None:
    tokenizer = subword_tokenizer(write_tokenizer(tmp_path))
    for line in ["Tom has 3 boxes.", "def f(x):\n    return x\n", "Grüße, ☕"]:
        assert tokenizer.decode(tokenizer.encode(line, raw=True)) == line


def test_special_ids_come_from_the_files(tmp_path: Path) -> None:
    tokenizer = subword_tokenizer(write_tokenizer(tmp_path))
    assert (tokenizer.mask_id, tokenizer.eos_ids) == (256, ())
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<|endoftext|>"}})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [260, 257]})
    assert subword_tokenizer(tmp_path).eos_ids == (257, 260)


def test_decode_drops_special_tokens_and_decode_token_shows_them(tmp_path: Path) -> None:
    tokenizer = subword_tokenizer(write_tokenizer(tmp_path))
    ids = [*tokenizer.encode("yes", raw=True), 257]
    assert tokenizer.decode(ids) == "yes"
    assert tokenizer.decode_token(257) == "<|endoftext|>"


def test_the_llada2_template(tmp_path: Path) -> None:
    tokenizer = subword_tokenizer(write_tokenizer(tmp_path))
    assert tokenizer.tokenizer.decode(tokenizer.encode("Hi"), skip_special_tokens=False) == (
        "<role>SYSTEM</role>detailed thinking off<|role_end|>"
        "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>"
    )


def test_a_system_turn_precedes_the_thinking_line(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (
        read_template(tmp_path, LLADA2)
        .render(messages)
        .startswith(
            "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|><role>HUMAN</role>Hi"
        )
    )


def test_the_sdar_template_is_chatml(tmp_path: Path) -> None:
    rendered = read_template(tmp_path, SDAR).render([{"role": "user", "content": "Hi"}])
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_of_the_checkpoint_has_priority(tmp_path: Path) -> None:
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
def test_a_hostile_or_broken_template_is_an_error(tmp_path: Path, source: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        read_template(tmp_path, LLADA2).render([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_file_is_an_error_that_names_it(
    tmp_path: Path, name: str, content: bytes
) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CoterieError, match=name.replace(".", r"\.")):
        subword_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
def test_a_broken_link_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(CoterieError, match=name.replace(".", r"\.")):
        subword_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"token id 260.* 200 ids"):
        subword_tokenizer(write_tokenizer(tmp_path), vocab_size=200)


@pytest.mark.parametrize("token", ["<end>", "\ud800", "a\0", ""])
def test_an_unknown_eos_token_is_an_error(tmp_path: Path, token: str) -> None:
    write_json(write_tokenizer(tmp_path) / "tokenizer_config.json", {"eos_token": token})
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: .*token"):
        subword_tokenizer(tmp_path)


TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst"}
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
SETTINGS = [
    {"truncation": TRUNCATION | {"stride": 0}},
    {"truncation": TRUNCATION | {"stride": 9}},
    {"padding": PADDING | {"strategy": "BatchLongest", "pad_token": "a"}},
    {"padding": PADDING | {"strategy": {"Fixed": 64}, "pad_token": "a"}},
    {"padding": PADDING | {"strategy": {"Fixed": 1 << 40}, "pad_token": "a"}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_lengths_fixed_for_training_do_not_apply(tmp_path: Path, settings: dict) -> None:
    plain = subword_tokenizer(write_tokenizer(tmp_path))
    changed = subword_tokenizer(change_tokenizer(tmp_path, **settings))
    for prompt in ("", "Hi", "Tom has 3 boxes."):
        assert changed.encode(prompt) == plain.encode(prompt)
        assert changed.encode(prompt, raw=True) == plain.encode(prompt, raw=True)


def replacement(pattern: dict, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "normalizer",
    [
        character_map(1 << 31),
        character_map(0),
        character_map(7, b"1234567"),
        character_map(4, b"1234\xff\xff"),
        {"type": "Precompiled", "precompiled_charsmap": "!"},
        {"type": "Precompiled"},
        {"type": "Sequence", "normalizers": [character_map(1 << 31)]},
        {"type": "Sequence", "normalizers": [replacement({"Regex": "."}, "x" * 60)] * 4},
        replacement({"Regex": "("}, ""),
        {"type": "Unheard-of"},
        7,
    ],
)
def test_a_normalizer_that_would_end_the_process_is_refused(
    tmp_path: Path, normalizer: object
) -> None:
    change_tokenizer(write_tokenizer(tmp_path), normalizer=normalizer)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        subword_tokenizer(tmp_path)


UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}


@pytest.mark.parametrize(
    "parts",
    [
        {"model": UNIGRAM, "added_tokens": []},  # an exception: an unknown letter, no unk_id
        {"normalizer": character_map(8, b"\xff" * 8)},  # a panic: an index outside of the table
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"decoder": {"type": "Strip", "content": '"', "start": 1 << 60, "stop": 1 << 60}},
        {"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                            "single": [{"Sequence": {"id": "B", "type_id": 0}}] * 2}},
    ],
)  # fmt: skip
def test_every_failure_of_the_library_is_ours(tmp_path: Path, parts: dict) -> None:
    tokenizer = subword_tokenizer(change_tokenizer(write_tokenizer(tmp_path), **parts))
    messages = [
        error_of(lambda: tokenizer.encode("Hello", raw=True)),
        error_of(lambda: tokenizer.decode([1, 2, 300])),
        error_of(lambda: tokenizer.decode_token(1)),
    ]
    assert any(messages)
    start = f"{tmp_path / 'tokenizer.json'}: the tokenizer fails"
    assert all(message.startswith(start) for message in messages if message)


def error_of(use: Callable[[], object]) -> str:
    """The message of a TokenizerError; empty without one."""
    try:
        use()
    except TokenizerError as error:
        return str(error)
    return ""


@given(token=st.integers(-(2**70), 2**70))
def test_any_id_is_decoded_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, token: int
) -> None:
    tokenizer = subword_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    for use in (lambda: tokenizer.decode([token]), lambda: tokenizer.decode_token(token)):
        assert error_of(use) == "" or not 0 <= token < 2**32


def test_an_interrupt_is_not_an_error_of_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = subword_tokenizer(write_tokenizer(tmp_path))

    def interrupted(_messages: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("coterie.tokenizer.tokenizer.Tokenizer.from_str", interrupted)
    with pytest.raises(KeyboardInterrupt):
        subword_tokenizer(tmp_path)
    assert tokenizer.encode("a", raw=True)


def test_a_prompt_without_end_is_an_error(tmp_path: Path) -> None:
    tokenizer = subword_tokenizer(write_tokenizer(tmp_path))
    with pytest.raises(TokenizerError, match="characters, too many"):
        tokenizer.encode("x" * 5_000_000)


@pytest.mark.parametrize("value", [True, -1, 300, 10**40, 3.0, "3", {"id": 3}, [[3]], [3, None]])
def test_end_ids_of_a_generation_config_are_ids(tmp_path: Path, value: object) -> None:
    write_json(write_tokenizer(tmp_path) / "generation_config.json", {"eos_token_id": value})
    with pytest.raises(CoterieError, match=r"generation_config\.json: eos_token_id is"):
        subword_tokenizer(tmp_path)


def test_a_generation_config_may_name_no_end(tmp_path: Path) -> None:
    write_json(write_tokenizer(tmp_path) / "generation_config.json", {"eos_token_id": None})
    assert subword_tokenizer(tmp_path).eos_ids == ()


OTHER_TOKENIZERS = ["vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "a.tiktoken"]


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_a_tokenizer_of_another_kind_is_not_answered_with_ids(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(TokenizerError, match=rf"{name} but no tokenizer\.json"):
        load_tokenizer(tmp_path, template="", vocab_size=512)
    assert subword_tokenizer(write_tokenizer(tmp_path))


FILES = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7031\n"


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    (write_tokenizer(tmp_path) / name).write_text(LFS_POINTER)
    with pytest.raises(CoterieError, match=f"{name}: is a Git LFS pointer"):
        subword_tokenizer(tmp_path)


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja"])
def test_a_byte_order_mark_changes_nothing(tmp_path: Path, name: str) -> None:
    write_json(write_tokenizer(tmp_path) / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [260]})
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    plain = subword_tokenizer(tmp_path)
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = subword_tokenizer(tmp_path)
    assert (marked.template, marked.eos_ids) == (plain.template, plain.eos_ids)
    assert marked.encode("Hi") == plain.encode("Hi")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': 'é', 'a': 1} | tojson }}", '{"b": "é", "a": 1}'),
        ("{{ 'é' | tojson(ensure_ascii=True) }}", r'"\u00e9"'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, indent=1) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "aHib"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% for m in messages %}{% break %}{% endfor %}ok", "ok"),
    ],
)
def test_what_templates_of_transformers_may_use(tmp_path: Path, source: str, text: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    messages = [{"role": "user", "content": "Hi"}]
    assert read_template(tmp_path, LLADA2).render(messages) == text


@pytest.mark.parametrize(("folder", "expected"), field_cases("templates"))
def test_templates_of_the_field_end_as_expected(tmp_path: Path, folder: str, expected: str) -> None:
    for file in find_folder(None).iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, tmp_path)
    for file in field_case("templates", folder).iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    drops = tmp_path / "DROP"
    for name in drops.read_text().split() if drops.exists() else ():
        (tmp_path / name).unlink(missing_ok=True)

    def encode() -> list[int]:
        return load_tokenizer(tmp_path, template=LLADA2, vocab_size=2048).encode("One pen costs 4")

    if expected.startswith("ok"):
        assert encode()
        return
    with pytest.raises(CoterieError) as raised:
        encode()
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("source", ["", " \n"])
def test_an_empty_template_is_an_error(tmp_path: Path, source: str) -> None:
    write_json(write_tokenizer(tmp_path) / "tokenizer_config.json", {"chat_template": source})
    with pytest.raises(TokenizerError, match="template is empty"):
        subword_tokenizer(tmp_path)


@given(st.lists(st.sampled_from(["a", "b", "<role>", "</role>"]), max_size=12))
def test_hidden_spans_are_no_part_of_decoded_text(tmp_path_factory, pieces: list[str]) -> None:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    marks = ("<role>", "</role>")
    tokenizer = load_tokenizer(folder, template=LLADA2, vocab_size=300, hidden_span=marks)
    text, is_hidden = "", False
    for piece in pieces:
        is_hidden = piece == "<role>" or (is_hidden and piece != "</role>")
        text += piece if piece in "ab" and not is_hidden else ""
    assert tokenizer.decode(tokenizer.encode("".join(pieces), raw=True)) == text


def test_marks_outside_the_vocabulary_hide_nothing(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    marks = ("<|absent|>", "</role>")
    tokenizer = load_tokenizer(folder, template=LLADA2, vocab_size=300, hidden_span=marks)
    assert tokenizer.decode(tokenizer.encode("a</role>b", raw=True)) == "ab"


TOOLS = [{"type": "function", "function": {"name": "add"}}]
TURNS = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
WITH_TOOLS = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)


def test_tools_reach_a_template_that_takes_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path), template=WITH_TOOLS, vocab_size=300)
    shown = [tokenizer.decode(tokenizer.encode_chat(TURNS, tools)) for tools in (TOOLS, None)]
    assert shown == ["[add]Be short.Hi", "Be short.Hi"]


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{{ messages[1].content }}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path), template=template, vocab_size=300)
    for refusing in (tokenizer, IdTokenizer(300)):
        with pytest.raises(TokenizerError, match="tools"):
            refusing.encode_chat(TURNS, TOOLS)


def test_a_template_that_leaves_out_a_system_turn_is_an_error(tmp_path: Path) -> None:
    template = "{{ messages[-1].content }}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path), template=template, vocab_size=300)
    assert tokenizer.encode_chat(TURNS[1:])
    with pytest.raises(TokenizerError, match="system"):
        tokenizer.encode_chat(TURNS)


def test_ids_of_turns_follow_each_other_without_a_tokenizer() -> None:
    turns = [{"role": "user", "content": "5 6"}, {"role": "assistant", "content": "7"}]
    assert IdTokenizer(300).encode_chat(turns) == [5, 6, 7]
