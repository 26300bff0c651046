"""Replays: what is counted is what happened, what is predicted follows from it as told."""

from __future__ import annotations

import csv
import io
import json
from collections import OrderedDict
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from test_observation import PROMPTS, engine
from test_trace import made as traced

from coterie.cli.entry import run
from coterie.engine.events import Result
from coterie.errors import CoterieError
from coterie.lab.planner.synthetic_trace import RoutingLaw, SyntheticShape, synthetic_trace
from coterie.lab.replay.cache_simulation import (
    CacheConfig,
    ReplayPolicy,
    TraceVotes,
    replay_cache,
    select_experts,
)
from coterie.lab.replay.hardware_model import (
    HardwareModel,
    expert_sizes,
    hardware_models,
    parse_bandwidth,
    parse_bytes,
    predict_seconds,
)
from coterie.lab.replay.recorder import bias_of, record_trace, trace_header
from coterie.lab.replay.replay import (
    EVICTION_NAMES,
    ReplayGrid,
    ReplayResult,
    cosine,
    decoding_only,
    jaccard,
    measure_overlap,
    replay,
    steps_per_block,
)
from coterie.lab.replay.trace import Trace
from coterie.lab.replay.trace_file import TraceWriter, read_trace
from coterie.loading.saved_votes import SavedVotes, write_votes
from coterie.model.moe import MoE
from coterie.offload.capacity import Capacity
from coterie.offload.eviction import Lru
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.simulated_store import CacheSimulator, SimulatedCacheStore
from coterie.offload.traffic import Traffic, Transfer
from coterie.routing import parse_policy
from coterie.routing.reuse import reuse_masks

Capture = pytest.CaptureFixture[str]
SHAPE = SyntheticShape(layers=2, experts=24, k=3, tokens=6, steps=4, expert_bytes=(("bf16", 100),))
LAW = RoutingLaw(expert_variance=0.2, block_variance=0.3, step_correlation=0.9)
LINK = {"1KB/s": HardwareModel(1000.0)}


@cache
def drawn(seed: int = 0) -> Trace:
    return synthetic_trace(SHAPE, LAW, blocks=5, seed=seed)


def play(text: str, drift: float | None = None) -> ReplayPolicy:
    return ReplayPolicy(parse_policy(text), drift)


def grid(
    *plays: ReplayPolicy, caches: str = "lru", capacity: str = "50%", **more: object
) -> ReplayGrid:
    usual = {"expert_bytes": {"bf16": 100}, "links": LINK}
    capacities = [Capacity.parse(text) for text in capacity.split(",")]
    return ReplayGrid(plays, caches.split(","), capacities, **{**usual, **more})  # type: ignore[arg-type]


@given(st.integers(0, 2**20), st.sampled_from(("vanilla", "des-vote:beta=0.2", "des-seq:k=1")))
@law(10)
def test_loads_are_those_of_a_cache_written_out(seed: int, policy: str) -> None:
    """Least recently used, in plain Python, where every forward fits."""
    trace = synthetic_trace(SHAPE, LAW, blocks=3, seed=seed)
    memory = TraceVotes.of(trace)
    chosen = select_experts(memory, play(policy))
    booked = replay_cache(memory, play(policy), chosen, CacheConfig(Lru(), 20))
    for layer in range(SHAPE.layers):
        here: OrderedDict[int, None] = OrderedDict()
        for number in range(len(trace.forwards)):
            used = np.flatnonzero(chosen.used[number, layer]).tolist()
            misses = [expert for expert in used if expert not in here]
            for expert in reversed(used):  # of equals the higher index leaves first
                here.pop(expert, None)
                here[expert] = None
            while len(here) > 20:
                here.popitem(last=False)
            assert booked.loads[number, layer] == len(misses)
            assert booked.used[number, layer] == len(used)


def test_rows_of_one_forward_share_what_is_moved() -> None:
    """Two rows at a time: a forward moves what either needs, once."""
    trace, seen = traced()
    memory = TraceVotes.of(trace)
    assert max(len(places) for places in memory.passes) > 1
    booked = replay_cache(
        memory, play("vanilla"), select_experts(memory, play("vanilla")), CacheConfig(Lru(), 16)
    )
    layers = len(trace.header.layers)
    used = [int(one.routing.used.sum()) for one in seen]
    assert booked.used.flatten().tolist() == used
    everybody = np.logical_or.reduce(np.stack([one.routing.used.numpy() for one in seen[::layers]]))
    assert booked.loads[:, 0].sum() == everybody.sum()


@pytest.mark.parametrize("policy", ["des-seq:k=2", "topk:k=2", "uniform-vote:beta=0.5"])
def test_a_run_is_foretold_from_its_own_trace(policy: str) -> None:
    """Traced under itself, an exact policy uses what was used, and a coreset little beside."""
    trace, _ = traced("llada2", policy)
    chosen = select_experts(TraceVotes.of(trace), play(policy)).used
    true = np.stack([forward.used for forward in trace.forwards])
    assert not (true & ~chosen).any() if policy != "topk:k=2" else (true == chosen).all()
    assert chosen.sum() <= 1.1 * true.sum()


def test_belady_moves_least_and_room_for_all_moves_each_once() -> None:
    trace = drawn()
    plays = [play("vanilla"), play("des-vote:beta=0.25")]
    made = replay(trace, grid(*plays, caches=",".join(EVICTION_NAMES), capacity="10%,30%,60%,100%"))
    points = {
        (str(p.case.replay_policy), p.case.eviction, p.slots): p.traffic.experts_moved
        for p in made.points
    }
    for (name, _, slots), moved in points.items():
        assert moved >= points[name, "belady", slots]
    used = np.stack([forward.vanilla_mask for forward in trace.forwards]).any(0).sum()
    assert {points["vanilla", cache, 24] for cache in EVICTION_NAMES} == {used}


def test_residency_without_loss_keeps_the_votes_and_moves_less() -> None:
    plays = [play("des-vote:beta=0.25")]
    plays.append(play("resident-vote:beta=0.25,resident_bonus=4,max_vote_loss=0"))
    plays.append(play("resident-vote:beta=0.25,resident_bonus=4,max_vote_loss=0.1"))
    plain, same, free = replay(drawn(), grid(*plays, capacity="9")).points
    assert same.vote_share == pytest.approx(plain.vote_share, abs=1e-4)
    assert free.traffic.experts_moved < plain.traffic.experts_moved
    assert plain.vote_share * 0.9 <= free.vote_share < plain.vote_share


@given(st.integers(0, 2**32), st.floats(0, 1))
@law()
def test_a_coreset_stays_until_it_has_lost_its_votes(seed: int, drift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, fresh = torch.rand(2, 5, 9, generator=generator) < 0.4
    votes = torch.randint(0, 9, (5, 9), generator=generator)
    used = reuse_masks(before, fresh, votes, reuse_tolerance=drift)
    for row in range(5):
        held, best = (int((votes[row] * mask[row]).sum()) for mask in (before, fresh))
        expected = before if held >= (1 - drift) * best else fresh
        assert torch.equal(used[row], expected[row])


def test_drift_ranges_from_always_to_never() -> None:
    trace, policy = drawn(), "des-vote:beta=0.25"
    memory = TraceVotes.of(trace)
    fresh, never, bound = (select_experts(memory, play(policy, d)) for d in (None, 1.0, 0.1))
    first = {
        forward.block_start: place for place, forward in reversed([*enumerate(trace.forwards)])
    }
    for place, forward in enumerate(trace.forwards):
        assert np.array_equal(never.used[place], fresh.used[first[forward.block_start]])
    assert never.reused == never.reusable == 2 * 5 * 3 > bound.reused > 0
    for place, votes in enumerate(memory.votes):
        held, best = ((votes * chosen.used[place]).sum(-1) for chosen in (bound, fresh))
        assert (held >= 0.9 * best - 1e-9).all()
    both = replay(trace, grid(play(policy), play(policy, 0.1), capacity="8"))
    assert both.points[1].traffic.experts_moved < both.points[0].traffic.experts_moved
    assert both.points[1].coresets_reused == bound.reused / bound.reusable
    assert both.points[0].coresets_reused is None


def test_drift_and_residency_go_together() -> None:
    one = replay(drawn(), grid(play("resident-vote:beta=0.25", 0.05), capacity="8")).points[0]
    other = replay(drawn(), grid(play("resident-vote:beta=0.25"), capacity="8")).points[0]
    assert one.traffic.experts_moved < other.traffic.experts_moved
    assert one.coresets_reused is not None


def test_a_warm_start_saves_the_first_loads() -> None:
    votes = TraceVotes.of(drawn(1)).mean_votes
    cold = replay(drawn(1), grid(play("vanilla"), capacity="100%")).points[0].traffic
    warm = replay(drawn(1), grid(play("vanilla"), capacity="100%", warm=votes)).points[0].traffic
    assert (cold.experts_moved > 0, warm.experts_moved) == (True, 0)


def predicted(hardware: HardwareModel, used: np.ndarray, loads: np.ndarray) -> tuple[float, float]:
    """Seconds of all forwards, and those that stall; an expert has 100 bytes."""
    seconds, stalls = predict_seconds(hardware, used, loads, 100)
    return float(seconds.sum()), float(stalls.sum())


def test_the_clock_by_hand() -> None:
    """Two layers: 6 hits and 2 misses, then 1 hit and 4 misses; 100 bytes each."""
    used, loads = np.array([[8, 5]]), np.array([[2, 4]])
    alone = predicted(HardwareModel(link_bandwidth=1000.0), used, loads)
    assert alone == pytest.approx((0.6, 0.6))
    whole = predicted(HardwareModel(1000.0, 2000.0, other_seconds=0.5), used, loads)
    # Hits take .3 and .05 s, copies .2 and .4 s, what was copied .1 and .2 s.
    assert whole == pytest.approx((0.5 + 0.3 + 0.1 + 0.4 + 0.2, 0.35))
    bare = predicted(HardwareModel(1000.0, 2000.0, overlap=0.0), used, loads)
    assert bare == pytest.approx((0.3 + 0.2 + 0.1 + 0.05 + 0.4 + 0.2, 0.6))
    half = predicted(HardwareModel(1000.0, 2000.0, overlap=0.5), used, loads)
    assert half == pytest.approx((0.4 + 0.1 + 0.425 + 0.2, 0.1 + 0.375))
    late = predicted(HardwareModel(1000.0, 2000.0, transfer_latency=0.2), used, loads)
    assert late == pytest.approx((0.4 + 0.1 + 0.6 + 0.2, 0.1 + 0.55))
    none = predicted(HardwareModel(1000.0, transfer_latency=0.2), used, 0 * loads)
    assert none == (0, 0)


def test_a_forward_that_decodes_carries_those_that_only_write_keys() -> None:
    trace = drawn(1)
    kinds = ["decode" if index % 3 else "commit" for index in range(len(trace.forwards))]
    forwards = zip(trace.forwards, kinds, strict=True)
    mixed = replace(trace, forwards=tuple(replace(each, kind=kind) for each, kind in forwards))
    one, other = (replay(each, grid(play("vanilla"))).points[0] for each in (trace, mixed))
    share = kinds.count("decode") / len(kinds)
    assert other.forward_seconds == pytest.approx(one.forward_seconds / share)
    assert other.stall_seconds == pytest.approx(one.stall_seconds / share)


def imagined(
    policy: str, capacity: int, **options: object
) -> tuple[SimulatedCacheStore, list[Result], Trace]:
    """A run under an imagined memory, and its trace."""
    own = engine("llada2", unmask="fixed:steps=3", **options)
    transformer = own.model.transformer
    store = SimulatedCacheStore(
        ResidentExpertStore({}), CacheSimulator(own.model.spec.router.experts, capacity)
    )
    layers = []
    for layer in transformer.layers:
        network = layer.feed_forward
        if isinstance(network, MoE):
            store.backing_store = network.store
            network = replace(network, store=store)
        layers.append(replace(layer, feed_forward=network))
    own.model = replace(own.model, transformer=replace(transformer, layers=tuple(layers)))
    said = trace_header(own, policy=policy, generation=own.generation, prompts={}, provenance={})
    path = Path(mkdtemp()) / "imagined"
    with TraceWriter(path, said, bias_of(own.model)) as writer:
        results = record_trace(own, PROMPTS, writer, policy=policy)
    return store, results, read_trace(path)


@pytest.mark.parametrize(
    ("policy", "commit"),
    [("vanilla", "vanilla"), ("des-seq:k=1", "policy"), ("uniform-vote:beta=0.3", "vanilla")],
)
def test_a_replay_foretells_a_run(policy: str, commit: str) -> None:
    """Of its own trace: what a memory of six slots moves, prompts and commits among it."""
    store, _, trace = imagined(policy, 6, commit=commit)
    assert trace.header.commit_routing == commit
    asked = ReplayPolicy(parse_policy(policy), routes_commits=commit == "policy")
    traffic = replay(trace, grid(asked, capacity="6")).points[0].traffic
    run = store.traffic_log.traffic()
    if policy == "vanilla":
        assert (traffic.experts_used, traffic.experts_moved) == (
            run.experts_used,
            run.experts_moved,
        )
    assert traffic.experts_moved == pytest.approx(run.experts_moved, rel=0.1)
    assert traffic.experts_used == pytest.approx(run.experts_used, rel=0.1)


def test_an_imagined_memory_changes_answers_only_where_residents_are_preferred() -> None:
    plain = [engine("llada2", unmask="fixed:steps=3").generate(p).tokens for p in PROMPTS]
    assert [result.tokens for result in imagined("vanilla", 3)[1]] == plain
    own, preferred = (
        imagined(f"uniform-vote:beta=0.3{preferring}", 5)[0].traffic_log.traffic()
        for preferring in ("", ",resident_bonus=8,max_vote_loss=0.5")
    )
    assert preferred.hit_rate > own.hit_rate


def test_without_forwards_that_write_keys_less_moves() -> None:
    trace = imagined("vanilla", 6)[2]
    whole, part = (
        replay(one, grid(play("vanilla"), capacity="6")).points[0]
        for one in (trace, decoding_only(trace))
    )
    assert part.traffic.experts_moved < whole.traffic.experts_moved
    assert (part.traffic.forwards, part.experts) == (whole.traffic.forwards, whole.experts)


def test_traffic_adds_up() -> None:
    traffic = Traffic(4, 10, 100, 75, {"elsewhere": Transfer(25, 250)}, vanilla_misses=200)
    assert (traffic.hit_rate, traffic.bytes_moved, traffic.bytes_saved) == (0.75, 250, 750)
    assert (traffic.bytes_saved_vs_vanilla, traffic.fraction_saved) == (1750, 0.875)
    assert replace(traffic, vanilla_misses=None).fraction_saved is None


def test_overlap_by_hand() -> None:
    one, other = (
        np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool),
        np.array([[0, 1, 1, 1], [0] * 4], bool),
    )
    assert jaccard(one, other).tolist() == [0.5, 1.0]
    assert cosine(one.astype(float), other.astype(float)).tolist() == pytest.approx([2 / 3, 0])
    trace = drawn()
    memory = TraceVotes.of(trace)
    found = measure_overlap(memory, np.stack([forward.used for forward in trace.forwards]))
    assert (found.steps, found.blocks, steps_per_block(trace)) == (15, 4, 4.0)
    first, second = trace.forwards[3:5]  # the only pair of forwards 3 and 4 crosses a block
    assert first.block_start != second.block_start
    assert min(found.step_jaccard) > max(found.block_jaccard)
    assert found.mean("step_cosine") == pytest.approx(np.mean(found.step_cosine))


@pytest.mark.parametrize(
    ("text", "slots"),
    [("35%", 89), ("100%", 256), ("47", 47), ("999", 256), ("6GiB", 53), ("0.4%", 1)],
)
def test_capacities_in_slots(text: str, slots: int) -> None:
    assert Capacity.parse(text).slots(layers=19, experts=256, expert_bytes=6_291_456) == slots


def test_refusals_say_what_would_have_worked() -> None:
    for text in ("", "half", "0", "0%", "101%", "1.5", "5GB/s", "-3"):
        with pytest.raises(CoterieError, match=r"35%"):
            Capacity.parse(text)
    with pytest.raises(CoterieError, match="less than one expert in each of 19 layers"):
        Capacity.parse("100MB").slots(layers=19, experts=256, expert_bytes=6_291_456)
    for text in ("25", "25GB", "fast"):
        with pytest.raises(CoterieError, match="25GB/s"):
            parse_bandwidth(text, "--link-bandwidth")
    assert (
        parse_bandwidth("1.5 MiB/s", "--link-bandwidth"),
        parse_bytes("6MiB", "--expert-bytes"),
    ) == (
        1572864,
        6291456,
    )
    with pytest.raises(CoterieError, match="sizes for bf16"):
        expert_sizes({"bf16": 1}, ["int3"], "auto")
    with pytest.raises(CoterieError, match="not several"):
        expert_sizes({"bf16": 1}, ["bf16", "int8"], "6MiB")
    with pytest.raises(CoterieError, match="leave out belady"):
        replay(drawn(), grid(play("resident-vote:beta=0.2"), caches="lru,belady"))
    with pytest.raises(CoterieError, match="holds no forward that decodes"):
        replay(Trace(drawn().header, None, ()), grid(play("vanilla")))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "drawn.trace"
    with TraceWriter(path, drawn().header) as writer:
        for forward in drawn().forwards:
            writer.write(forward)
    return str(path)


def test_the_command_replays_a_grid(file: str, tmp_path: Path, capsys: Capture) -> None:
    words = [
        "replay",
        file,
        "-p",
        "des-vote:beta=0.25",
        "--coreset-reuse",
        "0.1",
        "--eviction",
        "lru,belady",
    ]
    words += [
        "--expert-memory",
        "25%,12",
        "--link-bandwidth",
        "1KB/s,1MB/s",
        "--memory-bandwidth",
        "10KB/s",
        "--other-ms",
        "2",
    ]
    words += ["--transfer-latency-ms", "1", "--overlap", "0.5"]
    assert run([*words, "--json", "-o", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["points"]) == 3 * 2 * 2 * 2
    assert {p["policy"] for p in told["points"]} == set(told["overlap"]) == {
        *("vanilla", "des-vote:beta=0.25", "des-vote:beta=0.25 coreset-reuse=0.1")
    }  # fmt: skip
    alike = told["overlap"]["vanilla"]
    assert alike["means"]["step_jaccard"] == pytest.approx(np.mean(alike["step_jaccard"]))
    first = told["points"][0]
    assert (first["saved_against_vanilla"], first["slots"], first["capacity"]) == (0.0, 6, "25%")
    assert first["bytes_a_forward"] == pytest.approx(first["loads"] * 2 * 100)
    assert told["forwards"] == {"decode": 20, "commit": 0, "prefill": 0, "refresh": 0}
    assert all(p["ms"] >= p["stall_ms"] + 2 for p in told["points"])
    kept = json.loads((tmp_path / "out" / "replay.json").read_text())
    for point in told["points"]:
        del point["bytes_per_forward"]  # a record has the old keys alone
    assert kept["facts"]["points"] == told["points"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "replay.csv").read_text())))
    assert [row["policy"] for row in rows] == [p["policy"] for p in told["points"]]
    assert run([*words, "--csv"]) == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "replay.csv").read_text()
    assert run(words) == 0
    assert "des-vote:beta=0.25 coreset-reuse=0.1" in capsys.readouterr().out


def test_the_machine_is_as_typed() -> None:
    made = hardware_models(("1KB/s", "2KB/s"), "9KB/s", 3.0, latency_ms=5.0, overlap=0.5)
    assert made == {
        text: HardwareModel(link, 9000.0, 0.003, overlap=0.5, transfer_latency=0.005)
        for text, link in (("1KB/s", 1000.0), ("2KB/s", 2000.0))
    }


def test_figures_stand_beside_the_record(file: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert run(["replay", file, "-p", "des-seq:k=1", "--eviction", "lru,lfu", "-o", str(out)]) == 0
    drawn_files = sorted(path.name for path in out.glob("*.svg"))
    assert drawn_files == [
        f"replay-{name}-{scheme}.svg"
        for name in ("bytes", "overlap")
        for scheme in ("dark", "light")
    ]
    assert "des-seq:k=1, lfu" in (out / "replay-bytes-dark.svg").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-p", "xshare:beta=0.3"], "vote=full"),
        (["--eviction", "fifo"], "known: belady, lfu, lru, votes"),
        (["--expert-memory", "lots"], "35%"),
        (["--link-bandwidth", "fast"], "25GB/s"),
        (["--expert-dtype", "int3"], "sizes for bf16"),
        (["--coreset-reuse", "0.1"], "give a --policy"),
        (["-p", "topk:k=2", "--coreset-reuse", "0.1"], "elects none"),
        (["-p", "des-seq:k=2", "--coreset-reuse", "2"], "share of the votes"),
        (["-p", "des-vote:beta=0.2/0.3/0.4"], "3 shares"),
        (["--json", "--csv"], "one of them"),
        (["--overlap", "0.5"], "without --memory-bandwidth"),
        (["--overlap", "1.5"], "--overlap"),
        (["--commit-routing", "policy"], "with a --policy only"),
        (
            ["-p", "des-seq:k=2", "--commit-routing", "policy", "--decoding-only"],
            "without --decoding-only",
        ),
    ],
)
def test_what_cannot_be_replayed_is_one_line(file: str, capsys: Capture, words, told: str) -> None:
    assert run(["replay", file, *words]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert told in said.err


def test_a_warm_start_needs_the_same_sizes(file: str, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other.trace"
    with TraceWriter(other, replace(drawn().header, experts=25)):
        pass
    assert run(["replay", file, "--warm-start", str(other)]) == 2
    assert "no forward that decodes" in capsys.readouterr().err
    assert run(["replay", file, "--warm-start", file, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["points"][0]["loads"] >= 0
    votes, about = tmp_path / "votes", drawn().header
    for model, layers in (("tiny", about.layers), ("other", (*about.layers, 9))):
        write_votes(votes, SavedVotes.of(model, layers, np.ones((len(layers), about.experts))))
        assert run(["replay", file, "--warm-start", str(votes), "--json"]) == 2 * (model == "other")


def test_a_replay_is_the_same_every_time() -> None:
    asked = grid(play("vanilla"), play("resident-vote:beta=0.2"), caches="lru,lfu,votes")
    one, other = replay(drawn(), asked), replay(drawn(), asked)
    assert isinstance(one, ReplayResult)
    assert [p.to_dict() for p in one.points] == [p.to_dict() for p in other.points]
