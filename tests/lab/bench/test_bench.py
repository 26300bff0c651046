"""The bench: shapes, random models, peers that behave and peers that do not, records and plots.

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

FAKE = Path(__file__).parents[2] / "support" / "fake_baseline.py"
TINY = SHAPES["tiny"]


# Shapes


@pytest.mark.parametrize(
    ("name", "config"),
    [("llada2-mini", LLADA2_MINI), ("llada2-flash", LLADA2_FLASH), ("llada-moe", LLADA_MOE)],
)
def test_a_shape_is_what_the_released_config_says(name: str, config: dict) -> None:
    family, spec = read_spec(config)
    assert SHAPES[name].spec == spec
    assert SHAPES[name].family is family


def test_an_unknown_shape_names_those_that_are_known() -> None:
    with pytest.raises(CoterieError, match=r"unknown shape 'llada3'; known: llada2-mini, .*tiny"):
        find_shape("llada3")


def test_a_shape_is_cut_to_layers_that_route() -> None:
    assert TINY.truncate(2).spec.moe == (False, True)
    assert TINY.truncate(None) is TINY
    for layers in (0, 1, 4):
        with pytest.raises(CoterieError, match=f"`layers` is {layers} for Tiny; must be 2 to 3"):
            TINY.truncate(layers)


def test_routers_that_nobody_counted_are_as_skewed_as_minis() -> None:
    bend = find_skew(SHAPES["llada2-mini"].spec.router, SHAPES["llada2-mini"].unique_experts)
    assert find_skew(
        SHAPES["sdar-moe"].spec.router, SHAPES["sdar-moe"].unique_experts
    ) == pytest.approx(bend, abs=0.05)


# Random models


@pytest.mark.parametrize("experts", ["fp32", "bf16", "int8", "int4"])
def test_a_random_models_experts_are_a_few_over_and_over(experts: str) -> None:
    draw = torch.Generator().manual_seed(3)
    spec = TINY.spec
    few = random_experts(spec, experts, draw, torch.device("cpu"))
    many = repeat_experts(few, 7)
    x = torch.randn(9, spec.hidden, generator=draw)
    x = x if experts == "fp32" else x.bfloat16()
    ids = torch.randint(0, 7, (9, 3), generator=draw)
    weights = torch.rand(9, 3, generator=draw)

    def routing(ids: torch.Tensor, count: int) -> Routing:
        return Routing(ids, weights, expert_mask(ids.flatten(), count), ids)

    y = run_experts(x, routing(ids, 7), many)
    assert torch.allclose(y, run_experts(x, routing(ids % 2, 2), few), rtol=1e-5, atol=1e-7)
    assert float(y.abs().mean()) > 0


def test_each_copy_of_an_expert_is_in_memory_of_its_own() -> None:
    few = random_experts(TINY.spec, "bf16", torch.Generator(), torch.device("cpu"))
    many = repeat_experts(few, 32)
    whole = many.gate_up.packed if isinstance(many.gate_up, PackedExperts) else many.gate_up
    assert len(whole) == 32
    assert whole.stride(0) == whole[0].numel()


@pytest.mark.parametrize("name", ["tiny", "llada-moe"])
def test_gates_are_bent_until_a_block_uses_as_many_experts_as_the_model_does(name: str) -> None:
    shape = SHAPES[name]
    if name != "tiny":
        few = {"heads": 2, "kv_heads": 2, "head_dim": 16, "rotary_dim": 8}
        small = {"vocabulary": 512, "hidden": 256, "expert_width": 16, **few}
        shape = replace(shape, spec=replace(shape.spec, **small)).truncate(4)
    model = random_model(shape, "bf16")
    counting, draw = ExpertCounter(), torch.Generator().manual_seed(1)
    for number in range(6):
        ids = torch.randint(0, model.mask_id, (1, 32), generator=draw)
        counting.on_forward((number,))
        span = torch.tensor([32])
        step = ForwardContext(Window(span * 0, 32, span), None, Vanilla(), counting)
        model.transformer(ids, step)
    seen = sum(counting.counts(number).mean for number in range(6)) / 6
    assert seen == pytest.approx(shape.unique_experts, rel=0.12)


def test_a_random_model_is_the_same_for_the_same_seed_and_generates() -> None:
    first, again, other = (random_model(TINY, "int8", layers=2, seed=s) for s in (1, 1, 2))
    options = GenerationConfig.for_family(TINY.family.defaults).replace(max_new_tokens=8, block=8)
    texts = [
        Engine(m, generation=options).generate("5 17 33").tokens for m in (first, again, other)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_model_that_does_not_fit_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.lab.bench.model.free_memory", lambda _device: 1 << 10)
    with pytest.raises(CoterieError, match="GiB are free; reduce `layers`"):
        random_model(TINY)


# One layer, and peers


def asked(dtype: str = "bf16", **others: object) -> BenchConfig:
    return BenchConfig(
        TINY, dtype, ("vanilla", "des-vote:beta=0.25"), tokens=9, repeats=2, **others
    )


def fake(mood: str, *, named: bool = False) -> ResolvedBaseline:
    """A peer of these tests. Its name is its mood."""
    peer = Baseline(mood, ("graze",), ("fp32", "bf16"), script=str(FAKE))
    return ResolvedBaseline(peer, Path(sys.executable), named)


def test_ours_and_the_read_take_their_turns_and_count_their_bytes() -> None:
    found = time_layer(asked("int8"), [], budget=0)
    slab = make_slab(TINY.layer, asked("int8"))
    whole = sum(each.nbytes for each in weight_buffers([slab.gate_up, slab.down]))
    for line in found.timings:
        assert {work: len(taken) for work, taken in line.samples.items()} == {"ours": 2, "read": 2}
        assert line.bytes == pytest.approx(line.experts * whole / 32)
    assert found.timings[1].experts == 8
    assert found.timings[0].experts > 8


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_torch_computes_what_we_do_in_a_process_of_its_own(dtype: str) -> None:
    who, skipped = resolve_baselines(["torch"], {"torch": Path(sys.executable)}, dtype)
    found = time_layer(asked(dtype), who, budget=0)
    assert skipped == found.skipped == {}
    assert set(found.errors) == {"torch loop", "torch grouped_mm"}
    assert all(0 <= error < MAX_RELATIVE_ERROR[dtype] for error in found.errors.values())
    assert found.versions["torch"]["torch"] == torch.__version__
    for line in found.timings:
        assert {len(taken) for taken in line.samples.values()} == {2}
        times = line.facts()["times_ours"]
        assert times["torch loop"] == line.ratio_to_ours("torch loop") > 0


def test_peers_take_turns_and_their_own_seconds_count() -> None:
    found = time_layer(asked(), [fake("grazes")], budget=0)
    assert found.sessions == [["grazes"]]
    assert found.versions == {"grazes": {"sheep": "1.0"}}
    assert found.errors["grazes graze"] < MAX_RELATIVE_ERROR["bf16"]
    assert [line.samples["grazes graze"] for line in found.timings] == [[0.25, 0.25]] * 2


@pytest.mark.parametrize(
    ("mood", "why"),
    [
        ("lies", "lies graze is wrong: relative error 50.0%"),
        ("shrinks", "shrinks graze is wrong: relative error inf%"),
        ("dies", "dies ended with status 3: out of sheep"),
        ("babbles", "babbles replied 'nonsense'"),
        ("fails", "fails: ImportError: no sheep"),
        ("hangs", "hangs did not reply in 0.3 s"),
    ],
)
def test_a_peer_that_fails_is_left_out_and_why_is_told(
    mood: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mood == "hangs":
        monkeypatch.setattr(
            interleaved, "BaselineProcess", partial(BaselineProcess, answer_timeout=0.3)
        )
    found = time_layer(asked(), [fake(mood)], budget=0)
    assert found.skipped[mood].startswith(why)
    assert all(set(line.samples) == {"ours", "read"} for line in found.timings)
    if mood == "dies":
        with pytest.raises(BaselineError, match=why):
            time_layer(asked(), [fake(mood, named=True)], budget=0)


def test_peers_sit_together_as_far_as_memory_holds_them() -> None:
    torch_, hf, zen, llama = (ResolvedBaseline(peer, Path(), False) for peer in BASELINES.values())
    assert group_by_memory([torch_, hf, zen, llama], 1.0, 3.0) == [[torch_, hf], [zen], [llama]]
    assert group_by_memory([torch_, hf, zen, llama], 1.0, 0.5) == [[torch_], [hf], [zen], [llama]]
    assert group_by_memory([torch_, hf, zen, llama], 1.0, 9.0) == [[torch_, hf, zen, llama]]
    assert group_by_memory([], 1.0, 9.0) == []


def test_a_slow_work_rests_once_it_has_had_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "MAX_SECONDS", 0.5)
    found = time_layer(replace(asked(), repeats=9), [fake("grazes")], budget=0)
    line = found.timings[0]
    assert (
        len(line.samples["grazes graze"])
        == len(line.paired_samples["grazes graze"])
        == interleaved.MIN_REPEATS
    )
    assert len(line.samples["ours"]) == 9


def test_a_peer_that_is_not_there_is_skipped_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    who, skipped = resolve_baselines([], {}, "bf16")
    assert [each.baseline.name for each in who] == ["torch"]
    assert set(skipped) == {"transformers", "zentorch", "llama.cpp"}
    with pytest.raises(CoterieError, match=r"zentorch: not installed; `scripts/peers zentorch`"):
        resolve_baselines(["zentorch"], {}, "bf16")
    with pytest.raises(CoterieError, match="torch: has no experts in int8; it has fp32, bf16"):
        resolve_baselines(["torch"], {}, "int8")
    with pytest.raises(CoterieError, match=r"unknown baseline 'onnx'; known: torch, .*llama.cpp"):
        resolve_baselines([], {"onnx": Path("python")}, "bf16")
    with pytest.raises(CoterieError, match="zentorch: nowhere is not executable"):
        resolve_baselines([], {"zentorch": Path("nowhere")}, "bf16")


def test_a_policy_that_takes_experts_away_is_timed_alone() -> None:
    naee = replace(asked(), policies=("naee:beta=0.6",))
    assert time_layer(naee, [], budget=0).timings[0].experts > 0
    with pytest.raises(CoterieError, match="no baseline supports"):
        time_layer(naee, [fake("grazes")], budget=0)


def test_llama_cpps_gates_choose_what_a_case_asks_for() -> None:
    cases = draw_cases(asked())
    work = worker.LayerWorkload(32, 4, 64, 32, "bf16", 1, 1)
    some = [
        worker.TimedCase(x.float().numpy(), routing.topk_ids.numpy(), routing.topk_weights.numpy())
        for x, routing in cases["vanilla"][:2]
    ]
    rows = llama.make_embeddings(work, 18)
    logits = rows @ llama.make_gate(rows, some, 32).T
    ids = np.concatenate([case.ids for case in some])
    weights = np.concatenate([case.weights for case in some])
    assert (np.sort(np.argsort(-logits)[:, :4]) == np.sort(ids)).all()
    shares = np.exp(np.take_along_axis(logits, ids, axis=1))
    expected = weights / weights.sum(axis=1, keepdims=True)
    assert np.allclose(shares / shares.sum(axis=1, keepdims=True), expected, atol=1e-3)


def test_llama_cpps_error_is_a_part_of_what_a_layer_adds() -> None:
    draw = np.random.default_rng(2)
    rows = llama.make_embeddings(worker.LayerWorkload(4, 2, 64, 8, "bf16", 1, 1), 12)
    added = draw.standard_normal(64).astype(np.float32) * 0.1
    x = rows[3] + added
    right = rows @ (x / np.sqrt((x**2).mean())) * (8 / 64)
    assert llama.relative_error(right + 5, rows, 3, added) < 1e-4
    without = rows @ rows[3] * (8 / 64)
    assert llama.relative_error(without, rows, 3, added) == pytest.approx(1, abs=1e-4)


# Whole forwards and answers


@pytest.mark.parametrize("experts", ["fp32", "bf16", "int4"])
def test_a_forward_needs_every_weight_once_and_of_the_experts_those_it_uses(experts: str) -> None:
    model = random_model(TINY, experts)
    blocks = random_blocks(model, 32, 33, 1)
    needs = forward_cost(model.transformer, blocks)
    assert int(blocks.window.start) == 64
    spec, dtype = model.spec, model.transformer.dtype
    all_of_them = {layer: torch.ones(32, dtype=torch.bool) for layer in spec.moe_layers}
    keys = needs.part_bytes["keys and values"]
    assert keys == 2 * spec.layers * spec.kv_heads * spec.head_dim * 96 * dtype.itemsize
    whole = needs.used_expert_bytes(all_of_them) + sum(needs.part_bytes.values()) - keys
    looked_up = spec.vocabulary * spec.hidden * dtype.itemsize
    assert whole == pytest.approx(weight_bytes(spec, dtype) - looked_up, rel=0.06)
    none = {layer: torch.zeros(32, dtype=torch.bool) for layer in spec.moe_layers}
    assert needs.used_expert_bytes(none) == 0


def test_forwards_are_timed_beside_their_reads() -> None:
    model = random_model(TINY, "int8")
    heard: list[float] = []
    found = time_forward(
        model,
        ["vanilla", "des-vote:beta=0.25"],
        repeats=3,
        context=40,
        on_progress=lambda share, _doing: heard.append(share),
    )
    lines = found.timings
    assert (
        [len(line.seconds) for line in lines]
        == [len(line.read_seconds) for line in lines]
        == [3, 3]
    )
    assert all(
        a >= b
        for line in lines
        for a, b in zip(line.roofline_seconds, line.read_seconds, strict=True)
    )
    assert lines[0].part_flops == lines[1].part_flops
    assert found.logit_counts == (32, 28, 24, 20, 16, 12, 8, 4)
    assert [len(taken) for taken in found.rates.values()] == [6, 6, 6]
    assert lines[1].experts == 8 < lines[0].experts
    assert lines[0].bytes > lines[1].bytes > sum(lines[1].part_bytes.values()) - 1
    assert heard[-1] == 1.0
    with pytest.raises(CoterieError, match="need 576 positions; the model has 512"):
        time_forward(model, ["vanilla"], context=543)


@pytest.mark.parametrize("experts", ["fp32", "bf16", "int8"])
def test_operations_are_two_for_every_number_and_token_that_meet(experts: str) -> None:
    model = random_model(TINY, experts)
    spec, transformer = model.spec, model.transformer
    needs = forward_cost(transformer, random_blocks(model, 32, 64, 1))
    flops = needs.flops_by_part(pairs=32 * 4 * 2, num_logits=5)
    assert set(flops) == {"experts", *needs.part_bytes}
    size = transformer.dtype.itemsize
    for part in ("attention", "shared", "dense"):
        assert flops[part] == 2 * 32 * needs.part_bytes[part] // size
    assert flops["router"] == 2 * 32 * needs.part_bytes["router"] // 4
    assert flops["head"] == 2 * 5 * spec.vocabulary * spec.hidden
    assert flops["experts"] == 2 * (32 * 4 * 2) * spec.expert_parameters
    assert flops["keys and values"] == 4 * 32 * 96 * spec.heads * spec.head_dim * spec.layers
    assert all(rate > 0 for rate in compute_probe(transformer, 32).measure_rates().values())


def test_a_floor_takes_of_every_part_what_takes_longer() -> None:
    found = roofline_seconds(
        {"experts": 60.0, "head": 20.0, "router": 10.0},
        {"experts": 100.0, "head": 90.0, "router": 8.0},
        bandwidth=10.0,
        rates={"experts": 50.0, "matrix": 30.0, "router": 4.0},
    )
    assert found == 6 + 3 + 2


def test_a_block_is_filled_evenly() -> None:
    assert logits_per_forward(7, 32) == (7,)
    assert logits_per_forward("block", 4) == (4, 3, 2, 1)
    assert logits_per_forward("block", 12) == (12, 11, 9, 8, 6, 5, 3, 2)
    with pytest.raises(CoterieError, match="`num_logits` is 33; must be 1 to 32"):
        logits_per_forward(33, 32)


def test_bytes_are_read_without_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.lab.bench.bandwidth.cpu.is_available", lambda: False)
    rows = readable_rows([torch.ones(3, 4, 5)])
    assert isinstance(rows[0], torch.Tensor)
    read_rows(rows, torch.tensor([True, False, True]))


def test_answers_are_timed_policy_beside_policy_vanilla_first() -> None:
    engine = Engine(
        random_model(TINY, "fp32"),
        generation=GenerationConfig.for_family(TINY.family.defaults).replace(early_stop="off"),
    )
    prompts = random_prompts(2, 5, 100)
    lines = time_generation(
        engine,
        prompts,
        ["des-vote:beta=0.25", "vanilla"],
        num_repeats=2,
        options={"max_new_tokens": 27},
    )
    assert [line.policy for line in lines] == ["vanilla", "des-vote:beta=0.25"]
    counted = lines[1].facts(lines[0])
    assert counted["new_tokens"] == 54
    assert counted["experts_mean"] <= 8
    assert counted["forwards_per_block"] == counted["forwards"] / 2
    assert lines[0].facts(lines[0])["texts_as_vanilla"] == 2
    assert len(lines[0].measure().samples) == 2


# The command, its records and their figures


def test_the_command_leaves_a_record_and_figures_drawn_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "layer", "--shape", "tiny", "--peer", "none", "--turns", "2", "--json"]
    assert run([*words, "-p", "vanilla", "-p", "des-vote:beta=0.25", "-o", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "bench-layer-tiny-bf16.json").read_text())
    assert said == kept
    assert [each["policy"] for each in kept["facts"]["policies"]] == [
        "vanilla",
        "des-vote:beta=0.25",
    ]
    chart = make_chart(kept)
    assert set(chart.rows) == {"read", "ours"}
    samples = {each["name"]: each["samples"] for each in kept["measures"]}
    assert chart.samples["ours", "vanilla"] == samples["vanilla ours"]
    drawn = tmp_path / "bench-layer-tiny-bf16-dark.svg"
    before = drawn.read_text()
    drawn.unlink()
    assert run(["bench", "plot", str(tmp_path / "bench-layer-tiny-bf16.json")]) == 0
    assert drawn.read_text() == before
    assert "des-vote:beta=0.25" in before


def test_forward_and_generate_leave_records_that_can_be_drawn(tmp_path: Path) -> None:
    usual = ["--shape", "tiny", "--turns", "1", "-o", str(tmp_path), "-p", "des-vote:beta=0.25"]
    assert run(["bench", "forward", *usual, "--layers", "2", "--context", "0"]) == 0
    assert run(["bench", "generate", *usual, "--prompts", "1", "--tokens", "8"]) == 0
    forward = json.loads((tmp_path / "bench-forward-tiny-int8-2-layers.json").read_text())
    assert set(make_chart(forward).rows) == {"read", "floor", "forward"}
    assert forward["facts"]["wanted"] == "block"
    generate = json.loads((tmp_path / "generate-random-tiny-cpu.json").read_text())
    assert make_chart(generate).rows == ["vanilla", "des-vote:beta=0.25"]
    assert len(list(tmp_path.glob("*.svg"))) == 4


def test_other_sizes_leave_records_of_other_names(tmp_path: Path) -> None:
    usual = ["--shape", "tiny", "--turns", "1", "-o", str(tmp_path), "-p", "vanilla"]
    assert run(["bench", "layer", *usual, "--peer", "none", "--tokens", "8"]) == 0
    assert run(["bench", "forward", *usual, "--tokens", "8", "--context", "0"]) == 0
    few = [*usual, "--prompts", "1", "--tokens", "8"]
    assert run(["bench", "generate", *few, "--dtype", "int8", "--layers", "2"]) == 0
    assert run(["bench", "generate", *few, "--dtype", "bf16"]) == 0
    assert {path.stem for path in tmp_path.glob("*.json")} == {
        "bench-layer-tiny-bf16-8-tokens",
        "bench-forward-tiny-int8-8-tokens",
        "generate-random-tiny-cpu-int8-2-layers",
        "generate-random-tiny-cpu",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["layer", "--shape", "llada3"], "unknown shape 'llada3'"),
        (["layer", "--peer", "none", "--peer", "torch"], "--peer none leaves no peer"),
        (["layer", "--peer", "none", "--slow"], "--slow has no effect with --peer none"),
        (["layer", "--peer", "none", "--memory", "2"], "--memory has no effect with --peer none"),
        (["layer", "--peer-python", "zentorch"], "not NAME=PATH"),
        (["layer", "--peer", "torch", "--peer-python", "zentorch=x"], "not among --peer torch"),
        (["layer", "-p", "des-votes"], "unknown policy"),
        (["forward", "--shape", "tiny", "--layers", "1"], "must be 2 to 3"),
        (["forward", "--wanted", "most"], "neither a number nor block"),
        (["forward", "--wanted", "0"], "must be 1 to 32"),
        (["generate", "--layers", "2"], "--layers needs --shape"),
        (["generate", "--shape", "tiny", "--experts", "int8"], "--experts has no effect"),
        (["generate", "--shape", "tiny", "--dtype", "fp8"], "known: fp32, bf16, int8, int4"),
        (["generate", "--prompt", "a", "--prompts", "3"], "--prompts has no effect"),
        (["generate", "--model", "some/where"], "--model needs --prompt"),
        (["plot", "pyproject.toml"], "not a benchmark record"),
    ],
)
def test_what_cannot_be_timed_is_said_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_the_command_alone_tells_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench"]) == 0
    assert "generate" in capsys.readouterr().out


def test_a_record_of_something_else_has_no_figure(tmp_path: Path) -> None:
    path = write_record(tmp_path, make_record("embedded training", [], []))
    with pytest.raises(CoterieError, match="'embedded training' has no figure; known: bench layer"):
        plot_record(path)


def test_a_peer_that_was_left_out_leaves_nothing_but_the_reason() -> None:
    found = time_layer(asked(), [fake("dies"), fake("grazes")], budget=9e9)
    assert set(found.skipped) == {"dies"}
    assert found.sessions == [["grazes"]]
    assert set(found.versions) == {"grazes"}
    assert set(found.errors) == {"grazes graze"}


def test_each_shape_is_timed_at_the_papers_sizes() -> None:
    assert SHAPES["llada2-mini"].policies == ("vanilla", "des-vote:beta=0.15", "des-vote:beta=0.1")
    assert SHAPES["llada-moe"].policies == ("vanilla", "des-vote:beta=0.6", "des-vote:beta=0.4")
