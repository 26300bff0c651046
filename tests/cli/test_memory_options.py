"""Memory for experts: its options, its plan, and warm starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from offload_cases import (
    OPTIONS,
    PROMPT,
    cached_store_of,
    load_engine,
    needs_kernels,
    packed_checkpoint,
)

import coterie
from coterie.cli.entry import run
from coterie.errors import CoterieError
from coterie.lab.replay.recorder import bytes_by_precision
from coterie.loading import disk_offload
from coterie.loading.expert_memory import (
    AUTO_MARGIN_BYTES,
    AUTO_SPARE_SHARE,
    ExpertMemoryConfig,
    non_expert_bytes,
    plan_expert_memory,
)
from coterie.loading.free_memory import CGROUP_V1, CGROUP_V2, cgroup_free_memory
from coterie.loading.saved_votes import SavedVotes, read_votes, router_checksum, write_votes
from coterie.offload.capacity import parse_bytes
from coterie.offload.eviction import ByVotes, Lfu, Lru
from coterie.testing import read_spec, tiny_config, write_checkpoint
from coterie.values import PackedFormat

pytestmark = pytest.mark.usefixtures("embedded_once")

WORDS = ["generate", "5 17 33", "-n", "8", "--block", "8"]


def test_memory_is_parsed_from_text() -> None:
    config = ExpertMemoryConfig.parse("35%", host_memory="20GiB", eviction="votes:decay=0.9")
    assert (config.host_memory, config.eviction) == (20 << 30, ByVotes(0.9))
    assert (
        ExpertMemoryConfig.parse("auto").capacity
        == ExpertMemoryConfig.parse("1", host_memory="auto").host_memory
        == "auto"
    )
    assert config.to_dict() == {
        "expert_memory": "35%",
        "host_memory": 20 << 30,
        "eviction": "votes:decay=0.9",
        "warm": None,
    }
    assert ExpertMemoryConfig.parse("47").eviction == Lru()
    for text in ("20", "20GB/s", "0GiB", "-1GiB", "many", "9" * 5000 + "GiB"):
        with pytest.raises(CoterieError):
            parse_bytes(text, "--host-memory")


def test_auto_leaves_memory_for_all_else() -> None:
    _, spec = read_spec(tiny_config("llada2"))
    layers, dtype, size = len(spec.moe_layers), torch.float32, 1 << 20

    def slots(free: int | None) -> int:
        return plan_expert_memory(
            ExpertMemoryConfig.parse("auto"), spec, dtype, expert_bytes=size, free_bytes=free
        ).slots

    free = 4 * AUTO_MARGIN_BYTES
    while slots(free) == spec.router.experts:
        free = free * 99 // 100
    for less in (0, 2, 5):
        rest = non_expert_bytes(spec, dtype, free - less * layers * size)
        assert slots(free - less * layers * size) == (free - rest) // (layers * size) - less
    settled = plan_expert_memory(
        ExpertMemoryConfig.parse("auto"), spec, dtype, expert_bytes=size, free_bytes=1 << 40
    )
    assert settled.holds_all
    assert settled.absent_bytes == 0
    with pytest.raises(CoterieError, match="one expert in each of 2 layers"):
        slots(AUTO_MARGIN_BYTES)
    with pytest.raises(CoterieError, match="does not report"):
        slots(None)


@needs_kernels
def test_auto_reports_free_and_used_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed_checkpoint(tmp_path)
    words = [*WORDS, "-m", str(folder), "--dtype", "float32", "--expert-memory", "auto"]
    assert run(words) == 0
    assert "kept for all else: all 16 experts per layer fit" in capsys.readouterr().err
    spec = load_engine(folder).model.spec
    each = len(spec.moe_layers) * spec.expert_stride
    rest = non_expert_bytes(spec, torch.float32, 0)
    free = int((rest + 6.5 * each) / (1 - AUTO_SPARE_SHARE))
    monkeypatch.setattr(disk_offload, "free_memory", lambda _device: free)
    assert run(words) == 0
    assert "kept for all else: 6 of 16 experts per layer in memory" in capsys.readouterr().err
    monkeypatch.setattr(disk_offload, "free_memory", lambda _device: None)
    assert run(words) == 2
    assert "does not report its free memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "controllers"), [(CGROUP_V1, "memory"), (CGROUP_V2, "")], ids=["first", "second"]
)
def test_the_limit_of_a_cgroup_counts(tmp_path: Path, names, controllers: str) -> None:
    groups = tmp_path / "cgroup"
    groups.write_text(f"3:cpu:/x\n0:{controllers}:/outer/inner\n")
    folder = tmp_path / "mounted" / controllers
    for at, limit in ((folder / "outer", "9000"), (folder / "outer" / "inner", "max")):
        at.mkdir(parents=True)
        (at / names.limit).write_text(f"{limit}\n")
        (at / names.usage).write_text("5000\n")
        kind = "" if names is CGROUP_V2 else "total_"
        (at / "memory.stat").write_text(f"{kind}inactive_file 300\nanon 1\n{kind}active_file 40\n")
    assert cgroup_free_memory(groups, tmp_path / "mounted") == 9000 - 5000 + 340
    assert cgroup_free_memory(tmp_path / "none", tmp_path / "mounted") is None


@needs_kernels
def test_an_option_without_effect_is_refused_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(packed_checkpoint(tmp_path))
    for more, expected in (
        (["--eviction", "lfu"], "--eviction has no effect where all experts are in memory"),
        (["--host-memory", "1GiB"], "--expert-memory 35% keeps"),
        (["--warm-start", folder], "--warm-start has no effect"),
        (["--expert-memory", "3", "--host-memory", "1GiB"], "no effect on a CPU"),
        (["--expert-memory", "3", "--eviction", "fifo"], "known: lfu, lru, votes"),
        (["--expert-memory", "3", "--warm-start", folder], "not a regular file"),
        (["--expert-memory", "3", "--warm-start", __file__], "`coterie trace` saves votes"),
        (
            ["--expert-memory", "nonsense"],
            "--expert-memory is 'nonsense'; use a share of the experts",
        ),
        (["--expert-memory", "0.35"], "or bytes (6GiB), or auto"),
        (
            ["--simulate-expert-memory", "25GB/s"],
            "--simulate-expert-memory is '25GB/s'; use a share of the experts",
        ),
        (["--expert-memory", "3", "--warm-start", f"{folder}/config.json"], "has no votes"),
    ):
        assert run([*WORDS, "-m", folder, *more]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert expected in printed.err


@needs_kernels
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_a_trace_of_a_packed_model_has_the_size_of_its_experts(
    tmp_path: Path, kind: PackedFormat
) -> None:
    """So that as many bytes are as many slots to the replay as to the engine."""
    spec = load_engine(packed_checkpoint(tmp_path, kind=kind)).model.spec
    assert bytes_by_precision(spec)[kind] == spec.expert_stride
    plain = bytes_by_precision(replace(spec, panels=False))
    assert plain["bf16"] == 2 * spec.expert_parameters


@needs_kernels
def test_note_mentions_disk_only_if_experts_are_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "-m", str(packed_checkpoint(tmp_path)), "--expert-memory"]
    assert run([*words, "100%"]) == 0
    printed = capsys.readouterr().err
    assert "all 16 experts per layer in memory" in printed
    assert "on disk" not in printed
    assert run([*words, "15"]) == 0
    assert "15 of 16 experts per layer in memory" in capsys.readouterr().err


@needs_kernels
def test_plotting_traffic_needs_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = [*WORDS, "-m", str(packed_checkpoint(tmp_path)), "--expert-memory", "auto"]
    assert run([*words, "--plot-traffic", str(tmp_path / "moved")]) == 2
    expected = capsys.readouterr()
    assert (expected.out, list(tmp_path.glob("moved*"))) == ("", [])
    assert "nothing is moved; --expert-memory 35% keeps fewer" in expected.err


@needs_kernels
@pytest.mark.parametrize("rule", [Lru(), Lfu(), ByVotes(0.5)])
def test_votes_saved_by_a_trace_fill_the_slots(tmp_path: Path, rule) -> None:
    """Nothing is left to fetch that a warm start has brought; tokens are the same."""
    folder = packed_checkpoint(tmp_path)
    prompts, votes = tmp_path / "prompts", tmp_path / "votes.json"
    prompts.write_text(json.dumps({"prompt": "5 17 33"}) + "\n")
    words = ["trace", "-m", str(folder), "--prompt-file", str(prompts), "-n", "16", "--block", "8"]
    traced = tmp_path / "trace"
    assert run([*words, "-o", str(traced), "--save-votes", str(votes)]) == 0
    saved = read_votes(votes)
    assert saved.router_checksum == router_checksum(folder)
    true = load_engine(folder).generate(PROMPT, **OPTIONS).tokens
    first = ExpertMemoryConfig(
        ExpertMemoryConfig.parse("6").capacity, eviction=rule, warm_start=saved
    )
    engine = coterie.load(folder, dtype="float32", device="cpu", expert_memory=first)
    store = cached_store_of(engine)
    assert store.traffic_log.traffic().experts_moved == 6 * len(engine.model.spec.moe_layers)
    for layer, row in saved.by_layer().items():
        resident = store.resident(layer)
        assert resident is not None
        assert resident.numpy().tolist() == np.isin(np.arange(16), np.argsort(-row)[:6]).tolist()
    assert engine.generate(PROMPT, **OPTIONS).tokens == true
    assert (
        run([*WORDS, "-m", str(folder), "--expert-memory", "6", "--warm-start", str(traced)]) == 0
    )


def test_a_trace_stopped_between_its_two_outputs_can_be_repeated(tmp_path, monkeypatch) -> None:
    """The trace takes its name last: without the votes, there is no trace to stand in the way."""
    traced, votes = tmp_path / "trace", tmp_path / "votes"
    words = ["trace", "--task", "words", "--num-problems", "1", "-n", "8", "-o", str(traced)]
    words += ["--save-votes", str(votes)]

    class Killed(BaseException): ...

    def stop(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("coterie.cli.trace.write_votes", stop)
        with pytest.raises(Killed):
            run(words)
    assert not traced.exists()
    assert run(words) == 0
    assert traced.exists()
    assert read_votes(votes).layers


def test_votes_of_another_model_are_refused(tmp_path: Path) -> None:
    one, other = (write_checkpoint(tmp_path / str(seed), "llada2", seed) for seed in (0, 1))
    _, spec = read_spec(tiny_config("llada2"))
    votes = np.ones((len(spec.moe_layers), spec.router.experts))
    saved = SavedVotes.of("one", spec.moe_layers, votes, router_checksum(one))
    write_votes(tmp_path / "votes", saved)
    read = read_votes(tmp_path / "votes")
    assert (read, read.label) == (saved, saved.label)
    read.check(spec, one)
    with pytest.raises(CoterieError, match="other routers than"):
        read.check(spec, other)
    with pytest.raises(CoterieError, match="2 layers of 15 experts"):
        SavedVotes.of("less", spec.moe_layers, votes[:, 1:]).check(spec, one)
    for harm in ('"votes": [[1]]', '"votes": [[NaN], [1]]', '"votes": "many"'):
        text = f'{{"format": "coterie votes", "version": 1, "layers": [1, 2], {harm}}}'
        (tmp_path / "votes").write_text(text)
        with pytest.raises(CoterieError, match="not a row of numbers"):
            read_votes(tmp_path / "votes")
