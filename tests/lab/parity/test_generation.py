"""Published generations, id by id and forward by forward; and references damaged on purpose."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_data import golden, golden_sets

from coterie.decoding.kv_schemes import DualCache, StepCounter, Unroll, parse_kv_scheme
from coterie.decoding.refinements import parse_unmask
from coterie.errors import CoterieError
from coterie.lab.parity import __main__ as parity
from coterie.lab.parity.generation import OUTPUT_IDS, generate_run, generation_results
from coterie.lab.parity.published import LOOP_BUILDERS, make_loop
from coterie.lab.parity.recorded import ReferenceParameters
from coterie.loading.load import load_model

Meta = dict
Held = dict[str, np.ndarray]


FEW = {  # some generations of each published loop: the shorter ones
    "llada2": ("thr50", "steps4", "eos_early_stop"),
    "llada21": ("off_default", "bc_eosstop"),
    "lladamoe": (
        *("llada_s8_b8", "llada_batch2", "fastdllm_dual_t50", "dinfer_credit_nocache"),
        *("dinfer_threshold_itersmooth_vicinity", "dinfer_hierarchy_dual"),
    ),
    "sdar_moe": ("dyn50_b8", "dyn50_b16_s4", "static_stop"),
}


@pytest.mark.parametrize("family", FEW)
def test_published_generations_come_out_the_same(damaged, family: str) -> None:
    assert_same(damaged(lambda meta, held: None, family, *FEW[family]))


@pytest.mark.slow
@pytest.mark.parametrize("name", golden_sets())
def test_every_published_generation_comes_out_the_same(name: str) -> None:
    assert_same(golden(*name.split("/")))


def assert_same(folder: Path) -> None:
    verdicts = generation_results(folder)
    assert {v.name: v.problems for v in verdicts if not v.passed} == {}
    judged = [v for v in verdicts if not v.excuse]
    assert len(judged) >= len(verdicts) / 2


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a small set, whole or with some generations, after ``harm`` changed it."""

    def make(harm: Callable[[Meta, Held], None], family: str = "sdar_moe", *only: str) -> Path:
        folder = golden(family, "a")
        for file in folder.iterdir():
            shutil.copyfile(file, tmp_path / file.name)
        meta = json.loads((folder / "meta.json").read_text())
        with np.load(folder / "reference.npz") as archive:
            held = {name: archive[name].copy() for name in archive.files}
        if only:
            keep_generations(meta, held, only)
        harm(meta, held)
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        np.savez(tmp_path / "reference.npz", **held)
        return tmp_path

    return make


def keep_generations(meta: Meta, held: Held, tags: Sequence[str]) -> None:
    every = [one["tag"] for one in meta["generations"]]
    meta["generations"] = [one for one in meta["generations"] if one["tag"] in tags]
    for name in [name for name in held if name.startswith("gen_")]:
        # One tag may be a prefix of another.
        owner = max((tag for tag in every if name.startswith(f"gen_{tag}_")), key=len)
        if owner not in tags:
            held.pop(name)


def entry(meta: Meta) -> dict:
    return meta["generations"][0]


def drop(name: str) -> Callable[[Meta, Held], None]:
    return lambda meta, held: held.__delitem__(name)


def put(key: str, value: object) -> Callable[[Meta, Held], None]:
    return lambda meta, held: entry(meta).__setitem__(key, value)


def ask(key: str, value: object) -> Callable[[Meta, Held], None]:
    return lambda meta, held: entry(meta)["params"].__setitem__(key, value)


def change(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[Meta, Held], None]:
    return lambda meta, held: held.__setitem__(name, how(held[name]))


def other_id(array: np.ndarray) -> np.ndarray:
    array[-1] = (array[-1] + 1) % 500
    return array


OUT, PROMPT = "gen_static_b4_out", "gen_static_b4_prompt"
CALLS = "gen_static_b4_calls_len_pos_store"


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (ask("surprise", 1), "unknown parameter 'surprise'"),
        (ask("denoising_steps", 0), "0 denoising_steps in a block of 4"),
        (ask("denoising_steps", 5), "5 denoising_steps in a block of 4"),
        (ask("cfg_scale", 1.5), "cfg_scale is 1.5; supported: None or 0"),
        (ask("threshold", "high"), "threshold is 'high', not a number"),
        (ask("threshold", math.nan), "threshold is nan"),
        (ask("remasking", "random"), "remasking is 'random'; known: low_confidence"),
        (ask("stopping_criteria_idx", ["x"]), "not token ids"),
        (put("params", None), "params is missing"),
        (put("nfe", "39"), "nfe is '39', not a whole number"),
        (put("nfe", 40), "nfe is 40, but 39 calls are recorded"),
        (put("tag", 3), "without a tag"),
        (put("tag", "static_b5"), "gen_static_b5_prompt is missing"),
        (put("n_out", 3), "n_out is 3"),
        (put("mask_id", 7), "mask_id is 7; supported: 511"),
        (ask("mask_id", 7), "mask_id is 7; supported: 511"),
        (put("margins", {"argmax": -1.0}), "argmax is -1.0, not a margin"),
        (put("margins", {"argmax": math.nan}), "argmax is nan, not a margin"),
        (put("margins", [1e-7]), "not an object"),
        (put("route_margin", 1e-7), "margin 1.0e-07 is below the set's worst"),
        (put("route_margin", "1e-7"), "route_margin is '1e-7', not a margin"),
        (change("eos_id", lambda x: x - 1), r"eos_id is 507"),
        (change(OUT, lambda x: x[None]), "prompt and out have different numbers of axes"),
        (drop(OUT), f"{OUT} is missing"),
        (drop(PROMPT), f"{PROMPT} is missing"),
        (drop(CALLS), f"{CALLS} is missing"),
        (change(OUT, lambda x: x.astype(np.float32)), f"{OUT} is float32"),
        (change(OUT, lambda x: x[None, None]), f"{OUT} has shape"),
        (change(OUT, lambda x: x[:0]), f"{OUT} has shape"),
        (change(CALLS, lambda x: x[:, :2]), CALLS),
        (change(PROMPT, lambda x: x + 600), "not a token id below 512"),
        (lambda meta, held: meta.pop("generations"), "lists no generations"),
        (lambda meta, held: meta["generations"].clear(), "lists no generations"),
        (lambda meta, held: meta["generations"].pop(), "belongs to no generation"),
        (lambda meta, held: held.update(gen_static_b4_twin_out=held[OUT]), "to no generation"),
        (lambda meta, held: meta.update(family="llada2"), "logits_fullattn is missing"),
        (lambda meta, held: meta["generations"].append(entry(meta)), "lists a generation twice"),
        (lambda meta, held: meta.__setitem__("family", "gpt"), "family is 'gpt'; known: "),
    ],
)
def test_damaged_reference_raises(damaged, harm, told: str) -> None:
    with pytest.raises(CoterieError, match=told):
        generation_results(damaged(harm))


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (change(OUT, other_id), "ids of row 0 differ from 39 on"),
        (change(OUT, lambda x: x[:-1]), "another length"),
        (change(CALLS, lambda x: np.where(x == 12, 8, x)), "has another input"),
        (change(CALLS, lambda x: x + np.eye(*x.shape, dtype=int)), "forward 0 has another input"),
        (change(PROMPT, other_id), "ids of row 0 differ"),
        (ask("threshold", 0.2), "forwards, not 30"),
        (ask("denoising_steps", 3), "forwards, not 30"),
    ],
)
def test_other_reference_fails(damaged, harm, problem: str) -> None:
    def harm_lengths_too(meta: Meta, held: Held) -> None:
        harm(meta, held)
        entry(meta).pop("n_out", None)

    (verdict, *_) = generation_results(damaged(harm_lengths_too, "sdar_moe", "static_b4"))
    assert verdict.name == "static_b4 [block-causal]"
    assert not verdict.passed
    assert any(problem in line for line in verdict.problems), verdict.problems


def test_unused_entries_are_ignored(damaged) -> None:
    def add(meta: Meta, held: Held) -> None:
        meta["note"] = entry(meta)["note"] = "made on a Tuesday"
        entry(meta)["params"] |= {"cfg_scale": 0.0, "threshold": 1.5}
        held["gen_static_b4_trace_confidence"] = held["weights"] = np.zeros(3)

    results = generation_results(damaged(add, "sdar_moe", "static_b4"))
    assert all(verdict.passed for verdict in results)


def test_only_known_errors_are_excused_by_their_tag(damaged) -> None:
    def disguise(meta: Meta, held: Held) -> None:
        for part in ("prompt", "out", "calls_len_pos_store"):
            held[f"gen_off_b4_{part}"] = held.pop(f"gen_static_b4_{part}")
        entry(meta)["tag"] = "off_b4"
        held["gen_off_b4_out"] = other_id(held["gen_off_b4_out"])

    assert not generation_results(damaged(disguise, "sdar_moe", "static_b4"))[0].passed


def test_missing_calls_fail(damaged) -> None:
    def shorten(meta: Meta, held: Held) -> None:
        entry(meta)["calls"].pop()

    (verdict,) = generation_results(damaged(shorten, "lladamoe", "llada_s8_b8"))
    assert verdict.problems == ("forward 7 has another input",)


def test_stop_may_exceed_the_requested_length() -> None:
    values = {"gen_length": 2, "block_length": 16, "steps": 16, "threshold": 0.5}
    stated = ReferenceParameters("here", values | {"eos_early_stop": True})
    loop = make_loop("LLaDA2.0", stated, mask_id=511, eos_id=223)
    model = load_model(golden("llada2", "a"), dtype=torch.float32, device="cpu")
    model = replace(model, mask_id=511, eos_ids=loop.stop_ids)
    for way in loop.configs:
        (row,) = generate_run(model, way, [[5, 17, 33, 40]]).sequences
        # The published loop cuts at the stop, wherever it is, and keeps the prompt.
        assert OUTPUT_IDS["llada2"](row, loop, True) == [5, 17, 33, 40, 249, 249, 223]


def test_command_fails_if_a_set_fails(damaged, capsys: pytest.CaptureFixture[str]) -> None:
    whole, broken = (
        golden("sdar_moe", "a2"),
        damaged(change(OUT, other_id), "sdar_moe", "static_b4"),
    )
    assert parity.main([str(whole), str(broken), str(broken / "none")]) == 1
    told = capsys.readouterr().out
    assert "FAILED   static_b4" in told
    assert "DAMAGED" in told
    assert told.endswith("1 of 3 sets agree\n")
    assert parity.main(["--device=cpu", str(broken / "none")]) == 1
    for arguments in ([], ["--device=abacus", str(whole)]):
        with pytest.raises(SystemExit) as stopped:
            parity.main(arguments)
        assert stopped.value.code == 2
    assert "unknown device 'abacus'" in capsys.readouterr().err


DINFER = {
    "decoder": "credit",
    "runner": "itersmooth_vicinity",
    "gen_length": 64,
    "block_length": 32,
    "start_block_align": True,
    "maximum_unroll": 4,
    "expected_tpf": 8,
    "threshold": 0.8,
    "low_threshold": 0.3,
    "prefix_look": 16,
    "after_look": 8,
    "warmup_steps": 4,
    "cont_weight": 0.4,
    "cont_weight_init": 0.2,
    "cont_weight_growth": 0.01,
    "threshold_decay": 0.05,
    "credit": {"alpha": 0.6, "gamma": 0.1, "beta": 0.7},
}


def test_every_parameter_of_dinfer_is_used() -> None:
    loop = make_loop(
        "inclusionAI/dInfer@fce4e32", ReferenceParameters("here", DINFER), mask_id=511, eos_id=508
    )
    (generation,) = loop.configs
    kv_scheme, unmask = parse_kv_scheme(generation.kv_cache), parse_unmask(generation.unmask)
    assert kv_scheme.base == DualCache(before=16, after=8, warmup=4, aligned=True)
    assert kv_scheme.unroll == Unroll(4, 8)
    assert str(unmask) == (
        "threshold:p=0.8+credit:alpha=0.6,gamma=0.1,beta=0.7"
        "+smooth:weight=0.4,init=0.2,growth=0.01,decay=0.05"
    )
    assert (generation.block, generation.max_new_tokens) == (32, 64)


@pytest.mark.parametrize("name", [*DINFER, "unheard_of"])
def test_malformed_parameter_of_dinfer_raises(name: str) -> None:
    wrong = ReferenceParameters("here", DINFER | {name: ["x"]})
    with pytest.raises(CoterieError, match=name):
        make_loop("inclusionAI/dInfer@fce4e32", wrong, mask_id=511, eos_id=508)


@pytest.mark.parametrize(
    ("name", "stated", "spelled"),
    [("threshold", 7, "threshold:p=1+"), ("threshold", -1.0, "threshold:p=1e-30+")],
)
def test_threshold_is_clamped(name: str, stated: float, spelled: str) -> None:
    loop = make_loop(
        "inclusionAI/dInfer",
        ReferenceParameters("here", DINFER | {name: stated}),
        mask_id=511,
        eos_id=508,
    )
    assert loop.configs[0].unmask.startswith(spelled)


def test_dinfer_fills_after_a_stop_with_early_stop() -> None:
    for early in (True, False):
        values = DINFER | {"early_stop": early}
        loop = make_loop(
            "inclusionAI/dInfer", ReferenceParameters("here", values), mask_id=511, eos_id=508
        )
        assert loop.configs[0].early_stop == "block"
        assert loop.fills_after_stop == early


def test_llada_takes_every_step_of_its_schedule() -> None:
    values = {"steps": 24, "gen_length": 16, "block_length": 8, "remasking": "low_confidence"}
    loop = make_loop("ML-GSAI/LLaDA", ReferenceParameters("here", values), mask_id=511, eos_id=508)
    kv_scheme = parse_kv_scheme(loop.configs[0].kv_cache)
    block = kv_scheme.blocks(3, 16, 8)[0]
    assert kv_scheme.steps_until_check(block, 19, StepCounter(), num_masked=8) == 12
    with pytest.raises(CoterieError, match="do not divide evenly"):
        make_loop(
            "ML-GSAI/LLaDA",
            ReferenceParameters("here", values | {"steps": 25}),
            mask_id=1,
            eos_id=2,
        )
    with pytest.raises(CoterieError, match="remasking is 'random'"):
        make_loop(
            "ML-GSAI/LLaDA",
            ReferenceParameters("here", values | {"remasking": "random"}),
            mask_id=1,
            eos_id=2,
        )


def test_unknown_loop_raises() -> None:
    with pytest.raises(CoterieError, match="unknown loop"):
        make_loop("somebody/else", ReferenceParameters("here", {}), mask_id=1, eos_id=2)
    assert len(LOOP_BUILDERS) == 6
