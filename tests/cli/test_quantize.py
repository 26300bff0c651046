"""Smaller checkpoints: what they hold, how they load, and what is left of one that was cut off."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import coterie
from coterie.checkpoints.conversion import CONFIG_FILE, ConversionTarget, convert
from coterie.checkpoints.journal import JOURNAL
from coterie.checkpoints.manifest import MANIFEST
from coterie.checkpoints.model_info import inspect
from coterie.cli.entry import run
from coterie.errors import CoterieError
from coterie.loading.load import Model, load_model
from coterie.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from coterie.model.moe import MoE
from coterie.quantization import FORMATS, QuantFormat, dequantize, parse_format, quantize
from coterie.testing import FAMILY_CONFIGS, write_checkpoint
from coterie.values import ExpertRequest

FAMILIES = tuple(sorted(FAMILY_CONFIGS.keys() - {"llada2.2"}))  # it has the tensors of llada2
INT8, INT4 = (
    ConversionTarget(QuantFormat(8, 64), packed=False),
    ConversionTarget(QuantFormat(4, 32), packed=False),
)
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
FEW = {"num_experts": 8}


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as the safetensors library reads them."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def contents(value: object) -> list[Tensor]:
    """Every tensor inside a value of values, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [t for f in fields(value) for t in contents(getattr(value, f.name))]
    return []


def experts(model: Model) -> list[Tensor]:
    """What the experts of all layers consist of."""
    found = []
    for number, layer in enumerate(model.transformer.layers):
        if isinstance(layer.feed_forward, MoE):
            used = torch.ones(model.spec.router.experts, dtype=torch.bool)
            for slab in layer.feed_forward.store.serve(number, ExpertRequest(used)):
                found += contents(slab)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("family", "stacked", "name"),
    [
        *(("llada2", False, name) for name in FORMATS),
        *((family, True, "int8") for family in FAMILIES),
    ],
)
def test_it_loads_as_what_is_quantised_while_loading(
    tmp_path: Path, family: str, stacked: bool, name: str
) -> None:
    source = write_checkpoint(
        tmp_path / "whole", family, stacked=stacked, dtype=torch.bfloat16, **FEW
    )
    convert(source, tmp_path / "small", ConversionTarget(FORMATS[name], packed=False))
    stored, there = load_model(tmp_path / "small"), load_model(source, expert_dtype=name)
    assert len(experts(stored)) > 0
    for ours, theirs in zip(experts(stored), experts(there), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.equal(theirs)
    assert stored.spec == there.spec


@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_matrices_load_as_what_is_quantised_while_loading(
    tmp_path: Path, family: str, layout: str
) -> None:
    source = write_checkpoint(tmp_path / "whole", family, dtype=torch.bfloat16, **FEW)
    options = ["--expert-dtype", "int8", "--dense-dtype", "int8", "--layout", layout]
    assert run(["quantize", str(source), str(tmp_path / "small"), *options]) == 0
    stored = load_model(tmp_path / "small")
    there = load_model(source, expert_dtype="int8", dense_dtype="int8")
    assert stored.spec.dense_format == there.spec.dense_format == FORMATS["int8"]
    ours, theirs = dense_weights(stored), dense_weights(there)
    assert len(ours) == len(theirs)
    assert all(a.dtype == b.dtype and a.equal(b) for a, b in zip(ours, theirs, strict=True))
    manifest = json.loads((tmp_path / "small" / MANIFEST).read_text())
    assert manifest["coterie_dense"] == {"format": "int8", "group": 64}
    entries = {n: e for n, e in manifest["tensors"].items() if ".experts." not in n}
    told = [entry["error"] for name, entry in entries.items() if name.endswith(".q")]
    assert 0 < min(told) <= max(told) < 0.01
    assert run(["inspect", str(tmp_path / "small"), "--verify"]) == 0
    whole, small = tensors(source), tensors(tmp_path / "small")
    assert all(small[name].equal(whole[name]) for name in whole.keys() & small.keys())
    again = load_model(tmp_path / "small", dense_dtype="int8")
    assert all(a.equal(b) for a, b in zip(ours, dense_weights(again), strict=True))


def dense_weights(model: Model) -> list[Tensor]:
    layers = model.transformer.layers
    parts = [[layer.attention, layer.feed_forward] for layer in layers]
    return contents(model.transformer.head) + [
        tensor for pair in parts for part in pair
        for field in ("qkv", "out", "shared", "gate_up", "down")
        for tensor in contents(getattr(part, field, None))
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_quantised_and_nothing_else_is_touched(tmp_path: Path, family: str) -> None:
    source = write_checkpoint(tmp_path / "whole", family, shards=3, **FEW)
    convert(source, tmp_path / "small", ConversionTarget(QuantFormat(4, 8), packed=False))
    whole, small = tensors(source), tensors(tmp_path / "small")
    for name, tensor in whole.items():
        if ".experts." in name:
            assert name not in small
            found = quantize(tensor, QuantFormat(4, 8))
            assert small.pop(f"{name}.q").equal(found.q)
            assert small.pop(f"{name}.scales").equal(found.scales)
        else:
            assert small.pop(name).equal(tensor)
    assert small == {}


def test_the_manifest_tells_the_truth(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2", shards=2)
    made = convert(source, tmp_path / "small", INT8)
    manifest = json.loads((tmp_path / "small" / MANIFEST).read_text())
    assert manifest["experts"] == {"format": "int8", "group": 64}
    assert manifest["source"]["bytes"] == Checkpoint.of(source).bytes == made.bytes_before
    assert manifest["bytes"] == made.bytes_after
    index = json.loads((tmp_path / "small" / INDEX_FILE).read_text())["weight_map"]
    small = tensors(tmp_path / "small")
    assert set(manifest["tensors"]) == set(small) == set(index)
    for name, told in manifest["tensors"].items():
        content = small[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert told == {"file": index[name], "sha256": hashlib.sha256(content).hexdigest()}


def test_inspect_tells_the_sizes_of_what_is_stored(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2")
    before = inspect(source, dtype=torch.float32)
    convert(source, tmp_path / "small", INT4)
    after = inspect(tmp_path / "small", dtype=torch.float32)
    assert after.size.bytes == Checkpoint.of(tmp_path / "small").bytes
    assert after.size.parameters == before.size.parameters
    # 16 rows of 32 twice and 32 rows of 16, half a byte each, and a scale a row.
    assert after.size.expert_bytes == (2 * 16 * 32 + 32 * 16) // 2 + 2 * (2 * 16 + 32)
    assert before.size.expert_bytes == 4 * 3 * 16 * 32


def test_what_a_row_reads_is_counted_in_quantised_bytes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2")
    engine = coterie.load(source, expert_dtype="int8", max_new_tokens=4, block=4)
    result = engine.generate([5, 17, 33])
    one = 3 * 16 * 32 + 2 * (2 * 16 + 32)
    assert result.expert_bytes == pytest.approx(result.experts.mean * one)


KILLED = """
import os, sys
from pathlib import Path
from coterie.checkpoints.conversion import ConversionTarget, convert
from coterie.quantization import QuantFormat

source, out = Path(sys.argv[1]), Path(sys.argv[2])
for moment in map(int, sys.argv[3:]):
    child = os.fork()
    if not child:
        heard = 0
        def told(done, whole):
            global heard
            heard += 1
            if heard == moment:
                os._exit(9)
        convert(source, out, ConversionTarget(QuantFormat(8, 64), packed=False), told)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(list(out.glob("*.part"))))
print(convert(source, out, ConversionTarget(QuantFormat(8, 64), packed=False)).files_resumed)
"""


@pytest.mark.slow
def test_what_was_killed_goes_on_and_comes_out_the_same(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2", shards=4)
    convert(source, tmp_path / "at once", INT8)
    entries = [len(held) for held in Checkpoint.of(source).files.values()]
    # In the first file; in the second, which a shard finished before counts once in; in the last.
    moments = [entries[0] // 2, entries[0] + 3, 1 + entries[1] + 2, 1 + 1 + entries[2] + 5]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, source, tmp_path / "killed", *map(str, moments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.splitlines() == ["9 1"] * 4 + ["3"]
    assert files(tmp_path / "killed") == files(tmp_path / "at once")


def test_a_folder_in_the_making_is_no_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2", shards=2)
    out = cut_off(source, tmp_path / "small", after=40)
    with pytest.raises(CoterieError, match="conversion was not finished"):
        coterie.load(out)


def test_a_torn_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2", shards=2)
    convert(source, tmp_path / "at once", INT8)
    out = cut_off(source, tmp_path / "small", after=100)
    with (out / JOURNAL).open("a") as journal:
        journal.write('{"file": "layer-1-ep')
    convert(source, out, INT8)
    assert files(out) == files(tmp_path / "at once")


def test_a_finished_shard_that_has_lost_its_end_is_written_again(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2", shards=2)
    convert(source, tmp_path / "at once", INT8)
    out = cut_off(source, tmp_path / "small", after=100)
    [shard] = out.glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size - 1)
    convert(source, out, INT8)
    assert files(out) == files(tmp_path / "at once")


def test_a_full_disk_is_told_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "whole", "llada2", shards=2), tmp_path / "small"
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1]))
    try:
        with pytest.raises(CoterieError, match=r"cannot be written .* resumes"):
            convert(source, out, INT8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert list(out.glob("*.part")) == []
    convert(source, out, INT8)
    assert len(experts(load_model(out))) > 0


def test_too_small_a_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2")
    free = os.statvfs_result((4096, 4096, 9, 1, 1, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    with pytest.raises(CoterieError, match=r"needs .* bytes on the disk, .* are free"):
        convert(source, tmp_path / "small", INT8)
    assert list((tmp_path / "small").glob("*.safetensors*")) == []


def test_what_a_kill_left_does_not_count_as_room_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2", shards=2)
    needed = convert(source, tmp_path / "at once", INT8).bytes_after
    out = cut_off(source, tmp_path / "small", after=40)
    (out / "layer-0-ep-0-of-1.safetensors.part").write_bytes(bytes(5000))

    def usage(folder: Path) -> Usage:
        taken = sum(file.stat().st_size for file in folder.glob("*.safetensors*"))
        return Usage(needed, taken, needed - taken)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    convert(source, out, INT8)
    assert files(out) == files(tmp_path / "at once")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def cut_off(source: Path, out: Path, *, after: int) -> Path:
    """A folder in the making, left at this many tensors."""

    class Left(BaseException): ...

    heard = 0

    def told(done: int, whole: int) -> None:
        nonlocal heard
        heard += 1
        if heard == after:
            raise Left

    with pytest.raises(Left):
        convert(source, out, INT8, told)
    return out


def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    with pytest.raises(CoterieError, match="is not empty"):
        convert(source, other, INT8)
    assert files(other) == {"thesis.txt": b"years"}
    with pytest.raises(CoterieError, match="not a folder"):
        convert(source, other / "thesis.txt", INT8)
    with pytest.raises(CoterieError, match="is not empty"):
        convert(source, source, INT8)


def test_a_finished_folder_is_not_written_again(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2")
    convert(source, tmp_path / "small", INT8)
    with pytest.raises(CoterieError, match="holds a finished model already"):
        convert(source, tmp_path / "small", INT8)


def test_another_model_or_format_does_not_go_on_with_a_folder(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2", shards=2)
    other = write_checkpoint(tmp_path / "other", "llada2", shards=2, seed=1)
    out = cut_off(source, tmp_path / "small", after=40)
    begun = files(out)
    for model, form in ((source, INT4), (other, INT8)):
        with pytest.raises(
            CoterieError, match=r"unfinished conversion of another model \(int8 in groups of"
        ):
            convert(model, out, form)
    assert files(out) == begun


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2", shards=2)
    out = cut_off(source, tmp_path / "small", after=40)
    with (out / JOURNAL).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CoterieError, match="another process is writing it"):
            convert(source, out, INT8)


def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2")
    convert(source, tmp_path / "small", INT8)
    with pytest.raises(CoterieError, match="its experts are int8 in groups of 64 already"):
        convert(tmp_path / "small", tmp_path / "smaller", INT4)
    assert not (tmp_path / "smaller").exists()
    with pytest.raises(CoterieError, match="are int8 in groups of 64 already; int4"):
        load_model(tmp_path / "small", expert_dtype="int4")
    assert load_model(tmp_path / "small", expert_dtype="int8").spec.expert_format == QuantFormat(
        8, 64
    )


def test_an_expert_that_is_not_finite_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2")
    broken = tensors(source)
    broken[GATE][3, 5] = torch.nan
    save_file(broken, source / SINGLE_FILE)
    expected = f"{GATE} holds NaN or infinity"
    with pytest.raises(CoterieError, match=expected):
        convert(source, tmp_path / "small", INT8)
    with pytest.raises(CoterieError, match=expected):
        load_model(source, expert_dtype="int4")


@pytest.mark.parametrize(
    ("stated", "problem"),
    [
        ("int8", "not a format and a group"),
        ({"format": "int8"}, "not a format and a group"),
        ({"format": "int8", "group": "64"}, "not a name and a whole number"),
        ({"format": "int3", "group": 64}, "unknown format 'int3' for experts; known: int8, int4"),
        ({"format": "int8", "group": 7}, "a group of 7; it must be a multiple of 8"),
    ],
)
def test_a_config_that_misstates_its_format_is_refused(
    tmp_path: Path, stated: object, problem: str
) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2")
    restate(source, stated)
    with pytest.raises(CoterieError, match="coterie_experts is .*" + problem):
        load_model(source)


def test_a_config_and_its_weights_must_agree(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "llada2")
    convert(source, tmp_path / "small", INT8)
    restate(source, {"format": "int8", "group": 64})
    with pytest.raises(CoterieError, match=r"\.q and \d+ more are missing"):
        load_model(source)
    restate(tmp_path / "small", {"format": "int4", "group": 32})
    with pytest.raises(CoterieError, match=r"is I8, config\.json makes it U8"):
        load_model(tmp_path / "small")
    restate(tmp_path / "small", {"format": "int8", "group": 8})
    with pytest.raises(CoterieError, match=r"scales has shape \[16, 1\], config.json makes it"):
        load_model(tmp_path / "small")


def restate(folder: Path, stated: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "coterie_experts": stated}))


def test_the_command_makes_a_model_that_the_command_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_checkpoint(tmp_path / "whole", "llada2"), str(tmp_path / "small")
    assert run(["quantize", str(source), out, "--expert-dtype", "int8", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["experts"], made["group"], made["found"]) == ("int8", 64, 0)
    assert made["bytes_after"] < made["bytes_before"]
    words = ["generate", "5 17 33", "-n", "8", "--model"]
    assert run([*words, out]) == 0
    stored = capsys.readouterr().out
    assert run([*words, str(source), "--expert-dtype", "int8"]) == 0
    assert capsys.readouterr().out == stored
    assert run(["inspect", out]) == 0
    assert "int8 in groups of 64" in capsys.readouterr().out


def test_the_command_complains_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "small")
    for arguments, problem in (
        (["embedded", out, "--expert-dtype", "int2"], "unknown format 'int2'"),
        (["embedded", out, "--expert-dtype", "int8", "--group-size", "12"], "a group of 12"),
        ([str(tmp_path / "nowhere"), out, "--expert-dtype", "int8"], "no such folder"),
    ):
        assert run(["quantize", *arguments]) == 2
        complaint = capsys.readouterr().err
        assert problem in complaint
        assert complaint.count("\n") == 1
    assert not Path(out).exists()


def test_the_layer_of_a_stored_model_is_near_the_whole_one(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", "sdar-moe")
    convert(source, tmp_path / "small", INT8)
    whole = tensors(source)[GATE]
    small = tensors(tmp_path / "small")
    numbers, scales = small[f"{GATE}.q"].float(), small[f"{GATE}.scales"].float()
    assert float((numbers * scales - whole).norm() / whole.norm()) < 0.008
    assert (numbers * scales).equal(dequantize(quantize(whole, parse_format("int8"))))
