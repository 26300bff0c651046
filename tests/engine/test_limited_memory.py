"""An engine whose memory for experts is short, or imagined to be: what its results tell of it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

import coterie
from coterie.cli.entry import run
from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.errors import CoterieError
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.loading.saved_votes import SavedVotes
from coterie.offload.traffic import Traffic
from coterie.testing import write_checkpoint

ASKED = {"max_new_tokens": 24, "block": 8, "unmask": "fixed:steps=3"}
PREFERRING = "resident-vote:beta=0.3,resident_bonus=8,max_vote_loss=0.5"
PROMPTS = (list(range(5, 17)), [7, 7, 1], [3, 60, 4, 41])


@cache
def folder() -> Path:
    """16 experts in each of two layers."""
    return write_checkpoint(Path(mkdtemp()) / "whole", "llada2", dtype=torch.float32)


def engine(memory: str | None = "35%", *, compared: bool = True, **more: object) -> Engine:
    asked = None if memory is None else ExpertMemoryConfig.parse(memory, simulated=True, **more)
    own = coterie.load(folder(), dtype="float32", device="cpu", expert_memory=asked)
    if compared and (log := own.model.store.traffic_log) is not None:
        log.track_vanilla()
    return own


def traffic(result: Result) -> Traffic:
    assert result.traffic is not None
    return result.traffic


def test_resident_experts_have_no_traffic() -> None:
    own = engine(None)
    assert own.generate(PROMPTS[0], **ASKED).traffic is None
    own.reset_cache()


def test_result_reports_traffic() -> None:
    own, whole = engine(), engine(None)
    for prompt in PROMPTS:
        found, true = (one.generate(prompt, **ASKED) for one in (own, whole))
        assert found.tokens == true.tokens
        moved = traffic(found)
        assert moved.forwards == found.forwards
        assert moved.vanilla_misses == moved.experts_moved  # it is vanilla's
        assert 0 < moved.hits < moved.experts_used
        assert 0 < moved.seconds < found.seconds
    assert own.traffic() is not None
    log = own.model.store.traffic_log
    assert log is not None
    kinds = [line.kind for line in log.forwards]
    assert (kinds.count("prefill"), kinds.count("commit") > 0) == (1, True)
    blocks = [line.blocks for line in log.forwards if line.rows == (0,)]
    assert sorted(set(blocks)) == [(0,), (1,), (2,), (3,)]
    assert blocks == sorted(blocks)


def test_reset_cache_makes_traffic_reproducible() -> None:
    """Under a policy that prefers who is there, it does otherwise."""
    fresh = [engine().generate(prompt, policy=PREFERRING, **ASKED) for prompt in PROMPTS]
    for between in (True, False):
        own, found = engine(), []
        for prompt in PROMPTS:
            if between:
                own.reset_cache()
            found.append(own.generate(prompt, policy=PREFERRING, **ASKED))
        same = [
            one.tokens == other.tokens and traffic(one).transfers == traffic(other).transfers
            for one, other in zip(found, fresh, strict=True)
        ]
        assert all(same) == between


def test_cache_cannot_be_reset_during_a_request() -> None:
    own = engine()
    row = own.submit(PROMPTS[0], **ASKED)
    with pytest.raises(RuntimeError, match="active request"):
        own.reset_cache()
    own.cancel(row)
    own.reset_cache()


def test_traffic_covers_all_requests_that_share_forwards() -> None:
    own = engine()
    for prompt in PROMPTS[:2]:
        own.submit(prompt, **ASKED)
    found = []
    while own.rows:
        found += [event.result for event in own.step() if isinstance(event, coterie.Finished)]
    assert traffic(found[-1]) == own.traffic()
    assert traffic(found[0]).experts_moved <= traffic(found[1]).experts_moved


def test_reset_restores_the_warm_start() -> None:
    """Votes for the same six experts of each layer: they are there before anybody asks."""
    votes = torch.zeros(2, 16)
    votes[:, :6] = 1.0
    layers = engine(None).model.spec.moe_layers
    warm = SavedVotes.of("tiny", layers, votes.double().numpy())
    own = engine("6", warm_start=warm)
    for _ in range(2):
        log = own.model.store.traffic_log
        assert log is not None
        assert not any(
            line.traffic.experts_moved > line.traffic.experts_used for line in log.forwards
        )
        here = own.model.transformer.layers[layers[0]].feed_forward.store.resident(layers[0])
        assert here.tolist() == [True] * 6 + [False] * 10
        own.generate(PROMPTS[0], **ASKED)
        own.reset_cache()
    found = traffic(own.generate(PROMPTS[0], **ASKED))
    assert found.vanilla_misses == found.experts_moved


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (ExpertMemoryConfig.parse("auto", simulated=True), "auto` has no effect"),
        (
            ExpertMemoryConfig.parse("35%", host_memory="1GiB", simulated=True),
            "`host_memory` has no effect",
        ),
        (ExpertMemoryConfig.parse("1%", simulated=True), "less than one expert"),
    ],
)
def test_invalid_simulated_memory_raises(asked: ExpertMemoryConfig, told: str) -> None:
    with pytest.raises(CoterieError, match=told):
        coterie.load(folder(), expert_memory=asked)


Capture = pytest.CaptureFixture[str]
WORDS = [
    "5 17 33 9",
    "-m",
    str(folder()),
    "-n",
    "16",
    "--block",
    "8",
    "--simulate-expert-memory",
    "35%",
]


def told(words: list[str], capsys: Capture) -> dict:
    assert run([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_compare_resets_the_cache_for_each_policy(capsys: Capture) -> None:
    """So that it moves what it moves alone."""
    policies = ["-p", "des-vote:beta=0.3", "-p", PREFERRING]
    runs = told(["compare", *WORDS, *policies], capsys)["runs"]
    for one in runs:
        alone = told(["generate", *WORDS, "-p", one["policy"]], capsys)
        assert alone["text"] == one["text"]
        for figure in ("experts_moved", "hit_rate", "bytes_moved_from", "saved_against_vanilla"):
            assert alone["expert_traffic"][figure] == one["expert_traffic"][figure]
    assert runs[0]["expert_traffic"]["saved_against_vanilla"] == 0
    assert runs[0]["expert_traffic"]["slots"] == 5
    own = [one["expert_traffic"]["bytes_moved"] for one in runs]
    assert [one["saved"] for one in runs] == [None, *(1 - moved / own[0] for moved in own[1:])]
    assert {one["expert_traffic"]["stalled"] for one in runs} == {None}  # nobody waits for a book
    assert runs[2]["expert_traffic"]["hit_rate"] > runs[1]["expert_traffic"]["hit_rate"]


def test_compare_reports_traffic(capsys: Capture) -> None:
    assert run(["compare", *WORDS, "-p", "des-vote:beta=0.3"]) == 0
    said = capsys.readouterr()
    assert "5 of 16 experts per layer in memory" in said.err
    assert "simulated" in said.err
    header, vanilla, other = (line.split() for line in said.out.splitlines()[:3])
    assert header[-3:] == ["moved", "bytes", "saved"]
    assert (other[-1][-1], vanilla[-1]) == ("%", "KiB")
    assert run(["compare", *WORDS[:-2], "-p", "des-vote:beta=0.3"]) == 0
    assert "saved" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--expert-memory", "5"], "--simulate-expert-memory replaces --expert-memory"),
        (["--host-memory", "1GiB"], "has no effect"),
        (["--fallback-model", "elsewhere"], "has no effect"),
    ],
)
def test_options_without_effect_raise(typed: list[str], said: str, capsys: Capture) -> None:
    assert run(["generate", *WORDS, *typed]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert said in told.err


def test_traffic_of_every_forward_is_plotted(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    asked = [
        *WORDS,
        "-p",
        "uniform-vote:beta=0.3",
        "--unmask",
        "fixed:steps=3",
        "--coreset-reuse",
        "0.2",
    ]
    found = told(["generate", *asked, "--plot-traffic", str(tmp_path / "moved")], capsys)
    for dress in ("light", "dark"):
        drawn = (tmp_path / f"moved-{dress}.svg").read_text()
        for said in ("simulated copies", "vanilla with LRU", "without a cache", "block 0"):
            assert said in drawn
    forwards = json.loads((tmp_path / "moved.json").read_text())["forwards"]
    moved = found["expert_traffic"]
    assert (
        sum(one["bytes_moved_from"].get("imagined", 0) for one in forwards)
        == (moved["bytes_moved"])
    )
    avoided = sum(one["bytes_of_vanilla"] for one in forwards) - moved["bytes_moved"]
    assert avoided == moved["bytes_avoided_against_vanilla"]
    decoding = [one for one in forwards if one["kind"] == "decode"]
    assert len(decoding) == found["forwards"] < len(forwards)
    assert len(forwards) == found["forwards"] + found["prefills"] + found["commits"]
    kept = [one["vote_mass_kept"] for one in decoding]
    assert sum(kept) / len(kept) == pytest.approx(found["vote_mass_kept"], abs=0.05)
    steps = [one["drift"] is None for one in decoding]
    assert steps == [place % 3 == 0 for place in range(len(steps))]  # a block's first elects anew
    assert {one["vote_mass_kept"] for one in forwards if one not in decoding} == {None}


def test_no_plot_without_traffic(tmp_path: Path, capsys: Capture) -> None:
    for words, said in (
        (
            [*WORDS[:-2], "--plot-traffic", str(tmp_path / "moved")],
            "--simulate-expert-memory 35% simulate",
        ),
        ([*WORDS, "--plot-traffic", str(tmp_path / "no" / "moved")], "its folder does not exist"),
    ):
        assert run(["generate", *words]) == 2
        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1)
        assert said in told.err
