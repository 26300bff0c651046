"""A checkpoint loads whole or not at all, and the error names the file and the tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie import ops
from coterie.checkpoints.source import MODEL_FILES, find_folder
from coterie.engine.engine import Engine
from coterie.errors import CoterieError, NonFiniteLogitsError
from coterie.families.names import weight_map
from coterie.loading.load import Model, load_model
from coterie.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from coterie.model.moe import MoE
from coterie.model.safetensors_file import read_header
from coterie.model.transformer import Transformer
from coterie.model.weight_loader import WeightLoader
from coterie.model.weights import allocate
from coterie.ops.packed_layout import unpack
from coterie.testing import FAMILY_CONFIGS, random_tensors, read_spec, tiny_config, write_checkpoint
from coterie.values import ExpertRequest, Matrix, PackedMatrix

GATE = "model.layers.1.mlp.gate.weight"
DTYPES = ["float32", "bfloat16", "float16"]
UP = "model.layers.2.mlp.experts.7.up_proj.weight"


def refusal(folder: Path, *, device: str = "cpu", dtype: str = "auto") -> str:
    """The one line with which loading refuses."""
    with pytest.raises(CoterieError) as raised:
        load_model(folder, device=device, dtype=dtype)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The same folder with one tensor file changed."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)
    return folder


def one(folder: Path, **keys: object) -> Path:
    return write_checkpoint(folder, "llada2", 1, **keys)  # type: ignore[arg-type]


def held(weight: Matrix, dtype: torch.dtype | None) -> Tensor:
    """What a matrix consists of, with ``dtype`` as it is multiplied by in a model of that."""
    if isinstance(weight, Tensor) and dtype is not None and weight.dim() == 2:
        weight = ops.prepare_matrix(weight.to(dtype))
    return weight.packed if isinstance(weight, PackedMatrix) else weight


def weights(model: Model | Transformer, dtype: torch.dtype | None = None) -> list[Tensor]:
    """All tensors of a model in a fixed order; with ``dtype``, as they run in that."""
    transformer = model.transformer if isinstance(model, Model) else model
    found = [transformer.embedding, held(transformer.head, dtype), transformer.norm]
    for layer in transformer.layers:
        attention, forward = layer.attention, layer.feed_forward
        found += [tensor for tensor in vars(layer).values() if isinstance(tensor, Tensor)]
        found += [held(attention.qkv, dtype), held(attention.out, dtype)]
        found += [attention.query_norm, attention.key_norm]
        wide = torch.float32 if dtype and isinstance(forward, MoE) else dtype
        kept = [t for t in vars(forward).values() if isinstance(t, Tensor | PackedMatrix)]
        found += [held(weight, wide) for weight in kept]
    for slab in transformer.layers[-1].feed_forward.store.slabs.values():  # type: ignore[union-attr]
        plain = unpack(slab)
        found += [t if dtype is None else t.to(dtype) for t in (plain.gate_up, plain.down)]
    return found


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize(("shards", "stacked"), [(3, True), (50, False)])
def test_every_layout_loads_to_the_same_weights(
    tmp_path: Path, family: str, shards: int, stacked: bool
) -> None:
    plain = load_model(write_checkpoint(tmp_path / "a", family, 5), device="cpu")
    other = write_checkpoint(tmp_path / "b", family, 5, shards=shards, stacked=stacked)
    pairs = zip(weights(plain), weights(load_model(other, device="cpu")), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_every_tensor_lands_where_its_name_says(tmp_path: Path) -> None:
    transformer = load_model(one(tmp_path), device="cpu").transformer
    held = random_tensors(tiny_config("llada2"), 1)
    moe = transformer.layers[2].feed_forward
    slab = unpack(next(moe.store.serve(2, ExpertRequest(torch.ones(16)))))  # type: ignore[union-attr]
    expert = "model.layers.2.mlp.experts.7."
    assert torch.equal(slab.gate_up[7, :16], held[f"{expert}gate_proj.weight"])
    assert torch.equal(slab.gate_up[7, 16:], held[f"{expert}up_proj.weight"])
    assert torch.equal(slab.down[7], held[f"{expert}down_proj.weight"])
    assert torch.equal(moe.bias, held["model.layers.2.mlp.gate.expert_bias"])  # type: ignore[union-attr]
    qkv = held["model.layers.0.attention.query_key_value.weight"]
    assert torch.equal(transformer.layers[0].attention.qkv, qkv)


@given(seed=st.integers(0, 99), stored=st.sampled_from([torch.float32, torch.bfloat16]))
def test_weights_are_converted_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, stored: torch.dtype
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, "sdar-moe", seed, dtype=stored, num_hidden_layers=1)
    wide = load_model(folder, device="cpu", dtype="fp32")
    narrow = load_model(folder, device="cpu", dtype="bf16")
    assert {weight.dtype for weight in weights(wide)} == {torch.float32}
    for left, right in zip(weights(wide, torch.bfloat16), weights(narrow), strict=True):
        assert torch.equal(left.to(right.dtype), right)
    gate = narrow.transformer.layers[0].feed_forward.gate  # type: ignore[union-attr]
    assert gate.dtype == torch.float32
    assert narrow.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("stacked", [False, True])
def test_the_size_of_a_read_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stacked: bool
) -> None:
    folder = one(tmp_path, dtype=torch.bfloat16, stacked=stacked)
    whole = load_model(folder, device="cpu", dtype="fp32")
    monkeypatch.setattr("coterie.model.safetensors_file.CHUNK_BYTES", 62)
    small_reads = load_model(folder, device="cpu", dtype="fp32")
    pairs = zip(weights(whole), weights(small_reads), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    file = one(tmp_path) / SINGLE_FILE
    checkpoint = Checkpoint.of(tmp_path)
    family, spec = read_spec(tiny_config("llada2"))
    places = weight_map(family.tensor_names, spec, stacked=False)
    file.write_bytes(file.read_bytes()[:-1])
    weights = allocate(spec, torch.float32, torch.device("cpu"))
    with pytest.raises(CoterieError, match="cannot be read to its end"):
        checkpoint.load(places, WeightLoader(spec, spec, weights))


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    transformer = load_model(one(tmp_path, tie_word_embeddings=True), device="cpu").transformer
    assert transformer.head is transformer.embedding


def test_progress_reports_every_byte_once(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    load_model(
        one(tmp_path), device="cpu", on_progress=lambda done, whole: reports.append((done, whole))
    )
    sizes = [t.nbytes for t in random_tensors(tiny_config("llada2"), 1).values()]
    assert reports[-1] == (sum(sizes), sum(sizes))
    assert len(reports) == len(sizes)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    message = refusal(rewritten(one(tmp_path), lambda t: t.pop(UP)))
    assert message == f"{tmp_path / SINGLE_FILE}: {UP} is missing"


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    message = refusal(rewritten(one(tmp_path), lambda t: t.update({"extra": torch.zeros(1)})))
    assert message.startswith(f"{tmp_path / SINGLE_FILE}: extra is not part of the model")


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    message = refusal(rewritten(one(tmp_path), lambda t: t.update({GATE: torch.zeros(16, 31)})))
    assert message == (
        f"{tmp_path / SINGLE_FILE}: {GATE} has shape [16, 31], config.json makes it [16, 32]"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool])
def test_a_dtype_that_is_no_plain_float_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    message = refusal(rewritten(one(tmp_path), lambda t: t.update({UP: t[UP].to(dtype)})))
    assert message.startswith(f"{tmp_path / SINGLE_FILE}: {UP} is ")
    assert "supported: F32" in message


def renamed(tensors: dict[str, Tensor], name_of: Callable[[str], str]) -> None:
    copies = {name_of(name): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(copies)


@pytest.mark.parametrize("prefix", ["language_model.", "module.", "base_model.model."])
def test_a_prefix_of_all_tensor_names_is_named(tmp_path: Path, prefix: str) -> None:
    rewritten(one(tmp_path), lambda tensors: renamed(tensors, lambda name: prefix + name))
    assert f"prefix '{prefix}'" in refusal(tmp_path)


def test_a_missing_prefix_is_named(tmp_path: Path) -> None:
    rewritten(one(tmp_path), lambda ts: renamed(ts, lambda name: name.removeprefix("model.")))
    assert "lack the prefix 'model.'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("part", "dtype", "title"),
    [
        ("weight", torch.float8_e4m3fn, "FP8"),
        ("weight_scale_inv", torch.float32, "FP8"),
        ("qzeros", torch.int32, "AWQ"),
        ("g_idx", torch.int32, "GPTQ"),
        ("weight", torch.uint32, "MLX"),
        ("biases", torch.bfloat16, "MLX"),
        ("weight_packed", torch.int32, "compressed-tensors"),
    ],
)
def test_weights_of_a_foreign_quantisation_are_named_with_a_remedy(
    tmp_path: Path, part: str, dtype: torch.dtype, title: str
) -> None:
    name = UP.replace("weight", part)
    rewritten(one(tmp_path), lambda tensors: tensors.update({name: torch.ones(2, 2).to(dtype)}))
    message = refusal(tmp_path)
    assert title in message
    assert "coterie quantize" in message


@pytest.mark.parametrize("name", ["config.json", SINGLE_FILE])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7031\n"
    (one(tmp_path) / name).write_text(pointer)
    assert f"{name}: is a Git LFS pointer" in refusal(tmp_path)


def test_gguf_is_named(tmp_path: Path) -> None:
    (one(tmp_path) / SINGLE_FILE).rename(tmp_path / "model.gguf")
    assert "model.gguf, but GGUF is not read" in refusal(tmp_path)


def test_two_layouts_in_one_checkpoint_are_refused(tmp_path: Path) -> None:
    stack = "model.layers.2.mlp.experts.gate_proj"
    message = refusal(
        rewritten(one(tmp_path), lambda t: t.update({stack: torch.zeros(16, 16, 32)}))
    )
    assert "missing" in message


@pytest.mark.parametrize("cut", [1, 1000, 100_000])
def test_a_truncated_file_names_itself_and_the_tensor(tmp_path: Path, cut: int) -> None:
    file = one(tmp_path) / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-cut])
    assert refusal(tmp_path).startswith(f"{file}: truncated: ")


@given(keep=st.integers(0, 60_000))
def test_no_cut_of_a_file_is_ever_read_as_whole(
    tmp_path_factory: pytest.TempPathFactory, keep: int
) -> None:
    whole = one(tmp_path_factory.mktemp("whole")) / SINGLE_FILE
    file = tmp_path_factory.mktemp("cut") / SINGLE_FILE
    file.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(CoterieError, match="truncated"):
        read_header(file)


def header(fields: object) -> bytes:
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(dtype: object = "F32", shape: object = (2,), ends: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": ends}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04garbage that is no header", "not a safetensors file"),
        (header(b"\xff\xfe"), "no valid JSON"),
        (header(b"[" * 100_000), "no valid JSON"),
        (header([1]), "its JSON is not an object"),
        (header({"w": 3}), "w: its header entry"),
        (header({"w": entry() | {"more": 1}}) + bytes(8), "w: its header entry"),
        (header({"w": entry(shape=[-2])}) + bytes(8), "w: shape or data_offsets"),
        (header({"w": entry(shape=[2.0])}) + bytes(8), "w: shape or data_offsets"),
        (header({"w": entry(ends=[0])}) + bytes(8), "w: shape or data_offsets"),
        (header({"w": entry(ends=[0, 12])}) + bytes(12), "w has 12 bytes, but its shape [2]"),
        (header({"w": entry(ends=[8, 0])}) + bytes(8), "w has -8 bytes"),
        (header({"w": entry(ends=[4, 12])}) + bytes(12), "w starts at"),
        (header({"w": entry()}) + bytes(9), "1 bytes follow the last tensor"),
        (header({"v": entry(), "w": entry(ends=[4, 12])}) + bytes(12), "w starts at"),
        (header({"w": entry(dtype="I64")}) + bytes(8), "w is I64"),
        (header({"w": entry(dtype=7)}) + bytes(8), "w is 7"),
        (header({"w": entry(dtype=["F32"])}) + bytes(8), "w is ['F32']"),
        (header({"w": entry(dtype={})}) + bytes(8), "w is {}"),
        (header({"w": entry(shape=[True, 2])}) + bytes(8), "w: shape or data_offsets"),
        (header({"w": entry(shape=[1] * 100_000)}) + bytes(8), "w: shape or data_offsets"),
        (header({"w": entry(shape=[10**90] * 8)}) + bytes(8), "w has 8 bytes, but its shape"),
        (header(b'{"w":{"shape":[' + b"9" * 4000 + b"]}}"), "more than 100 digits"),
        (header({"w" * 10_000: 3}), "...wwww"),
        (header({"\x1b]0;title\x07": 3}), "\\x1b]0;title\\x07: its header entry"),
        (
            header(b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"w":{}}'),
            "w is listed twice",
        ),
    ],
)
def test_a_damaged_header_is_one_clear_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / SINGLE_FILE
    file.write_bytes(content)
    with pytest.raises(CoterieError) as raised:
        read_header(file)
    assert said in str(raised.value)
    assert str(raised.value).startswith(f"{file}: ")
    assert len(str(raised.value)) < len(str(file)) + 300


NON_FINITE = st.sampled_from([torch.nan, torch.inf, -torch.inf])
ALL_NAMES = sorted(random_tensors(tiny_config("llada-moe"), 1))


@given(NON_FINITE, st.sampled_from(ALL_NAMES), st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_no_weight_may_be_nan_or_infinite(
    tmp_path_factory: pytest.TempPathFactory, value: float, name: str, index: int, dtype: str
) -> None:
    """In queries and keys it would change the answer and leave the logits finite."""
    tensors = random_tensors(tiny_config("llada-moe"), 1)
    tensors[name].view(-1)[index % tensors[name].numel()] = value
    folder = write_checkpoint(tmp_path_factory.mktemp("a"), "llada-moe", 1)
    save_file(tensors, folder / SINGLE_FILE)
    message = refusal(folder, dtype=dtype)
    assert message.startswith(f"{folder / SINGLE_FILE}: {name} holds NaN or infinity")


def test_a_weight_that_the_dtype_cannot_hold_is_an_error(tmp_path: Path) -> None:
    change = {UP: torch.full((16, 32), 1e6)}
    folder = rewritten(one(tmp_path), lambda t: t.update(change))
    assert f"{UP} holds NaN or infinity in float16" in refusal(folder, dtype="float16")
    load_model(folder, device="cpu", dtype="bfloat16")


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e25), ("bfloat16", 1e38)])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_an_overflow_is_an_error_rather_than_zeros(
    tmp_path: Path, family: str, size: float, dtype: str
) -> None:
    change = {name: t.sign() * size for name, t in random_tensors(tiny_config(family), 1).items()}
    folder = rewritten(write_checkpoint(tmp_path, family, 1), lambda t: t.update(change))
    engine = Engine(load_model(folder, device="cpu", dtype=dtype))
    with pytest.raises(NonFiniteLogitsError):
        engine.generate([1, 2, 3], max_new_tokens=4)


@pytest.mark.parametrize("weight", ["q_proj", "k_proj"])
def test_queries_and_keys_that_overflow_are_an_error(tmp_path: Path, weight: str) -> None:
    folder = write_checkpoint(tmp_path, "llada-moe", 1)
    name = f"model.layers.1.self_attn.{weight}.weight"
    rewritten(folder, lambda t: t.update({name: t[name] * 1e30}))
    with pytest.raises(NonFiniteLogitsError):
        Engine(load_model(folder, device="cpu", dtype="float32")).generate([1, 2, 3])


@given(content=st.binary(max_size=200))
def test_random_bytes_are_never_read_as_a_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.mktemp("random") / SINGLE_FILE
    file.write_bytes(content)
    with pytest.raises(CoterieError):
        read_header(file)


def edited_index(folder: Path, change: Callable[[dict[str, str]], None]) -> Path:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    (one(tmp_path, shards=3) / "layer-1-ep-0-of-1.safetensors").unlink()
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / INDEX_FILE}: names layer-1-ep-0-of-1.safetensors for ")
    assert message.endswith("no such file")


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    folder = one(tmp_path, shards=3)
    right = json.loads((folder / INDEX_FILE).read_text())["weight_map"][UP]
    wrong = next(f"layer-{i}-ep-0-of-1.safetensors" for i in range(3) if f"-{i}-" not in right)
    message = refusal(edited_index(folder, lambda names: names.update({UP: wrong})))
    assert message == f"{folder / INDEX_FILE}: maps {UP} to {wrong}, but it is in {right}"


def test_an_index_with_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    folder = one(tmp_path, shards=2)
    shard = "layer-0-ep-0-of-1.safetensors"
    message = refusal(edited_index(folder, lambda names: names.update({"ghost": shard})))
    assert message == f"{folder / INDEX_FILE}: maps ghost to {shard}, but it is in no file"


def test_a_shard_that_holds_what_the_index_omits_is_refused(tmp_path: Path) -> None:
    folder = one(tmp_path, shards=2)
    message = refusal(edited_index(folder, lambda names: names.pop(UP)))
    assert message.startswith(f"{folder / INDEX_FILE}: does not list {UP}")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = one(tmp_path, shards=2)
    first, second = sorted(folder.glob("layer-*.safetensors"))
    tensors = load_file(second)
    name, value = next(iter(load_file(first).items()))
    save_file(tensors | {name: value}, second)
    message = refusal(folder)
    assert f"{name} is also in " in message
    assert message.startswith(str(folder))


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "", "..", 3])
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, file: object) -> None:
    folder = one(tmp_path, shards=2)
    message = refusal(edited_index(folder, lambda names: names.update({UP: file})))  # type: ignore[dict-item]
    assert message.startswith(f"{folder / INDEX_FILE}: {UP} maps to ")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"a": 1, "a": 1}', '{"weight_map": {}}', '{"weight_map": 3}']
)
def test_a_damaged_index_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (one(tmp_path, shards=2) / INDEX_FILE).write_text(text)
    assert refusal(tmp_path).startswith(f"{tmp_path / INDEX_FILE}: ")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (one(tmp_path) / SINGLE_FILE).rename(tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: has pytorch_model.bin but no {SINGLE_FILE}; pickled")
    assert not any(part.endswith((".bin", ".py", ".pt", "*")) for part in MODEL_FILES)


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    (one(tmp_path, shards=2) / INDEX_FILE).unlink()
    assert f"but neither {SINGLE_FILE} nor {INDEX_FILE}" in refusal(tmp_path)


def test_an_empty_folder_has_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match="has neither"):
        Checkpoint.of(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/model", "./missing", "~/missing", "missing", "a/b/c"])
def test_a_missing_path_is_not_searched_elsewhere(name: str) -> None:
    with pytest.raises(CoterieError, match="no such folder"):
        find_folder(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match="not a folder"):
        find_folder(one(tmp_path) / "config.json")


def test_a_hub_that_does_not_answer_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_args: object, **_kwargs: object) -> str:
        raise OSError("We could not connect\nto the hub")

    monkeypatch.setattr("coterie.checkpoints.hub.snapshot_download", silent)
    with pytest.raises(CoterieError) as raised:
        find_folder("inclusionAI/LLaDA2.0-mini")
    assert str(raised.value) == (
        "inclusionAI/LLaDA2.0-mini: no such folder, and the download from the hub failed "
        "(OSError: We could not connect)"
    )


def test_only_weights_and_texts_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments: list[object] = []

    def deliver(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        arguments.extend([repository, revision, allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr("coterie.checkpoints.hub.snapshot_download", deliver)
    assert find_folder("inclusionAI/LLaDA2.0-mini@v1") == tmp_path
    assert arguments == ["inclusionAI/LLaDA2.0-mini", "v1", list(MODEL_FILES)]


def test_devices_and_dtypes_are_known_by_name(tmp_path: Path) -> None:
    folder = one(tmp_path)
    assert "known: auto, cpu, cuda" in refusal(folder, device="tpu9")
    assert "known: auto, float32" in refusal(folder, dtype="int4")
    assert "no such GPU" in refusal(folder, device="cuda:99")


def test_a_model_larger_than_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.loading.target.free_memory", lambda _device: 1000)
    assert "the weights need" in refusal(one(tmp_path))
