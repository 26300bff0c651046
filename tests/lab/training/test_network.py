"""What is trained is LLaDA2, its gradients are right, and a run survives interruptions."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from shared_data import golden
from torch import Tensor

from coterie.errors import CoterieError
from coterie.files import LockedFile
from coterie.lab.training.checkpoint import (
    hf_config,
    load_network,
    save_network,
    write_training_record,
)
from coterie.lab.training.feed import TrainingBatch, start_process
from coterie.lab.training.loop import TrainingConfig, TrainingState, saved_step, train
from coterie.lab.training.network import (
    AttentionGroup,
    NetworkShape,
    TrainingNetwork,
    additive_mask,
    attention_groups,
    run_experts,
    select_experts,
    sort_by_expert,
)
from coterie.lab.training.optim import orthogonalize
from coterie.lab.training.signals import STOP_SIGNALS

SMALL = NetworkShape(
    vocab_size=16,
    hidden_size=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    dense_width=16,
    experts=8,
    k=2,
    groups=2,
    topk_groups=1,
    expert_width=8,
    block=4,
)
CONFIG = TrainingConfig(
    steps=6,
    shape=SMALL,
    warmup_steps=2,
    save_every=3,
    log_every=1,
    precision="fp32",
    initial_bias_update_rate=0.05,
)


def counting(step: int) -> TrainingBatch:
    """Rows that count upwards, half of them masked; a function of the step alone."""
    draw = torch.Generator().manual_seed(step)
    first = torch.randint(0, 15, (4, 1), generator=draw)
    clean = (first + torch.arange(16)) % 15
    hidden = torch.rand(4, 16, generator=draw) < 0.5
    return TrainingBatch(
        tokens=torch.where(hidden, 15, clean),
        positions=torch.arange(16).expand(4, 16).clone(),
        block_mask=torch.ones(4, 4, 4).tril().bool(),
        targets=torch.where(hidden, clean, -100),
        weights=torch.rand(4, 16, generator=draw) + 0.5,
    )


def plain_experts(x: Tensor, weights: Tensor, ids: Tensor, matrices: Tensor) -> Tensor:
    """The definition: every token, every choice, in a loop."""
    rows = []
    for token, chosen, scale in zip(x, ids.tolist(), weights, strict=True):
        outs = [
            (F.silu(matrices[e, 0] @ token) * (matrices[e, 1] @ token)) @ matrices[e, 2] * w
            for e, w in zip(chosen, scale, strict=True)
        ]
        rows.append(torch.stack(outs).sum(0))
    return torch.stack(rows)


def gradients(value: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Slopes of a fixed random functional of ``value``."""
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(9)).to(value.dtype)
    return torch.autograd.grad((value * direction).sum(), leaves)


def test_forward_equals_golden() -> None:
    folder = golden("llada2", "a")
    reference = np.load(folder / "reference.npz")
    network = load_network(folder)
    allowed = torch.from_numpy(reference["attention_mask_bool"])
    every = torch.arange(1)
    logits, loads = network(
        torch.from_numpy(reference["input_ids"]),
        torch.from_numpy(reference["position_ids"]),
        [AttentionGroup(every, every, torch.where(allowed, 0.0, -torch.inf))],
    )
    wanted = torch.from_numpy(reference["logits"])
    assert (logits.view_as(wanted) - wanted).abs().max() < 2e-4
    ids = reference["topk_ids"].reshape(len(loads), -1)
    assert [np.bincount(row, minlength=16).tolist() for row in ids] == loads.tolist()


def test_configuration_has_exactly_the_official_keys() -> None:
    folder = golden("llada2", "a")
    official = json.loads((folder / "config.json").read_text())
    mine = hf_config(load_network(folder).shape) | {"pad_token_id": official["pad_token_id"]}
    assert mine == official | {"dtype": "bfloat16"}


def test_experts_and_their_gradients_equal_the_definition() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(9, 8, generator=draw, requires_grad=True)
    weights = torch.rand(9, 2, generator=draw, requires_grad=True)
    matrices = torch.randn(5, 3, 4, 8, generator=draw, requires_grad=True)
    # Expert 4 gets nothing: its gradient is zero, not whatever memory held.
    ids = torch.stack([torch.randperm(4, generator=draw)[:2] for _ in range(9)])
    mine, counts = run_experts(x, weights, ids, matrices)
    plain = plain_experts(x, weights, ids, matrices)
    torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-5)
    assert counts.tolist() == torch.bincount(ids.flatten(), minlength=5).tolist()
    leaves = [x, weights, matrices]
    for found, wanted in zip(gradients(mine, leaves), gradients(plain, leaves), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=20, deadline=None)
def test_groups_of_attention_equal_one_mask(seed: int, rows_alike: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    visible = torch.rand(1 if rows_alike else 2, 5, 5, generator=draw) < 0.4
    visible = (visible | torch.eye(5, dtype=torch.bool)).expand(2, -1, -1)
    network = TrainingNetwork(SMALL, seed=seed % 7)
    for parameter in network.parameters():
        parameter.data.normal_(generator=draw)
    every = torch.arange(5)
    tokens = torch.randint(0, 16, (2, 20), generator=draw)
    positions = torch.arange(20).expand(2, -1)
    dense = [AttentionGroup(every, every, additive_mask(visible, 4))]
    grouped = attention_groups(visible, 4)
    assert rows_alike or len(grouped) == 1 or (visible[0] == visible[1]).all()
    wanted, _ = network(tokens, positions, dense)
    found, _ = network(tokens, positions, grouped)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("alignment", [1, 8])
def test_expert_order_is_invertible(alignment: int) -> None:
    ids = torch.tensor([[3, 0], [0, 1], [3, 1]])
    rows = sort_by_expert(ids, 4, alignment)
    assert rows.counts.tolist() == [2, 2, 0, 2]
    assert rows.pair_index[rows.row_index.flatten()].tolist() == list(range(6))
    assert (
        torch.searchsorted(rows.expert_ends, rows.row_index.int(), right=True).tolist()
        == ids.tolist()
    )


def test_weights_ignore_the_selection_bias() -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    bias = torch.zeros(8)
    bias[5] = 10.0
    ids, weights = select_experts(logits, bias, SMALL)
    assert (ids == 5).any(-1).all()
    chosen = torch.sigmoid(logits).gather(1, ids)
    torch.testing.assert_close(weights, 2.5 * chosen / chosen.sum(-1, keepdim=True))


def test_orthogonal_steps_have_singular_values_near_one() -> None:
    matrices = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(4))
    values = torch.linalg.svdvals(orthogonalize(matrices).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_parts_of_a_batch_keep_its_divisor() -> None:
    batch = counting(0)
    parts = batch.split(2)
    assert [p.total_weight() for p in parts] == [batch.total_weight()] * 2
    assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)


def test_workers_sum_to_what_one_worker_finds(tmp_path: Path) -> None:
    one = train(counting, replace(CONFIG, steps=1, workers=1), tmp_path / "one")
    two = train(counting, replace(CONFIG, steps=1, workers=2), tmp_path / "two")
    # AdamW's first step is a sign, so compare what Muon moves, smoothly.
    for mine, theirs in zip(one.matrices(), two.matrices(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(counting, CONFIG, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(counting, CONFIG, tmp_path / "half", on_log=_interrupt)
    again = train(counting, CONFIG, tmp_path / "half")
    for name, weight in whole.checkpoint_tensors().items():
        assert torch.equal(weight, again.checkpoint_tensors()[name]), name


def _interrupt(line: dict[str, object]) -> None:
    if line["step"] == 5:
        raise InterruptedError


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_after_the_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals, workers: int
) -> None:
    config = replace(CONFIG, save_every=1000, workers=workers)
    whole = train(counting, config, tmp_path / "whole")
    handlers = [signal.getsignal(each) for each in STOP_SIGNALS]

    def stop(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    raised = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(raised):
        train(counting, config, tmp_path / "half", on_step=stop)
    assert saved_step(tmp_path / "half") == 4
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == handlers
    assert capfd.readouterr().err == ""
    steps: list[int] = []
    again = train(counting, config, tmp_path / "half", on_step=steps.append)
    assert steps == [4, 5, 6]
    for name, weight in whole.checkpoint_tensors().items():
        assert torch.equal(weight, again.checkpoint_tensors()[name]), name


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_its_state_stays(tmp_path: Path, victim: int) -> None:
    def kill(step: int) -> None:
        if step == 4:
            processes = sorted(multiprocessing.active_children(), key=lambda one: one.pid or 0)
            processes[victim].kill()  # the one that makes batches, or a worker

    endless = replace(CONFIG, workers=2, steps=10**6)
    with pytest.raises(CoterieError, match="has ended"):
        train(counting, endless, tmp_path, on_step=kill)
    assert saved_step(tmp_path) >= 3
    assert not multiprocessing.active_children()


def test_a_process_whose_parent_has_ended_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 1)
    process = start_process((tmp_path / "done").touch)
    process.join()
    assert process.exitcode == 1
    assert not (tmp_path / "done").exists()


def test_a_full_disk_names_the_file_and_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(descriptor: int) -> None:
        del descriptor
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(step: int) -> None:
        if step == 4:
            monkeypatch.setattr(os, "fsync", full_disk)

    with pytest.raises(CoterieError, match=r"state.safetensors: cannot be written \(No space"):
        train(counting, replace(CONFIG, workers=1), tmp_path, on_step=fill)
    assert saved_step(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "state.safetensors"]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with LockedFile(tmp_path / "log.jsonl"), pytest.raises(CoterieError, match="another process"):
        train(counting, CONFIG, tmp_path)


def test_a_damaged_state_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CoterieError, match=r"state\.safetensors"):
        train(counting, CONFIG, tmp_path)


@given(
    damage=st.sampled_from(["cut", "key", "shape", "dtype", "step", "run", "list", "none"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_every_damaged_state_is_our_error(tmp_path_factory, damage: str, seed: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    state, path = TrainingState(CONFIG), folder / "state.safetensors"
    state.save(path)
    tensors, run = load_file(path), {"step": "1", "run": state.run_config}
    name = sorted(tensors)[seed % len(tensors)]
    match damage:
        case "key":
            del tensors[name]
        case "shape":
            tensors[name] = tensors[name].flatten()[:1].clone()
        case "dtype":
            tensors[name] = tensors[name].double()
        case "step" | "run":
            run[damage] = "x"
        case "list":
            run["run"] = "[]"
        case "none":
            run = {}
    path.write_bytes(save(tensors, run)[: -1 - seed if damage == "cut" else None])
    with pytest.raises(CoterieError, match=r"state\.safetensors"):
        TrainingState(CONFIG).load(path)


LOG_LINES = [b"", b"\0\0", b"[]", b"5", b'{"loss": 1', b'{"loss": 1}', b"\xff"]
LOG_LINES += [b'{"step": %s, "loss": 1, "speed": 2}' % step for step in (b"[]", b"1")]


@given(lines=st.lists(st.sampled_from(LOG_LINES)))
@settings(max_examples=30, deadline=None)
def test_a_record_of_training_leaves_damaged_lines_out(tmp_path_factory, lines) -> None:
    out = tmp_path_factory.mktemp("out")
    (out / "run").mkdir()
    (out / "run" / "log.jsonl").write_bytes(b"\n".join(lines))
    record = json.loads(write_training_record(out, CONFIG, "Training", {}).read_text())
    assert len(record["facts"]["log"]) == any(line.startswith(b'{"step": 1') for line in lines)


def test_folder_of_another_run_raises(tmp_path: Path) -> None:
    train(counting, replace(CONFIG, steps=1), tmp_path)
    with pytest.raises(CoterieError, match=r"other settings \(seed\)"):
        train(counting, replace(CONFIG, seed=1), tmp_path)


def test_balance_moves_load_to_idle_experts(tmp_path: Path) -> None:
    train(counting, replace(CONFIG, steps=60, workers=1, bias_update_rate=0.05), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    effective = [r["effective"][0] for r in records if "effective" in r]
    assert np.mean(effective[-10:]) > np.mean(effective[:5])
    assert records[-1]["loss"] < records[1]["loss"]


def test_export_loads_back(tmp_path: Path) -> None:
    network = TrainingNetwork(SMALL, seed=5)
    save_network(network, tmp_path)
    again = load_network(tmp_path)
    for name, weight in network.checkpoint_tensors().items():
        assert torch.equal(weight.bfloat16().float(), again.checkpoint_tensors()[name].float()), (
            name
        )
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype is torch.bfloat16
