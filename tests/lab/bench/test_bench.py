"""Benchmarks: shapes, random models, baselines that work and that fail, records and figures.

No test here asserts how long anything took.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import ConfigError, CoterieError
from coterie.lab.bandwidth import read_rows, readable_rows, weight_buffers
from coterie.lab.bench import layer, llama, worker
from coterie.lab.bench.answers import random_prompts, time_concurrency, time_generation
from coterie.lab.bench.baselines import (
    BASELINES,
    Baseline,
    BaselineError,
    BaselineProcess,
    ResolvedBaseline,
    resolve_baselines,
)
from coterie.lab.bench.cost_model import (
    compute_probe,
    first_slab,
    forward_cost,
    kv_bytes,
    overlapped,
    part_bytes,
    roofline_seconds,
)
from coterie.lab.bench.forward import logits_per_forward, random_blocks, time_forward
from coterie.lab.bench.layer import (
    MAX_RELATIVE_ERROR,
    BenchConfig,
    draw_cases,
    group_by_memory,
    make_slab,
    time_layer,
)
from coterie.lab.bench.model import random_model
from coterie.lab.bench.plots import plot_record
from coterie.lab.bench.shapes import SHAPES
from coterie.lab.records import make_record, write_record
from coterie.model.weights import weight_bytes

FAKE_BASELINE = Path(__file__).parents[2] / "support" / "fake_baseline.py"
TINY = SHAPES["tiny"]


@pytest.fixture(autouse=True)
def small_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here depends on what the processor's cache holds."""
    monkeypatch.setattr(layer, "FLUSH_BYTES", 1 << 12)


def bench_config(dtype: str = "bf16", **others: object) -> BenchConfig:
    return BenchConfig(
        TINY, dtype, ("vanilla", "des-vote:beta=0.25"), tokens=9, repeats=2, **others
    )


def fake_baseline(behaviour: str, *, required: bool = False) -> ResolvedBaseline:
    """A baseline of these tests; its name is its behaviour."""
    baseline = Baseline(behaviour, ("graze",), ("fp32", "bf16"), script=str(FAKE_BASELINE))
    return ResolvedBaseline(baseline, Path(sys.executable), required)


def test_our_kernel_and_the_read_are_timed_with_their_bytes() -> None:
    result = time_layer(bench_config("int8"), [], budget=0)
    slab = make_slab(bench_config("int8"))
    total_bytes = sum(each.nbytes for each in weight_buffers([slab.gate_up, slab.down]))
    for timing in result.timings:
        assert {workload: len(taken) for workload, taken in timing.samples.items()} == {
            "ours": 2,
            "read": 2,
        }
        assert timing.bytes == pytest.approx(timing.experts * total_bytes / 32)
    assert result.timings[1].experts == 8
    assert result.timings[0].experts > 8


class TorchHere:
    """The baseline of torch in this process."""

    def __init__(self, resolved: ResolvedBaseline, folder: Path, *, threads: int) -> None:
        self.baseline, self.versions = resolved.baseline, {"torch": torch.__version__}
        runner = worker.BASELINES["torch"](folder, *worker.read_workload(folder))
        self.kernels, self.time_kernel = runner.kernels, runner.time_kernel
        self.relative_error = runner.relative_error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception_info: object) -> None: ...

    def wait_until_ready(self) -> None: ...


@pytest.mark.parametrize(
    ("dtype", "is_here"),
    [("fp32", True), ("bf16", True), pytest.param("bf16", False, marks=pytest.mark.slow)],
)
def test_torch_computes_our_output(
    dtype: str, is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, or in one of its own as a benchmark runs it."""
    if is_here:
        monkeypatch.setattr(layer, "BaselineProcess", TorchHere)
        monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    baselines, skipped = resolve_baselines(["torch"], {"torch": Path(sys.executable)}, dtype)
    result = time_layer(bench_config(dtype), baselines, budget=0)
    assert skipped == result.skipped == {}
    assert set(result.errors) == {"torch loop", "torch grouped_mm"}
    assert all(0 <= error < MAX_RELATIVE_ERROR[dtype] for error in result.errors.values())
    assert result.versions["torch"]["torch"] == torch.__version__
    for timing in result.timings:
        assert {len(taken) for taken in timing.samples.values()} == {2}
        times = timing.facts()["times_ours"]
        assert times["torch loop"] == timing.ratio_to_ours("torch loop") > 0


def test_baselines_report_their_own_seconds() -> None:
    result = time_layer(bench_config(), [fake_baseline("grazes")], budget=0)
    assert result.sessions == [["grazes"]]
    assert result.versions == {"grazes": {"sheep": "1.0"}}
    assert result.errors["grazes graze"] < MAX_RELATIVE_ERROR["bf16"]
    assert [timing.samples["grazes graze"] for timing in result.timings] == [[0.25, 0.25]] * 2


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("lies", "lies graze is wrong: relative error 50.0%"),
        ("shrinks", "shrinks graze is wrong: relative error inf%"),
        ("dies", "dies ended with status 3: out of sheep"),
        ("babbles", "babbles replied 'nonsense'"),
        ("fails", "fails: ImportError: no sheep"),
        ("hangs", "hangs did not reply in 0.3 s"),
    ],
)
def test_a_failing_baseline_is_skipped_with_its_reason(
    behaviour: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if behaviour == "hangs":
        monkeypatch.setattr(layer, "BaselineProcess", partial(BaselineProcess, answer_timeout=0.3))
    result = time_layer(bench_config(), [fake_baseline(behaviour)], budget=0)
    assert result.skipped[behaviour].startswith(reason)
    assert all(set(timing.samples) == {"ours", "read"} for timing in result.timings)
    if behaviour == "dies":
        with pytest.raises(BaselineError, match=reason):
            time_layer(bench_config(), [fake_baseline(behaviour, required=True)], budget=0)


def test_an_output_of_another_shape_or_with_nan_is_infinitely_wrong() -> None:
    expected = np.ones((3, 4), dtype=np.float32)
    assert worker.output_error(expected, expected) == 0
    assert worker.output_error(expected * 1.5, expected) == pytest.approx(0.5)
    assert worker.output_error(expected[:1], expected) == float("inf")
    assert worker.output_error(expected * np.nan, expected) == float("inf")


def test_baselines_share_a_session_if_they_fit_in_memory() -> None:
    torch_, hf, zen, llama = (
        ResolvedBaseline(baseline, Path(), False) for baseline in BASELINES.values()
    )
    assert group_by_memory([torch_, hf, zen, llama], 1.0, 3.0) == [[torch_, hf], [zen], [llama]]
    assert group_by_memory([torch_, hf, zen, llama], 1.0, 0.5) == [[torch_], [hf], [zen], [llama]]
    assert group_by_memory([torch_, hf, zen, llama], 1.0, 9.0) == [[torch_, hf, zen, llama]]
    assert group_by_memory([], 1.0, 9.0) == []


def test_a_slow_kernel_stops_after_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "MAX_SECONDS", 0.5)
    result = time_layer(replace(bench_config(), repeats=9), [fake_baseline("grazes")], budget=0)
    timing = result.timings[0]
    assert (
        len(timing.samples["grazes graze"])
        == len(timing.paired_samples["grazes graze"])
        == layer.MIN_REPEATS
    )
    assert len(timing.samples["ours"]) == 9


def test_a_missing_baseline_is_skipped_unless_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    baselines, skipped = resolve_baselines([], {}, "bf16")
    assert [each.baseline.name for each in baselines] == ["torch"]
    assert set(skipped) == {"transformers", "zentorch", "llama.cpp"}
    with pytest.raises(CoterieError, match=r"zentorch: not installed; `scripts/peers zentorch`"):
        resolve_baselines(["zentorch"], {}, "bf16")
    with pytest.raises(CoterieError, match="torch: has no experts in int8; it has fp32, bf16"):
        resolve_baselines(["torch"], {}, "int8")
    with pytest.raises(CoterieError, match=r"unknown baseline 'onnx'; known: torch, .*llama.cpp"):
        resolve_baselines([], {"onnx": Path("python")}, "bf16")
    with pytest.raises(CoterieError, match="zentorch: nowhere is not executable"):
        resolve_baselines([], {"zentorch": Path("nowhere")}, "bf16")


def test_a_policy_with_fewer_experts_is_timed_without_baselines() -> None:
    naee = replace(bench_config(), policies=("naee:beta=0.6",))
    assert time_layer(naee, [], budget=0).timings[0].experts > 0
    with pytest.raises(CoterieError, match="no baseline supports"):
        time_layer(naee, [fake_baseline("grazes")], budget=0)


def test_the_gates_for_llama_cpp_select_the_experts_of_a_case() -> None:
    cases = draw_cases(bench_config())
    workload = worker.LayerWorkload(32, 4, 64, 32, "bf16", 1, 1)
    some = [
        worker.TimedCase(
            *(x.float().numpy(), routing.topk_ids.numpy(), routing.topk_weights.numpy()),
            expected=np.zeros(0),
        )
        for x, routing in cases["vanilla"][:2]
    ]
    rows = llama.make_embeddings(workload, 18)
    logits = rows @ llama.make_gate(rows, some, 32).T
    ids = np.concatenate([case.ids for case in some])
    weights = np.concatenate([case.weights for case in some])
    assert (np.sort(np.argsort(-logits)[:, :4]) == np.sort(ids)).all()
    shares = np.exp(np.take_along_axis(logits, ids, axis=1))
    expected = weights / weights.sum(axis=1, keepdims=True)
    assert np.allclose(shares / shares.sum(axis=1, keepdims=True), expected, atol=1e-3)


def test_the_error_of_llama_cpp_is_relative_to_the_layers_effect() -> None:
    generator = np.random.default_rng(2)
    rows = llama.make_embeddings(worker.LayerWorkload(4, 2, 64, 8, "bf16", 1, 1), 12)
    added = generator.standard_normal(64).astype(np.float32) * 0.1
    x = rows[3] + added
    right = rows @ (x / np.sqrt((x**2).mean())) * (8 / 64)
    assert llama.relative_error(right + 5, rows, 3, added) < 1e-4
    without = rows @ rows[3] * (8 / 64)
    assert llama.relative_error(without, rows, 3, added) == pytest.approx(1, abs=1e-4)


# Whole forwards and answers


@pytest.mark.parametrize("experts", ["fp32", "bf16", "int4"])
def test_a_forward_reads_every_weight_once_and_the_used_experts(experts: str) -> None:
    model = random_model(TINY, experts)
    blocks = random_blocks(model, 32, 33, 1)
    cost = forward_cost(model.transformer, blocks)
    assert int(blocks.window.start) == 64
    spec, dtype = model.spec, model.transformer.dtype
    all_experts = {layer: torch.ones(32, dtype=torch.bool) for layer in spec.moe_layers}
    keys = cost.part_bytes["keys and values"]
    assert keys == 2 * spec.layers * spec.kv_heads * spec.head_dim * 96 * dtype.itemsize
    total_bytes = cost.used_expert_bytes(all_experts) + sum(cost.part_bytes.values()) - keys
    embedding_bytes = spec.vocabulary * spec.hidden * dtype.itemsize
    assert total_bytes == pytest.approx(weight_bytes(spec, dtype) - embedding_bytes, rel=0.06)
    none = {layer: torch.zeros(32, dtype=torch.bool) for layer in spec.moe_layers}
    assert cost.used_expert_bytes(none) == 0


def test_forwards_are_timed_with_their_reads() -> None:
    model = random_model(TINY, "int8")
    progress: list[float] = []
    result = time_forward(
        model,
        ["vanilla", "des-vote:beta=0.25"],
        repeats=3,
        context=40,
        on_progress=lambda share, _doing: progress.append(share),
    )
    timings = result.timings
    assert all(
        {name: len(values) for name, values in timing.samples.items()}
        == {"read": 3, "floor": 3, "forward": 3}
        for timing in timings
    )
    assert all(
        a >= b
        for timing in timings
        for a, b in zip(timing.samples["floor"], timing.samples["read"], strict=True)
    )
    assert timings[0].part_flops == timings[1].part_flops
    assert result.logit_counts == (32, 28, 24, 20, 16, 12, 8, 4)
    assert [len(taken) for taken in result.rates.values()] == [6, 6, 6]
    assert timings[1].experts == 8 < timings[0].experts
    assert timings[0].bytes > timings[1].bytes > sum(timings[1].part_bytes.values()) - 1
    assert progress[-1] == 1.0
    with pytest.raises(CoterieError, match="need 576 positions; the model has 512"):
        time_forward(model, ["vanilla"], context=543)


@pytest.mark.parametrize("experts", ["fp32", "bf16", "int8"])
def test_flops_are_two_per_weight_and_token(experts: str) -> None:
    model = random_model(TINY, experts)
    spec, transformer = model.spec, model.transformer
    cost = forward_cost(transformer, random_blocks(model, 32, 64, 1))
    flops = cost.flops_by_part(pairs=32 * 4 * 2, num_logits=5)
    assert set(flops) == {"experts", *cost.part_bytes}
    size = transformer.dtype.itemsize
    for part in ("attention", "shared", "dense"):
        assert flops[part] == 2 * 32 * cost.part_bytes[part] // size
    assert flops["router"] == 2 * 32 * cost.part_bytes["router"] // 4
    assert flops["head"] == 2 * 5 * spec.vocabulary * spec.hidden
    assert flops["experts"] == 2 * (32 * 4 * 2) * spec.expert_parameters
    assert flops["keys and values"] == 4 * 32 * 96 * spec.heads * spec.head_dim * spec.layers
    slab, device = first_slab(transformer), transformer.device
    probe = compute_probe(spec, slab, 32, matrix_dtype=transformer.dtype, device=device)
    assert all(rate > 0 for rate in probe.measure_rates().values())


@pytest.mark.parametrize("experts", ["fp32", "bf16", "int8"])
def test_the_bytes_of_a_spec_are_those_of_the_model(experts: str) -> None:
    model = random_model(TINY, experts)
    cost = forward_cost(model.transformer, random_blocks(model, 32, 64, 1))
    spec, dtype = model.spec, model.transformer.dtype
    sizes = part_bytes(spec, dtype) | kv_bytes(spec, dtype, 96)
    assert sizes == pytest.approx(cost.part_bytes, rel=0.01)


def test_the_roofline_sums_the_longer_time_of_each_part() -> None:
    result = roofline_seconds(
        {"experts": 60.0, "head": 20.0, "router": 10.0},
        {"experts": 100.0, "head": 90.0, "router": 8.0},
        bandwidth=10.0,
        rates={"experts": 50.0, "matrix": 30.0, "router": 4.0},
    )
    assert result == 6 + 3 + 2


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1))
def test_overlapped_times_lie_between_the_longer_and_the_sum(a: float, b: float, c: float) -> None:
    assert max(a, b) - 1e-9 <= overlapped(a, b, c) <= a + b + 1e-9


def test_logit_counts_of_a_block_decrease_evenly() -> None:
    assert logits_per_forward(7, 32) == (7,)
    assert logits_per_forward("block", 4) == (4, 3, 2, 1)
    assert logits_per_forward("block", 12) == (12, 11, 9, 8, 6, 5, 3, 2)
    with pytest.raises(CoterieError, match="`num_logits` is 33; must be 1 to 32"):
        logits_per_forward(33, 32)


def test_bytes_are_read_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.lab.bandwidth.cpu.is_available", lambda: False)
    rows = readable_rows([torch.ones(3, 4, 5)])
    assert isinstance(rows[0], torch.Tensor)
    read_rows(rows, torch.tensor([True, False, True]))


def test_answers_are_timed_with_vanilla_first() -> None:
    engine = Engine(
        random_model(TINY, "fp32"),
        generation=GenerationConfig.for_family(TINY.family.defaults).replace(early_stop="off"),
    )
    prompts = random_prompts(2, 5, 100)
    timings = time_generation(
        engine,
        prompts,
        ["des-vote:beta=0.25", "vanilla"],
        num_repeats=2,
        options={"max_new_tokens": 27, "unmask": "fixed:steps=4"},
    )
    assert [timing.policy for timing in timings] == ["vanilla", "des-vote:beta=0.25"]
    counts = timings[1].facts(timings[0])
    assert counts["new_tokens"] == 54
    assert counts["experts_mean"] <= 8
    assert counts["forwards_per_block"] == counts["forwards"] / 2
    assert timings[0].facts(timings[0])["texts_as_vanilla"] == 2
    assert len(timings[0].measure().samples) == 2


def test_rows_share_the_experts_that_are_read() -> None:
    engine = Engine(
        random_model(TINY, "fp32"),
        generation=GenerationConfig.for_family(TINY.family.defaults).replace(early_stop="off"),
    )
    policies = ("vanilla", "des-vote:beta=0.25", "des-vote:beta=0.25,scope=batch")
    timings = time_concurrency(
        engine,
        random_prompts(4, 5, 100),
        policies,
        (4, 1),
        num_repeats=1,
        options={"max_new_tokens": 27, "unmask": "fixed:steps=4"},
    )
    assert [(each.policy, each.rows) for each in timings] == [
        (policy, rows) for policy in policies for rows in (1, 4)
    ]
    facts = {(each.policy, each.rows): each.rows_facts(each) for each in timings}
    budget = facts["vanilla", 1]["experts_total"] // 4
    vote, batch = policies[1:]
    assert facts[vote, 1]["experts"] <= budget < facts[vote, 4]["experts"]
    assert facts[batch, 4]["experts"] <= budget
    assert facts[vote, 4]["experts"] < facts["vanilla", 4]["experts"]
    for policy in policies:
        alone, together = facts[policy, 1], facts[policy, 4]
        assert together["forwards"] < alone["forwards"]
        assert together["expert_bytes_per_token"] < alone["expert_bytes_per_token"]
    for alone, together in zip(timings[::2], timings[1::2], strict=True):
        same = together.rows_facts(alone)["texts_as_alone"]
        assert same == 4 or together.policy == batch
        assert [len(repeat["tokens"][0]) for repeat in together.repeats] == [27]


def test_another_record_has_no_figure(tmp_path: Path) -> None:
    path = write_record(tmp_path, make_record("embedded training", [], []))
    with pytest.raises(CoterieError, match="'embedded training' has no figure; known: bench layer"):
        plot_record(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"title": 7},
        {"title": None},
        {"measures": 5},
        {"measures": [5]},
        {"measures": [{"name": "vanilla", "samples": ["fast"]}]},
        {"measures": [{"name": "vanilla", "samples": []}]},
        {"measures": [{"name": "vanilla", "samples": [float("nan")]}]},
    ],
)
def test_a_damaged_record_has_no_figure(tmp_path: Path, damage: Mapping[str, object]) -> None:
    path = tmp_path / "record.json"
    record = {"title": "generate", "measures": [{"name": "vanilla", "samples": [1.0]}], **damage}
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"record\.json: not a benchmark record"):
        plot_record(path)
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_skipped_baseline_leaves_only_its_reason() -> None:
    result = time_layer(
        bench_config(), [fake_baseline("dies"), fake_baseline("grazes")], budget=9e9
    )
    assert set(result.skipped) == {"dies"}
    assert result.sessions == [["grazes"]]
    assert set(result.versions) == {"grazes"}
    assert set(result.errors) == {"grazes graze"}


def test_each_shape_is_timed_at_the_sizes_of_the_paper() -> None:
    assert SHAPES["llada2-mini"].policies == ("vanilla", "des-vote:beta=0.15", "des-vote:beta=0.1")
    assert SHAPES["llada-moe"].policies == ("vanilla", "des-vote:beta=0.6", "des-vote:beta=0.4")
