"""Packed checkpoints: what they hold, how they are mapped, and what is said of damaged ones."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import packed_checkpoint, tiny_checkpoint
from torch import Tensor
from torch.nn import functional as F

import coterie
from coterie.checkpoints.conversion import ConversionTarget, convert
from coterie.checkpoints.manifest import MANIFEST
from coterie.checkpoints.model_info import inspect
from coterie.checkpoints.verification import verify
from coterie.cli.entry import run
from coterie.errors import CoterieError
from coterie.loading.load import Model, load_model
from coterie.model import weight_loader
from coterie.model.checkpoint import Checkpoint
from coterie.model.moe import MoE
from coterie.offload.resident_store import ResidentExpertStore
from coterie.ops import cpu
from coterie.ops.packed_layout import LAYOUT_VERSION, unpack
from coterie.quantization import FORMATS, QTensor, dequantize, quantize
from coterie.testing import FAMILY_CONFIGS, write_checkpoint
from coterie.values import PackedExperts, Slab

FAMILIES = tuple(sorted(FAMILY_CONFIGS.keys() - {"llada2.2"}))  # it has the tensors of llada2
ODD = {"hidden_size": 33, "moe_intermediate_size": 19}
LAYER = "packed-experts-of-layer-1.safetensors"
PACKED = "model.layers.1.mlp.experts.packed"
KINDS = ("bf16", *FORMATS)  # of experts in a file
needs_kernels = pytest.mark.skipif(
    not cpu.is_available(), reason="the kernels for CPUs are not built"
)


def source(folder: Path, family: str = "llada2", **options: object) -> Path:
    return tiny_checkpoint(folder / "whole", family, **options)


def packed(folder: Path, kind: str = "int8", family: str = "llada2", **options: object) -> Path:
    return packed_checkpoint(folder, family, kind, **options)


def converted(folder: Path, kind: str = "int8", **options: object) -> Path:
    """As ``packed``, but written here: its manifest names this folder, its pages are clean."""
    convert(source(folder, **options), folder / "packed", ConversionTarget.parse(kind))
    return folder / "packed"


def slabs(model: Model) -> list[Slab]:
    stores = [
        layer.feed_forward.store
        for layer in model.transformer.layers
        if isinstance(layer.feed_forward, MoE)
    ]
    assert isinstance(stores[0], ResidentExpertStore)
    return list(stores[0].slabs.values())


def plain(slab: Slab) -> list[Tensor]:
    """Both weights as they were before they were packed."""
    unpacked = unpack(slab)
    found = []
    for weight in (unpacked.gate_up, unpacked.down):
        assert not isinstance(weight, PackedExperts)
        found += [weight.q, weight.scales] if isinstance(weight, QTensor) else [weight]
    return found


def same(one: Model, other: Model) -> bool:
    pairs = zip(slabs(one), slabs(other), strict=True)
    return len(slabs(one)) > 0 and all(
        ours.dtype == theirs.dtype and ours.equal(theirs)
        for pair in pairs
        for ours, theirs in zip(*map(plain, pair), strict=True)
    )


def answer(folder: Path, **options: str) -> tuple[int, ...]:
    engine = coterie.load(folder, max_new_tokens=8, block=4, **options)  # pyright: ignore[reportArgumentType]
    return tuple(engine.generate([5, 17, 33]).tokens)


@pytest.mark.parametrize(
    ("family", "stacked", "kind"),
    [
        *(("llada2", stacked, kind) for stacked in (False, True) for kind in KINDS),
        *((family, False, "int8") for family in FAMILIES),
    ],
)
def test_packed_checkpoint_equals_packing_at_load(
    tmp_path: Path, family: str, stacked: bool, kind: str
) -> None:
    folder = packed(tmp_path, kind, family, stacked=stacked, num_experts=8)
    asked = {} if kind == "bf16" else {"expert_dtype": kind}
    there = load_model(tmp_path / "whole", dtype="bf16", **asked)  # pyright: ignore[reportArgumentType]
    assert same(load_model(folder, dtype="bf16"), there)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_checkpoint_answers_like_packing_at_load(tmp_path: Path, kind: str) -> None:
    folder = packed(tmp_path, kind)
    asked = {} if kind == "bf16" else {"expert_dtype": kind}
    assert answer(folder, dtype="bf16") == answer(tmp_path / "whole", dtype="bf16", **asked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [ODD, {"hidden_size": 100, "moe_intermediate_size": 1}])
def test_odd_sizes_are_packed_and_mapped_too(
    tmp_path: Path, kind: str, sizes: dict[str, int]
) -> None:
    folder = packed(tmp_path, kind, shards=5, num_experts=8, **sizes)
    asked = {} if kind == "bf16" else {"expert_dtype": kind}
    assert same(
        load_model(folder, dtype="bf16"),
        load_model(tmp_path / "whole", dtype="bf16", **asked),  # pyright: ignore[reportArgumentType]
    )


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_conversion_works_without_kernels(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted(tmp_path, kind, num_experts=8, **ODD)
    usual = load_model(folder, dtype="bf16")
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    convert(tmp_path / "whole", tmp_path / "slowly", ConversionTarget.parse(kind))
    assert contents(tmp_path / "slowly") == contents(folder)
    without = load_model(folder, dtype="bf16")
    assert all(isinstance(slab.gate_up, PackedExperts) for slab in slabs(usual))
    assert not any(isinstance(slab.gate_up, PackedExperts) for slab in slabs(without))
    assert same(without, usual)
    asked = {} if kind == "bf16" else {"expert_dtype": kind}
    assert answer(folder, dtype="bf16") == answer(tmp_path / "whole", dtype="bf16", **asked)


def test_unpacked_experts_have_the_type_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed(tmp_path, "bf16")
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    model, whole = (load_model(f, dtype="fp32") for f in (folder, tmp_path / "whole"))
    assert same(model, whole)
    assert answer(folder, dtype="fp32") == answer(tmp_path / "whole", dtype="fp32")


def test_quantized_checkpoint_can_be_packed(tmp_path: Path) -> None:
    folder = packed(tmp_path, "int4", shards=3)
    convert(tmp_path / "whole", tmp_path / "plain", ConversionTarget.parse("int4", layout="plain"))
    convert(tmp_path / "plain", tmp_path / "again", ConversionTarget.parse("int4"))
    ours, theirs = contents(tmp_path / "again"), contents(folder)
    layers = [name for name in theirs if name.startswith("packed-experts")]
    assert len(layers) == 2
    assert all(ours[name] == theirs[name] for name in layers)


def test_experts_begin_where_they_can_be_read_alone(tmp_path: Path) -> None:
    folder = packed(tmp_path, "int8", **ODD)
    for file, entries in Checkpoint.of(folder).files.items():
        for name, entry in entries.items():
            if name.endswith(".packed"):
                assert entry.start % 4096 == 0
                assert entry.shape[1] % 64 == 0
                assert list(load_file(file)) == [name]
                assert load_file(file)[name].shape == entry.shape


def test_every_expert_has_a_checksum(tmp_path: Path) -> None:
    folder = packed(tmp_path, "int8")
    listed = json.loads((folder / MANIFEST).read_text())["tensors"]
    assert set(listed) == Checkpoint.of(folder).tensors
    blobs = load_file(folder / LAYER)[PACKED]
    expected = [f"{zlib.crc32(blob.numpy().tobytes()):08x}" for blob in blobs]
    assert (listed[PACKED]["file"], listed[PACKED]["crc32"]) == (LAYER, expected)
    found = verify(folder)
    assert (found.tensors, found.experts) == (len(listed), 2 * 16)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_every_expert_has_a_quantization_error(tmp_path: Path, kind: str) -> None:
    """By what it gives for Gaussian tokens; drawn once more here, so equal but for the draw."""
    whole = write_checkpoint(tmp_path / "whole", "llada2", dtype=torch.bfloat16)
    convert(whole, tmp_path / kind, ConversionTarget.parse(kind))
    listed = json.loads((tmp_path / kind / MANIFEST).read_text())["tensors"]
    told = listed[PACKED]["error"]
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(3))

    def given(weights: Callable[[str], Tensor]) -> Tensor:
        gate, up, down = (weights(f"{part}_proj") for part in ("gate", "up", "down"))
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    held = load_file(whole / "model.safetensors")
    for expert in (0, 7):

        def true(part: str, expert: int = expert) -> Tensor:
            return held[f"model.layers.1.mlp.experts.{expert}.{part}.weight"].float()

        best = given(true)
        found = given(lambda part, true=true: dequantize(quantize(true(part), FORMATS[kind])))
        error = float((found - best).norm() / best.norm())
        assert told[expert] == pytest.approx(error, rel=0.1)


@needs_kernels
def test_mapped_experts_are_read_only(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    before = contents(folder)
    engine = coterie.load(folder, max_new_tokens=8, block=4)
    engine.generate([5, 17, 33], policy="des-vote:beta=0.3")
    maps = Path("/proc/self/smaps").read_text().split("VmFlags")
    ours = [text for text in maps if str(folder / "packed-experts") in text]
    assert len(ours) == 2
    for text in ours:
        assert " rw-p " in text
        assert re.search(r"Private_Dirty:\s+0 kB", text)
    # Whoever writes all the same has a page of their own.
    panels = slabs(engine.model)[0].gate_up
    assert isinstance(panels, PackedExperts)
    panels.packed.fill_(7)
    assert contents(folder) == before


def test_mapping_works_without_madvise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed(tmp_path, "int8")
    usual = load_model(folder)
    monkeypatch.setattr(weight_loader, "POPULATE_READ", 9999)
    assert same(load_model(folder), usual)


def test_truncation_before_mapping_raises(tmp_path: Path) -> None:
    file = packed(tmp_path, "int8") / LAYER
    entry = Checkpoint.of(file.parent).files[file][PACKED]
    os.truncate(file, entry.start + entry.size - 1)
    with file.open("rb") as opened, pytest.raises(CoterieError, match="it became shorter"):
        weight_loader.map_tensor(opened.fileno(), entry)


@needs_kernels
def test_truncation_while_mapped_raises(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 16))
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 1 << 16, prot=mmap.PROT_READ)
        os.truncate(file, 1 << 13)
        with pytest.raises(CoterieError, match="it became shorter"):
            weight_loader.populate_pages(memory, 1 << 16)


def test_what_was_killed_goes_on_and_comes_out_the_same(tmp_path: Path) -> None:
    folder = converted(tmp_path, shards=4)

    class Left(BaseException): ...

    for after in (5, 11, 30):  # in a shard's other tensors, in the first layer, in the second
        heard = 0

        def told(done: int, whole: int, last: int = after) -> None:
            nonlocal heard
            heard += 1
            if heard == last:
                raise Left

        with pytest.raises(Left):
            convert(tmp_path / "whole", tmp_path / "killed", ConversionTarget.parse("int8"), told)
        with pytest.raises(CoterieError, match="conversion was not finished"):
            load_model(tmp_path / "killed")
    with pytest.raises(CoterieError, match=r"unfinished conversion .*\(int8 .*, packed,"):
        convert(tmp_path / "whole", tmp_path / "killed", ConversionTarget.parse("int4"))
    with pytest.raises(CoterieError, match="unfinished conversion of another model"):
        convert(
            tmp_path / "whole", tmp_path / "killed", ConversionTarget.parse("int8", layout="plain")
        )
    made = convert(tmp_path / "whole", tmp_path / "killed", ConversionTarget.parse("int8"))
    assert 0 < made.files_resumed < made.files
    assert contents(tmp_path / "killed") == contents(folder)


@pytest.mark.parametrize("layout", ["panels", "plain"])
@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (Path.unlink, r"cannot be read \(No such file"),
        (lambda file: os.truncate(file, 4000), "cannot be read to its end"),
    ],
)
def test_missing_source_file_raises(
    tmp_path: Path, layout: str, harm: Callable[[Path], None], problem: str
) -> None:
    last = sorted(source(tmp_path, shards=3).glob("*.safetensors"))[-1]

    def told(done: int, whole: int) -> None:
        if last.exists() and last.stat().st_size > 4000:
            harm(last)

    with pytest.raises(CoterieError, match=f"whole/{last.name}: .*{problem}"):
        convert(
            tmp_path / "whole",
            tmp_path / "out",
            ConversionTarget.parse("int8", layout=layout),
            told,
        )
    assert list((tmp_path / "out").glob("*.part")) == []


def test_progress_counts_every_byte_of_the_source(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    convert(
        source(tmp_path),
        tmp_path / "out",
        ConversionTarget.parse("int8"),
        lambda *told: heard.append(told),
    )
    whole = Checkpoint.of(tmp_path / "whole").bytes
    assert [total for _, total in heard] == [whole] * len(heard)
    assert heard[-1][0] == whole
    heard.clear()
    load_model(tmp_path / "out", on_progress=lambda *told: heard.append(told))
    whole = Checkpoint.of(tmp_path / "out").bytes
    assert heard[-1] == (whole, whole)


@pytest.mark.parametrize(
    ("stated", "problem"),
    [
        (1, "not a name and a version"),
        ({"name": "panels"}, "not a name and a version"),
        ({"name": "tiles", "version": 1}, "does not know .*use a newer version"),
        (
            {"name": "panels", "version": LAYOUT_VERSION + 1},
            "does not know .*'panels' up to version",
        ),
        ({"name": "panels", "version": True}, "does not know"),
        ({"name": "panels", "version": 0}, "packed by an older Coterie.*pack the original again"),
    ],
)
def test_other_layout_version_raises(tmp_path: Path, stated: object, problem: str) -> None:
    folder = packed(tmp_path, "int8")
    restate(folder, coterie_layout=stated)
    with pytest.raises(CoterieError, match=r"config\.json: coterie_layout .*" + problem):
        load_model(folder)


def test_a_layout_and_its_experts_must_agree(tmp_path: Path) -> None:
    folder = packed(tmp_path, "int8")
    restate(folder, coterie_experts={"format": "int8", "group": 128})
    with pytest.raises(CoterieError, match="do not hold experts in int8 in groups of 128"):
        load_model(folder)
    restate(folder, coterie_experts={"format": "int4", "group": 32})
    with pytest.raises(CoterieError, match=r"packed has shape \[16, \d+\], config.json makes it"):
        load_model(folder)


def restate(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def test_packed_experts_cannot_be_converted(tmp_path: Path) -> None:
    folder = packed(tmp_path, "bf16")
    with pytest.raises(
        CoterieError, match="are bf16, packed already; int8 in groups of 64 can only"
    ):
        load_model(folder, expert_dtype="int8")
    for aim in (
        ConversionTarget.parse("int8"),
        ConversionTarget.parse("bf16"),
        ConversionTarget.parse("int4", layout="plain"),
    ):
        with pytest.raises(CoterieError, match=r"are bf16, packed already; .* from the original"):
            convert(folder, tmp_path / "other", aim)
    assert (
        load_model(packed(tmp_path / "int8"), expert_dtype="int8").spec.panels == cpu.is_available()
    )


def test_the_command_complains_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    for options, problem in (
        (["int8", "--layout", "rows"], "is not one of 'packed', 'plain'"),
        (["int8", "--group-size", "128", "--layout", "packed"], "packed experts are int8"),
        (["bf16", "--group-size", "64"], "has no effect with"),
        (["bf16", "--layout", "plain"], "leaves bf16 experts unchanged"),
        (["fp8"], "unknown format 'fp8' for experts; known: int8, int4, bf16"),
    ):
        assert run(["quantize", "embedded", out, "--expert-dtype", *options]) == 2
        complaint = capsys.readouterr().err
        assert problem in complaint
        assert complaint.count("\n") == 1
    assert not Path(out).exists()


def test_other_group_sizes_are_not_packed_by_default() -> None:
    assert ConversionTarget.parse("int8").packed
    assert not ConversionTarget.parse("int8", 128).packed
    assert ConversionTarget.parse("int4", 32, "panels").packed
    assert not ConversionTarget.parse("int4", 32, "plain").packed


def test_inspect_reports_stored_sizes(tmp_path: Path) -> None:
    folder = packed(tmp_path, "int4", **ODD)
    facts = inspect(folder)
    whole = inspect(tmp_path / "whole")
    assert facts.size.parameters == whole.size.parameters
    [*_, (file, entries)] = Checkpoint.of(folder).files.items()
    assert file.name.startswith("packed-experts")
    assert facts.size.expert_bytes == next(iter(entries.values())).shape[1]


MEMORY = """
import re, sys
from pathlib import Path
from coterie.checkpoints.conversion import ConversionTarget, convert
from coterie.loading.load import load_model
from coterie.quantization import FORMATS, quantize
import torch

def memory(name):
    return int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

quantize(torch.ones(1, 64), FORMATS["int8"])
before = memory("VmRSS")
convert(sys.argv[1], Path(sys.argv[2]), ConversionTarget.parse("int8"))
print(memory("VmHWM") - before)
own = memory("RssAnon")
model = load_model(sys.argv[2], dtype="bf16", device="cpu")
print(memory("VmHWM") - before, memory("RssAnon") - own)
"""
LARGE = {
    "vocab_size": 30_000,
    "hidden_size": 512,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_experts": 16,
    "moe_intermediate_size": 512,
}


@needs_kernels
def test_memory_stays_bounded_while_packing_and_mapping(tmp_path: Path) -> None:
    out = tmp_path / "packed"
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, source(tmp_path, **LARGE), out],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    converting, loading, own = (int(word) for word in done.stdout.split())
    size = inspect(out).size
    experts = 2 * size.layer_expert_bytes
    assert size.bytes > 80 << 20
    assert converting < 48 << 20
    assert loading < 1.1 * size.bytes + (24 << 20)
    assert own < size.bytes - experts + (24 << 20)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
