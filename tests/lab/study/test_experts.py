"""Experts that do not fit: books agree with memories, stopped runs go on, verdicts are honest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import drawings_of, findings_of, tables_of
from tiny_task import make_quiz

import coterie
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.keys import to_json
from coterie.lab import plotting
from coterie.lab.evals.expert_log import AnswerEntry, AnswerTraceLog
from coterie.lab.evals.run import Answer, Variant
from coterie.lab.study import expert_cache
from coterie.lab.study.experiment import Finding, StudyContext, Verdict, read_record
from coterie.lab.study.expert_cache import (
    MEMORY_SHARES,
    REDUCED_ITEMS_DIVISOR,
    ReplayRequest,
    answer_questions,
    engine_with_precision,
    interleave_questions,
    precision_names,
    run_requests,
    simulate_cache,
    slots_by_share,
    with_store,
)
from coterie.lab.study.expert_cache_report import ExpertCacheExperiment, ResultGrid
from coterie.lab.study.results import JsonObject, VariantResult
from coterie.model.moe import MoE
from coterie.offload.capacity import Capacity
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.simulated_store import CacheSimulator, SimulatedCacheStore
from coterie.testing import write_checkpoint

TASKS = (make_quiz(count=4, tokens=8), make_quiz(name="other", count=3, tokens=8))
CLOSE = "uniform-vote:beta=0.3,resident_bonus=8,max_vote_loss=0.5"
LOOKING = ReplayRequest(Variant(CLOSE, {"commit": "policy"}), 6, 5)


def tiny(folder: Path, **options: str) -> Engine:
    """A random model with 16 experts and top-4."""
    where = folder / "model"
    if not where.exists():
        write_checkpoint(where, "llada2", seed=3)
    return coterie.load(where, unmask="fixed:steps=2", block=8, device="cpu", **options)


def lab(folder: Path, engine: Engine) -> StudyContext:
    return StudyContext(engine, TASKS, folder, 6, 2, lambda share, doing: None)


def ask(engine: Engine, asked: ReplayRequest, folder: Path) -> list[AnswerEntry]:
    return answer_questions(engine, TASKS, asked, folder, lambda share: None)


def without_seconds(entries: Sequence[AnswerEntry]) -> list[tuple[Answer, str, bytes]]:
    return [
        (replace(one.answer, seconds=0.0), one.kinds, one.used.tobytes() + bytes(one.used.shape))
        for one in entries
    ]


# Books


USES = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=12)


@given(USES, st.integers(5, 10))
def test_the_simulated_cache_is_lru(uses: list[list[int]], capacity: int) -> None:
    book, here = CacheSimulator(10, capacity), []
    for wanted in uses:
        used = np.zeros(10, dtype=bool)
        used[wanted] = True
        there = np.flatnonzero(used).tolist()
        come = [expert for expert in there if expert not in here]
        # Last used last; of those used together the higher index leaves first.
        here = [expert for expert in here if expert not in there] + sorted(there, reverse=True)
        here = here[-capacity:]
        assert book.count_loads(0, used) == len(come)
        assert set(np.flatnonzero(book.slots(0).resident)) == set(here)


@given(USES, st.lists(st.integers(5, 10), min_size=2, max_size=4))
def test_cache_sizes_are_independent(uses: list[list[int]], capacities: list[int]) -> None:
    masks = [np.isin(np.arange(10), wanted) for wanted in uses]
    together = [CacheSimulator(10, capacity) for capacity in capacities]
    loads = [[book.count_loads(0, mask) for book in together] for mask in masks]
    for place, capacity in enumerate(capacities):
        alone = CacheSimulator(10, capacity)
        assert [alone.count_loads(0, mask) for mask in masks] == [row[place] for row in loads]
    moved = np.array(loads).sum(0)
    assert all(
        moved[a] >= moved[b]
        for a, one in enumerate(capacities)
        for b, other in enumerate(capacities)
        if one <= other
    ), "where every forward fits, a larger memory never moves more"


@pytest.mark.parametrize("capacity", [2, 6, 16])
def test_simulated_loads_equal_those_of_a_real_run(tmp_path: Path, capacity: int) -> None:
    """Answers are given many at once; the memory served them one after the other."""
    engine = tiny(tmp_path)
    entries = ask(engine, ReplayRequest(Variant("des-seq:k=2"), 6), tmp_path / "together")
    store = SimulatedCacheStore(engine.model.store, CacheSimulator(16, capacity))
    own = Engine(with_store(engine.model, store), generation=engine.generation)
    for question in interleave_questions(TASKS, 6, engine):
        own.generate(question.task.prompt(question.item), policy="des-seq:k=2", max_new_tokens=8)
    made = simulate_cache(entries, capacity)
    transfers = store.traffic_log.traffic().transfers.values()
    assert sum(transfer.experts for transfer in transfers) == made.loaded.sum()
    simulator = CacheSimulator(16, capacity)
    for entry in entries:
        entry.count_loads(simulator, engine.model.spec.moe_layers)
    assert set(simulator.layers) == set(store.cache.layers)
    for layer, slots in simulator.layers.items():
        assert np.array_equal(slots.resident, store.cache.layers[layer].resident)
    assert made.used.tolist() == [int(entry.used.sum()) for entry in entries]


def test_problems_alternate_between_tasks(tmp_path: Path) -> None:
    asked = interleave_questions(TASKS, 7, tiny(tmp_path))
    assert [one.task.name for one in asked] == ["quiz", "other"] * 3 + ["quiz"]
    assert interleave_questions(TASKS, 4, tiny(tmp_path)) == asked[:4]


def test_forward_kinds_are_recorded(tmp_path: Path) -> None:
    (entry, *_) = ask(tiny(tmp_path), ReplayRequest(Variant("vanilla"), 1), tmp_path)
    answer = entry.answer
    assert [entry.kinds.count(kind) for kind in "pdc"] == [
        answer.prefills, answer.forwards, answer.commits,
    ]  # fmt: skip
    for capacity in (1, 16):
        made, decoding = simulate_cache([entry], capacity), entry.kinds.index("d")
        before = replace(entry, kinds=entry.kinds[:decoding], used=entry.used[:decoding])
        rest = made.loaded - simulate_cache([before], capacity).loaded
        assert (
            made.loaded_decoding == rest if "c" not in entry.kinds else made.loaded_decoding <= rest
        )


# Runs that were stopped


@pytest.mark.parametrize("left", [0, 3])
def test_interrupted_run_resumes_with_the_same_cache(tmp_path: Path, left: int) -> None:
    engine = tiny(tmp_path)
    whole = ask(engine, LOOKING, tmp_path / "whole")
    told = (tmp_path / "whole" / LOOKING.file).read_bytes().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    torn = b"".join(told[:left]) + told[left][: len(told[left]) // 2]
    (tmp_path / "part" / LOOKING.file).write_bytes(torn)
    assert without_seconds(ask(engine, LOOKING, tmp_path / "part")) == without_seconds(whole)
    cold = ask(engine, replace(LOOKING, slots=1), tmp_path / "cold")
    assert without_seconds(cold) != without_seconds(whole), "what is in memory changes nothing here"


def test_failed_item_affects_only_itself(tmp_path: Path) -> None:
    """A prompt that the model has no room for, in the middle."""
    engine = tiny(tmp_path)
    odd = {2: " ".join(["3"] * 600)}
    found = answer_questions(
        engine, [make_quiz(odd=odd, tokens=8)], LOOKING, tmp_path, lambda share: None
    )
    assert [bool(entry.answer.output) for entry in found] == [True, True, False, True, True, True]
    assert found[2].answer.finish_reason == "length"
    assert len(found[2].kinds) == 0 == len(found[2].used)
    again = answer_questions(
        engine, [make_quiz(odd=odd, tokens=8)], LOOKING, tmp_path, lambda share: None
    )
    assert without_seconds(again) == without_seconds(found)


def test_log_refuses_a_second_process(tmp_path: Path) -> None:
    with (
        AnswerTraceLog.open(tmp_path / "one", (2, 4)),
        pytest.raises(CoterieError, match="another process"),
        AnswerTraceLog.open(tmp_path / "one", (2, 4)),
    ):
        pass


@settings(max_examples=20)
@given(st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_log_entry_round_trip(forwards: int, seed: int) -> None:
    used = np.random.default_rng(seed).random((forwards, 2, 11)) < 0.4
    answer = Answer(
        "arm", "quiz", "quiz/1", True, None, {}, "out ✓\n", "stop", 8, 2, 1, 1, 1, 3.5, 2, 1.0, 0.9,
        0.5, None,
    )  # fmt: skip
    entry = AnswerEntry(answer, "pdc"[:forwards], used)
    with TemporaryDirectory() as folder:
        with AnswerTraceLog.open(Path(folder) / "one", (2, 11)) as book:
            book.add([entry])
        with AnswerTraceLog.open(Path(folder) / "one", (2, 11)) as book:
            (found,) = book.entries.values()
    assert (found.answer, found.kinds) == (answer, entry.kinds)
    assert np.array_equal(found.used, used)


@given(st.integers(0, 2), st.data())
@settings(max_examples=30, deadline=None)
def test_the_log_is_read_up_to_its_first_damage(line: int, data: st.DataObject) -> None:
    answer = Answer("arm", "quiz", "", True, None, {}, "out", "stop")
    entries = [
        AnswerEntry(replace(answer, id=f"quiz/{n}"), "pd", np.ones((2, 2, 11), bool))
        for n in range(3)
    ]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "one"
        with AnswerTraceLog.open(path, (2, 11)) as book:
            book.add(entries)
        lines = path.read_bytes().splitlines(keepends=True)
        fields = json.loads(lines[line])
        damages = [b"\0" * 9 + b"\n", b"[]\n", b"{}\n", lines[line][:-9] + b"\n"]
        for key in fields:
            damages.append(json.dumps({**fields, key: ["x"]}).encode() + b"\n")
        lines[line] = data.draw(st.sampled_from(damages))
        path.write_bytes(b"".join(lines))
        with AnswerTraceLog.open(path, (2, 11)) as book:
            assert list(book.entries)[:line] == [entry.key for entry in entries[:line]]
            book.add([entry for entry in entries if entry.key not in book.entries])
        with AnswerTraceLog.open(path, (2, 11)) as book:
            assert len(book.entries) >= 3


# The experiment


@pytest.mark.slow
def test_expert_cache_renders_from_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, context = ExpertCacheExperiment(), lab(tmp_path, tiny(tmp_path))
    record = json.loads(json.dumps(experiment.measure(context), allow_nan=False))
    grid = ResultGrid.from_record(record)
    assert grid.precisions == ["bf16", "int8", "int4"]
    sizes = [entry["expert_bytes"] for entry in record["precisions"]]
    assert sizes == sorted(sizes, reverse=True)
    assert record["runs"][0]["policy"] == "vanilla"
    for run in record["runs"]:
        assert len(run["kept"]) == (1 if run["looks"] else len(slots_by_share(16)))
        assert run["to_whole"] is None or run["precision"] != "bf16"
    resident = [run["items"] for run in record["runs"] if run["looks"]]
    assert set(resident) == {6, 6 // REDUCED_ITEMS_DIVISOR}
    check_rendering(record)
    monkeypatch.setattr(
        expert_cache, "generate_outcomes", lambda *_, **__: pytest.fail("asked again")
    )
    assert json.loads(json.dumps(experiment.measure(context))) == record


def check_rendering(record: JsonObject) -> None:
    experiment = ExpertCacheExperiment()
    assert all(findings_of(experiment, record))
    for table in tables_of(experiment, record):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.heads)}
    for drawing in drawings_of(experiment, record)[-1:]:
        assert "<svg" in plotting.render_svg(drawing.draw, name=drawing.name, scheme="light")


def test_committed_record_renders() -> None:
    content = read_record(Path(__file__).parents[3] / "results" / "study", "experts")
    assert content is not None
    record = content["facts"]
    check_rendering(record)
    grid = ResultGrid.from_record(record)
    assert [point.share for point in grid.main_points()] == ["35 %"] * len(grid.main_points())
    vanilla = grid.main_points("vanilla")
    assert {point.run["commit"] for point in vanilla} == {"", "vanilla"}
    for comparison in grid.against_vanilla():
        assert comparison.saved.low <= comparison.saved.value <= comparison.saved.high
        moved = comparison.point.bytes / comparison.baseline.bytes
        assert comparison.saved.value == pytest.approx(1 - moved)
    names = [drawing.name for drawing in drawings_of(ExpertCacheExperiment(), record)]
    assert names == ["experts-bytes", "experts-bytes-int8", "experts-bytes-int4", "experts-commits"]


def test_quantised_experts_keep_their_precision(tmp_path: Path) -> None:
    engine = tiny(tmp_path, expert_dtype="int8")
    assert precision_names(engine) == ["int8"]
    assert engine_with_precision(engine, "int8") is engine


def test_baseline_precision_has_sixteen_bits(tmp_path: Path) -> None:
    whole, half = tiny(tmp_path, dtype="fp32"), tiny(tmp_path, dtype="fp16")
    assert [precision_names(one)[0] for one in (whole, half)] == ["bf16", "fp16"]
    assert engine_with_precision(half, "fp16") is half
    made = engine_with_precision(whole, "bf16")
    assert str(made.model.transformer.dtype) == "torch.bfloat16"
    assert made.generation == whole.generation
    assert any(isinstance(one.feed_forward, MoE) for one in made.model.transformer.layers)


@given(st.integers(1, 300))
def test_cache_sizes_are_shares_of_the_experts(experts: int) -> None:
    """As ``--expert-memory`` gives them; a share below one expert has no cache."""
    for share in MEMORY_SHARES:
        capacity = Capacity.parse(share)
        if share in slots_by_share(experts):
            expected = capacity.slots(layers=1, experts=experts, expert_bytes=1)
            assert slots_by_share(experts)[share] == expected
        else:
            assert capacity.amount * experts < 1


@pytest.mark.parametrize("commits", [True, False])
def test_requests_of_a_precision(commits: bool) -> None:
    slots = slots_by_share(128)
    first, second = (
        run_requests(slots, 7, commits=commits, is_first=is_first) for is_first in (True, False)
    )
    for requests in (first, second):
        assert (requests[0].variant.name, requests[0].slots) == ("vanilla", None)
        keys = [(request.variant.name, request.slots) for request in requests]
        assert len(set(keys)) == len(keys)
    kinds = {request.variant.generation.get("commit") for request in first[1:]}
    assert kinds == ({"policy", "vanilla"} if commits else {None})
    items = {request.slots: request.items for request in first if request.slots is not None}
    assert items == {size: 7 if size == slots["35%"] else 4 for size in slots.values()}


# Verdicts, from made-up records


def make_run(
    name: str, right: int, *, n: int = 1000, saved: float = 0.0, whole: float | None = None,
    resident: bool = False, precision: str = "bf16", slower: float = 1.0,
) -> JsonObject:  # fmt: skip
    def ratio(value: float) -> list[float]:
        return [value, value - 0.01, value + 0.01]

    digits = {"words": "1" * right + "0" * (n - right)}
    result = VariantResult(name, name, {}, digits, 40.0, 1.0, 1.0, 1.0, 8.0, 1.0, 0)
    cache = {
        "share": "35%", "slots": 44, "used": 200 * n, "moved": int(100 * n * (1 - saved)),
        "moved_decoding": n, "to_vanilla": ratio(1 - saved) if saved else None,
        "to_whole": None if whole is None else ratio(whole),
        "ms": {"25GB/s": 2.0 * (1 - saved), "3GB/s": 16.0},
    }  # fmt: skip
    return {
        "precision": precision, "policy": name, "commit": "", "looks": resident, "items": n,
        "tally": to_json(result), "passes": 3.0, "decoding": 1.0, "to_vanilla": ratio(slower),
        "to_whole": None if whole is None else ratio(1.0), "kept": [cache],
    }  # fmt: skip


def make_record(*runs: JsonObject) -> JsonObject:
    names = dict.fromkeys(run["precision"] for run in runs)
    precisions = [{"name": name, "dtype": "bfloat16", "expert_bytes": 1000} for name in names]
    return {
        "experts": 128, "k": 8, "layers": 4, "block": 32, "main": "35%", "commits": False,
        "precisions": precisions, "left_out": [{"name": "int4", "why": "no room"}],
        "runs": list(runs),
    }  # fmt: skip


def verdicts(*runs: JsonObject) -> dict[str, list[Verdict | None]]:
    """Verdicts by claim."""
    by_claim: dict[str, list[Verdict | None]] = {}
    record = make_record(*runs)
    for finding in findings_of(ExpertCacheExperiment(), record):
        if isinstance(finding, Finding):
            by_claim.setdefault(finding.claim, []).append(finding.verdict)
    assert all(table.rows for table in tables_of(ExpertCacheExperiment(), record))
    return by_claim


claim = ExpertCacheExperiment.text.claim
VANILLA, PRICED = make_run("vanilla", 998), "priced-vote:price=1"
FAILS: list[Verdict] = ["does not hold"]


@pytest.mark.parametrize(
    ("run", "caching", "half"),
    [
        (make_run(PRICED, 996, saved=0.6, resident=True), ["holds"], ["holds"]),
        (make_run(PRICED, 996, saved=0.4, resident=True), ["holds"], FAILS),
        (make_run(PRICED, 900, saved=0.6, resident=True), FAILS, FAILS),
        (make_run(PRICED, 996, saved=-0.2, resident=True), FAILS, FAILS),
        (make_run(PRICED, 996, saved=0.6, slower=1.5, resident=True), FAILS, ["holds"]),
        (make_run(PRICED, 39, n=40, saved=0.6, resident=True), *[["inconclusive"]] * 2),
        (make_run(PRICED, 996, saved=0.6), ["holds"], None),
    ],
)
def test_caching_verdicts(
    run: JsonObject, caching: list[Verdict], half: list[Verdict] | None
) -> None:
    found = verdicts(VANILLA, run)
    assert found[claim("caching")] == caching
    assert found.get(claim("half")) == half


def test_caching_is_inconclusive_without_correct_answers() -> None:
    runs = make_run("vanilla", 0), make_run(PRICED, 0, saved=0.6, resident=True)
    assert verdicts(*runs) == {claim("caching"): ["inconclusive"]}


@pytest.mark.parametrize(
    ("right", "n", "whole", "verdict"),
    [
        (997, 1000, 0.52, "holds"),
        (960, 1000, 0.52, "does not hold"),
        (997, 1000, 1.2, "does not hold"),
        (39, 40, 0.52, "inconclusive"),
    ],
)
def test_low_precision_verdicts(right: int, n: int, whole: float, verdict: Verdict) -> None:
    priced = make_run(PRICED, 900, saved=0.1)  # not accurate, so it is not compared
    low = make_run("vanilla", right, n=n, whole=whole, precision="int8")
    assert verdicts(VANILLA, priced, low)[claim("low_precision", name="int8")] == [verdict]
    findings = findings_of(ExpertCacheExperiment(), make_record(VANILLA, priced, low))
    assert any("int4 was not measured: no room" in str(finding) for finding in findings)


def test_simulated_residents_reach_the_policy_on_its_device() -> None:
    there = SimulatedCacheStore(
        ResidentExpertStore({}), CacheSimulator(8, 5), device=torch.device("meta")
    ).resident(0)
    assert there is not None
    assert there.device.type == "meta"
