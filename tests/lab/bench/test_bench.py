"""Benchmarks: shapes, random models, baselines that work and that fail, records and figures.

No test here asserts how long anything took.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from released_configs import LLADA2_FLASH, LLADA2_MINI, LLADA_MOE

from coterie.cli.entry import run
from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CoterieError
from coterie.lab.bench import interleaved, llama, worker
from coterie.lab.bench.bandwidth import read_rows, readable_rows, weight_buffers
from coterie.lab.bench.baselines import (
    BASELINES,
    Baseline,
    BaselineError,
    BaselineProcess,
    ResolvedBaseline,
    resolve_baselines,
)
from coterie.lab.bench.cost_model import compute_probe, forward_cost, roofline_seconds
from coterie.lab.bench.forward import logits_per_forward, random_blocks, time_forward
from coterie.lab.bench.generate import random_prompts, time_generation
from coterie.lab.bench.interleaved import MAX_RELATIVE_ERROR, BenchConfig
from coterie.lab.bench.layer import draw_cases, group_by_memory, make_slab, time_layer
from coterie.lab.bench.model import random_experts, random_model, repeat_experts
from coterie.lab.bench.plots import make_chart, plot_record
from coterie.lab.bench.routings import find_skew
from coterie.lab.bench.shapes import SHAPES, find_shape
from coterie.lab.records import make_record, write_record
from coterie.model.forward_context import ForwardContext
from coterie.model.weights import weight_bytes
from coterie.ops import run_experts
from coterie.routing import Vanilla
from coterie.telemetry import ExpertCounter
from coterie.testing import read_spec
from coterie.values import PackedExperts, Routing, Window, expert_mask

FAKE_BASELINE = Path(__file__).parents[2] / "support" / "fake_baseline.py"
TINY = SHAPES["tiny"]


# Shapes


@pytest.mark.parametrize(
    ("name", "config"),
    [("llada2-mini", LLADA2_MINI), ("llada2-flash", LLADA2_FLASH), ("llada-moe", LLADA_MOE)],
)
def test_a_shape_equals_the_released_config(name: str, config: dict) -> None:
    family, spec = read_spec(config)
    assert SHAPES[name].spec == spec
    assert SHAPES[name].family is family


def test_an_unknown_shape_lists_the_known_ones() -> None:
    with pytest.raises(CoterieError, match=r"unknown shape 'llada3'; known: llada2-mini, .*tiny"):
        find_shape("llada3")


def test_a_truncated_shape_has_a_moe_layer() -> None:
    assert TINY.truncate(2).spec.moe == (False, True)
    assert TINY.truncate(None) is TINY
    for layers in (0, 1, 4):
        with pytest.raises(CoterieError, match=f"`layers` is {layers} for Tiny; must be 2 to 3"):
            TINY.truncate(layers)


def test_uncounted_routers_are_as_skewed_as_minis() -> None:
    skew = find_skew(SHAPES["llada2-mini"].spec.router, SHAPES["llada2-mini"].unique_experts)
    assert find_skew(
        SHAPES["sdar-moe"].spec.router, SHAPES["sdar-moe"].unique_experts
    ) == pytest.approx(skew, abs=0.05)


# Random models


@pytest.mark.parametrize("experts", ["fp32", "bf16", "int8", "int4"])
def test_a_random_model_repeats_a_few_experts(experts: str) -> None:
    generator = torch.Generator().manual_seed(3)
    spec = TINY.spec
    distinct = random_experts(spec, experts, generator, torch.device("cpu"))
    repeated = repeat_experts(distinct, 7)
    x = torch.randn(9, spec.hidden, generator=generator)
    x = x if experts == "fp32" else x.bfloat16()
    ids = torch.randint(0, 7, (9, 3), generator=generator)
    weights = torch.rand(9, 3, generator=generator)

    def routing(ids: torch.Tensor, count: int) -> Routing:
        return Routing(ids, weights, expert_mask(ids.flatten(), count), ids)

    y = run_experts(x, routing(ids, 7), repeated)
    assert torch.allclose(y, run_experts(x, routing(ids % 2, 2), distinct), rtol=1e-5, atol=1e-7)
    assert float(y.abs().mean()) > 0


def test_each_copy_of_an_expert_has_its_own_memory() -> None:
    distinct = random_experts(TINY.spec, "bf16", torch.Generator(), torch.device("cpu"))
    repeated = repeat_experts(distinct, 32)
    total_bytes = (
        repeated.gate_up.packed if isinstance(repeated.gate_up, PackedExperts) else repeated.gate_up
    )
    assert len(total_bytes) == 32
    assert total_bytes.stride(0) == total_bytes[0].numel()


@pytest.mark.parametrize("name", ["tiny", "llada-moe"])
def test_skewed_gates_use_as_many_experts_as_the_model(name: str) -> None:
    shape = SHAPES[name]
    if name != "tiny":
        attention = {"heads": 2, "kv_heads": 2, "head_dim": 16, "rotary_dim": 8}
        small = {"vocabulary": 512, "hidden": 256, "expert_width": 16, **attention}
        shape = replace(shape, spec=replace(shape.spec, **small)).truncate(4)
    model = random_model(shape, "bf16")
    counter, generator = ExpertCounter(), torch.Generator().manual_seed(1)
    for number in range(6):
        ids = torch.randint(0, model.mask_id, (1, 32), generator=generator)
        counter.on_forward((number,))
        span = torch.tensor([32])
        step = ForwardContext(Window(span * 0, 32, span), None, Vanilla(), counter)
        model.transformer(ids, step)
    unique_experts = sum(counter.counts(number).mean for number in range(6)) / 6
    assert unique_experts == pytest.approx(shape.unique_experts, rel=0.12)


def test_a_random_model_depends_on_its_seed_only() -> None:
    first, again, other = (random_model(TINY, "int8", layers=2, seed=s) for s in (1, 1, 2))
    options = GenerationConfig.for_family(TINY.family.defaults).replace(max_new_tokens=8, block=8)
    texts = [
        Engine(m, generation=options).generate("5 17 33").tokens for m in (first, again, other)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.lab.bench.model.free_memory", lambda _device: 1 << 10)
    with pytest.raises(CoterieError, match="GiB are free; reduce `layers`"):
        random_model(TINY)


# One layer, and baselines


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
    slab = make_slab(TINY.layer, bench_config("int8"))
    total_bytes = sum(each.nbytes for each in weight_buffers([slab.gate_up, slab.down]))
    for timing in result.timings:
        assert {workload: len(taken) for workload, taken in timing.samples.items()} == {
            "ours": 2,
            "read": 2,
        }
        assert timing.bytes == pytest.approx(timing.experts * total_bytes / 32)
    assert result.timings[1].experts == 8
    assert result.timings[0].experts > 8


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_torch_computes_our_output_in_its_own_process(dtype: str) -> None:
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
        monkeypatch.setattr(
            interleaved, "BaselineProcess", partial(BaselineProcess, answer_timeout=0.3)
        )
    result = time_layer(bench_config(), [fake_baseline(behaviour)], budget=0)
    assert result.skipped[behaviour].startswith(reason)
    assert all(set(timing.samples) == {"ours", "read"} for timing in result.timings)
    if behaviour == "dies":
        with pytest.raises(BaselineError, match=reason):
            time_layer(bench_config(), [fake_baseline(behaviour, required=True)], budget=0)


def test_baselines_share_a_session_if_they_fit_in_memory() -> None:
    torch_, hf, zen, llama = (
        ResolvedBaseline(baseline, Path(), False) for baseline in BASELINES.values()
    )
    assert group_by_memory([torch_, hf, zen, llama], 1.0, 3.0) == [[torch_, hf], [zen], [llama]]
    assert group_by_memory([torch_, hf, zen, llama], 1.0, 0.5) == [[torch_], [hf], [zen], [llama]]
    assert group_by_memory([torch_, hf, zen, llama], 1.0, 9.0) == [[torch_, hf, zen, llama]]
    assert group_by_memory([], 1.0, 9.0) == []


def test_a_slow_kernel_stops_after_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "MAX_SECONDS", 0.5)
    result = time_layer(replace(bench_config(), repeats=9), [fake_baseline("grazes")], budget=0)
    timing = result.timings[0]
    assert (
        len(timing.samples["grazes graze"])
        == len(timing.paired_samples["grazes graze"])
        == interleaved.MIN_REPEATS
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
        worker.TimedCase(x.float().numpy(), routing.topk_ids.numpy(), routing.topk_weights.numpy())
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
    assert (
        [len(timing.seconds) for timing in timings]
        == [len(timing.read_seconds) for timing in timings]
        == [3, 3]
    )
    assert all(
        a >= b
        for timing in timings
        for a, b in zip(timing.roofline_seconds, timing.read_seconds, strict=True)
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
    assert all(rate > 0 for rate in compute_probe(transformer, 32).measure_rates().values())


def test_the_roofline_sums_the_longer_time_of_each_part() -> None:
    result = roofline_seconds(
        {"experts": 60.0, "head": 20.0, "router": 10.0},
        {"experts": 100.0, "head": 90.0, "router": 8.0},
        bandwidth=10.0,
        rates={"experts": 50.0, "matrix": 30.0, "router": 4.0},
    )
    assert result == 6 + 3 + 2


def test_logit_counts_of_a_block_decrease_evenly() -> None:
    assert logits_per_forward(7, 32) == (7,)
    assert logits_per_forward("block", 4) == (4, 3, 2, 1)
    assert logits_per_forward("block", 12) == (12, 11, 9, 8, 6, 5, 3, 2)
    with pytest.raises(CoterieError, match="`num_logits` is 33; must be 1 to 32"):
        logits_per_forward(33, 32)


def test_bytes_are_read_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.lab.bench.bandwidth.cpu.is_available", lambda: False)
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
        options={"max_new_tokens": 27},
    )
    assert [timing.policy for timing in timings] == ["vanilla", "des-vote:beta=0.25"]
    counts = timings[1].facts(timings[0])
    assert counts["new_tokens"] == 54
    assert counts["experts_mean"] <= 8
    assert counts["forwards_per_block"] == counts["forwards"] / 2
    assert timings[0].facts(timings[0])["texts_as_vanilla"] == 2
    assert len(timings[0].measure().samples) == 2


# The command, its records and their figures


def test_the_layer_command_writes_a_record_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "layer", "--shape", "tiny", "--baseline", "none", "--repeats", "2"]
    assert (
        run(
            [*arguments, "--json", "-p", "vanilla", "-p", "des-vote:beta=0.25", "-o", str(tmp_path)]
        )
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "bench-layer-tiny-bf16.json").read_text())
    assert document == {"schema": 2, **record}
    assert [each["policy"] for each in record["facts"]["policies"]] == [
        "vanilla",
        "des-vote:beta=0.25",
    ]
    chart = make_chart(record)
    assert set(chart.rows) == {"read", "ours"}
    samples = {each["name"]: each["samples"] for each in record["measures"]}
    assert chart.samples["ours", "vanilla"] == samples["vanilla ours"]
    figure = tmp_path / "bench-layer-tiny-bf16-dark.svg"
    before = figure.read_text()
    figure.unlink()
    assert run(["bench", "plot", str(tmp_path / "bench-layer-tiny-bf16.json")]) == 0
    assert figure.read_text() == before
    assert "des-vote:beta=0.25" in before


def test_forward_and_generate_write_records_with_figures(tmp_path: Path) -> None:
    options = ["--shape", "tiny", "--repeats", "1", "-o", str(tmp_path), "-p", "des-vote:beta=0.25"]
    assert run(["bench", "forward", *options, "--layers", "2", "--context", "0"]) == 0
    assert run(["bench", "generate", *options, "--num-prompts", "1", "--tokens", "8"]) == 0
    forward = json.loads((tmp_path / "bench-forward-tiny-int8-2-layers.json").read_text())
    assert set(make_chart(forward).rows) == {"read", "floor", "forward"}
    assert forward["facts"]["wanted"] == "block"
    generate = json.loads((tmp_path / "generate-random-tiny-cpu.json").read_text())
    assert make_chart(generate).rows == ["vanilla", "des-vote:beta=0.25"]
    assert len(list(tmp_path.glob("*.svg"))) == 4


def test_other_sizes_have_other_record_names(tmp_path: Path) -> None:
    options = ["--shape", "tiny", "--repeats", "1", "-o", str(tmp_path), "-p", "vanilla"]
    assert run(["bench", "layer", *options, "--baseline", "none", "--tokens", "8"]) == 0
    assert run(["bench", "forward", *options, "--tokens", "8", "--context", "0"]) == 0
    distinct = [*options, "--num-prompts", "1", "--tokens", "8"]
    assert run(["bench", "generate", *distinct, "--dtype", "int8", "--layers", "2"]) == 0
    assert run(["bench", "generate", *distinct, "--dtype", "bf16"]) == 0
    assert {path.stem for path in tmp_path.glob("*.json")} == {
        "bench-layer-tiny-bf16-8-tokens",
        "bench-forward-tiny-int8-8-tokens",
        "generate-random-tiny-cpu-int8-2-layers",
        "generate-random-tiny-cpu",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--shape", "llada3"], "unknown shape 'llada3'"),
        (
            ["layer", "--baseline", "none", "--baseline", "torch"],
            "has no effect with --baseline none",
        ),
        (["layer", "--baseline", "none", "--include-slow"], "--include-slow has no effect"),
        (
            ["layer", "--baseline", "none", "--baseline-memory", "2"],
            "--baseline-memory has no effect",
        ),
        (["layer", "--baseline-python", "zentorch"], "not NAME=PATH"),
        (["layer", "--baseline", "torch", "--baseline-python", "zentorch=x"], "not one of torch"),
        (["layer", "-p", "des-votes"], "unknown policy"),
        (["forward", "--shape", "tiny", "--layers", "1"], "must be 2 to 3"),
        (["forward", "--logits", "most"], "neither a number nor block"),
        (["forward", "--logits", "0"], "must be 1 to 32"),
        (["generate", "--layers", "2"], "--layers needs --shape"),
        (["generate", "--shape", "tiny", "--expert-dtype", "int8"], "--expert-dtype has no effect"),
        (["generate", "--shape", "tiny", "--dtype", "fp8"], "known: fp32, bf16, int8, int4"),
        (["generate", "--prompt", "a", "--num-prompts", "3"], "--num-prompts has no effect"),
        (["generate", "--model", "some/where"], "--model needs --prompt"),
        (["plot", "pyproject.toml"], "not a benchmark record"),
    ],
)
def test_a_refusal_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1


def test_the_command_alone_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench"]) == 0
    assert "generate" in capsys.readouterr().out


def test_another_record_has_no_figure(tmp_path: Path) -> None:
    path = write_record(tmp_path, make_record("embedded training", [], []))
    with pytest.raises(CoterieError, match="'embedded training' has no figure; known: bench layer"):
        plot_record(path)


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
