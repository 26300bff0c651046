"""However a checkpoint is damaged, it loads or is refused with one of our errors."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from tiny_tokenizer import write_tokenizer

from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.loading.load import load_model
from coterie.model.checkpoint import INDEX_FILE, SINGLE_FILE
from coterie.testing import FAMILY_CONFIGS, write_checkpoint

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)
SHARD = "layer-0-ep-0-of-1.safetensors"
SMALL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
FILES = [*SMALL_FILES, "chat_template.jinja", SINGLE_FILE, INDEX_FILE, SHARD]


@pytest.fixture(scope="module", params=FAMILY_CONFIGS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return written(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def one_family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return written("llada2", tmp_path_factory)


def written(family: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model with a tokenizer, in one file and in shards."""
    folders = []
    for shards in (1, 2):
        folder = tmp_path_factory.mktemp("whole")
        sizes = {"vocab_size": 300, "num_hidden_layers": 2, "num_experts": 8}
        if family == "llada-moe":
            sizes["moe_layer_freq"] = [1, 1]
        if family == "diffusion-gemma":
            sizes["layer_types"] = ["sliding_attention", "full_attention"]
        write_checkpoint(folder, family, shards=shards, mask_token_id=256, **sizes)
        write_tokenizer(folder)
        settings = {"eos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
        if shards == 1:
            (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        folders.append(folder)
    return folders


def check_damage(whole: list[Path], folder: Path, name: str, change: Callable) -> None:
    """Loads a copy with one file changed, if it has that, and runs it if it loads."""
    for source in whole:
        if not (source / name).exists():
            continue
        copy = folder / source.name
        shutil.copytree(source, copy)
        (copy / name).write_bytes(change((copy / name).read_bytes()))
        with suppress(CoterieError):
            model = load_model(copy, device="cpu")
            Engine(model).generate("Hi", max_new_tokens=2, block=2)
        shutil.rmtree(copy)


def test_the_whole_ones_load(whole: list[Path]) -> None:
    for folder in whole:
        assert load_model(folder, device="cpu").eos_ids[0] == 257


@law(16)
@given(name=st.sampled_from(FILES), share=st.floats(0, 1), tail=st.binary(max_size=9))
def test_truncated(tmp_path_factory, whole, name: str, share: float, tail: bytes) -> None:
    def change(content: bytes) -> bytes:
        return content[: int(share * len(content))] + tail

    check_damage(whole, tmp_path_factory.mktemp("copy"), name, change)


@law(16)
@given(name=st.sampled_from(FILES), seed=st.integers(0, 999), count=st.integers(1, 20))
def test_bytes_flipped(tmp_path_factory, whole, name: str, seed: int, count: int) -> None:
    def change(content: bytes) -> bytes:
        flipped, chance = bytearray(content), random.Random(seed)
        for _ in range(count):
            # The start of a file is its most interesting part.
            place = int(len(flipped) * chance.random() ** chance.choice((1, 9)))
            flipped[place] ^= 1 << chance.randrange(8)
        return bytes(flipped)

    check_damage(whole, tmp_path_factory.mktemp("copy"), name, change)


@law(16)
@given(
    name=st.sampled_from([*SMALL_FILES, INDEX_FILE, SINGLE_FILE, SHARD]),
    damage=st.tuples(
        st.integers(0, 999), VALUES, st.sampled_from(["remove", "retype", "nest"])
    ),
)  # fmt: skip
def test_keys_changed(tmp_path_factory, whole, name: str, damage: tuple) -> None:
    def change(content: bytes) -> bytes:
        if not name.endswith(".safetensors"):
            return changed_json(content, *damage)
        size = int.from_bytes(content[:8], "little")
        header = changed_json(content[8 : 8 + size], *damage)
        return len(header).to_bytes(8, "little") + header + content[8 + size :]

    check_damage(whole, tmp_path_factory.mktemp("copy"), name, change)


def changed_json(content: bytes, seed: int, value: object, kind: str) -> bytes:
    """One value somewhere in the JSON removed, replaced or nested without end."""
    document, chance = json.loads(content), random.Random(seed)
    parent, key = document, chance.choice(sorted(document))
    while isinstance(parent[key], dict | list) and parent[key] and chance.random() < 0.7:
        parent = parent[key]
        keys = sorted(parent) if isinstance(parent, dict) else range(len(parent))
        key = chance.choice(list(keys))
    if kind == "remove":
        del parent[key]
    else:
        parent[key] = value if kind == "retype" else "@"
    text = json.dumps(document)
    return text.replace('"@"', "[" * 100_000 + "]" * 100_000).encode()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
def test_no_file_at_all(tmp_path: Path, one_family: list[Path], name: str, kind: str) -> None:
    for source in one_family:
        if not (source / name).exists():
            continue
        copy = tmp_path / source.name
        shutil.copytree(source, copy)
        (copy / name).unlink()
        match kind:
            case "fifo":
                os.mkfifo(copy / name)
            case "zero":
                (copy / name).symlink_to("/dev/zero")
            case "folder":
                (copy / name).mkdir()
        with pytest.raises(CoterieError, match=f"{name}: cannot be read"):
            load_model(copy, device="cpu")
