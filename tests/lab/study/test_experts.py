"""Experts that do not fit: books agree with memories, stopped runs go on, verdicts are honest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_task import Quiz

import coterie
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.lab import plotting
from coterie.lab.evals.run import Answer, Variant
from coterie.lab.study import cache_simulation
from coterie.lab.study.cache_simulation import (
    AnswerEntry,
    AnswerTraceLog,
    CacheTransfers,
    ReplayRequest,
    answer_questions,
    interleave_questions,
    simulate_cache,
    with_store,
)
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Finding, Verdict
from coterie.lab.study.expert_cache import (
    REDUCED_ITEMS_DIVISOR,
    CacheOutcome,
    CacheRun,
    ExpertCacheRecord,
    PrecisionInfo,
    engine_with_precision,
    precision_names,
    slots_by_share,
)
from coterie.lab.study.expert_cache_report import (
    CACHING_CLAIM,
    HALF_BYTES_CLAIM,
    LOW_PRECISION_CLAIM,
    ExpertCacheExperiment,
    ResultGrid,
)
from coterie.lab.study.results import VariantResult
from coterie.model.moe import MoE
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.simulated_store import CacheSimulator, SimulatedCacheStore
from coterie.testing import write_checkpoint
from coterie.values import ExpertStore

TASKS = (Quiz(count=4, tokens=8), Quiz(name="other", count=3, tokens=8))
CLOSE = "uniform-vote:beta=0.3,resident_bonus=8,max_vote_loss=0.5"
LOOKING = ReplayRequest(Variant(CLOSE, {"commit": "policy"}), 6, 5)


def tiny(folder: Path, **options: str) -> Engine:
    """A random model with 16 experts and top-4."""
    where = folder / "model"
    if not where.exists():
        write_checkpoint(where, "llada2", seed=3)
    return coterie.load(where, unmask="fixed:steps=2", block=8, device="cpu", **options)


def lab(folder: Path, engine: Engine) -> StudyContext:
    return StudyContext(engine, TASKS, folder, 6, 2, 1, lambda share, doing: None)


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
    memories: list[SimulatedCacheStore] = []

    def behind(store: ExpertStore) -> ExpertStore:
        memories.append(SimulatedCacheStore(store, 16, capacity))
        return memories[-1]

    own = Engine(with_store(engine.model, behind), generation=engine.generation)
    for question in interleave_questions(TASKS, 6, engine):
        own.generate(question.task.prompt(question.item), policy="des-seq:k=2", max_new_tokens=8)
    made = simulate_cache(entries, capacity)
    assert len(memories) == 1
    transfers = memories[0].traffic_log.traffic().transfers.values()
    assert sum(transfer.experts for transfer in transfers) == made.loads.sum()
    book = CacheSimulator(16, capacity)
    for entry in entries:
        for forward in entry.used:
            for layer, used in enumerate(forward):
                book.count_loads(layer, used)
    real = [
        sorted(np.flatnonzero(one.resident)) for _, one in sorted(memories[0].cache.layers.items())
    ]
    assert real == [sorted(np.flatnonzero(one.resident)) for _, one in sorted(book.layers.items())]
    assert made.sum_by_answer(made.loads, 6).sum() == made.loads.sum()
    assert made.used.sum() == sum(int(entry.used.sum()) for entry in entries)


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
    made = simulate_cache([entry], 16)
    assert made.is_decode.tolist() == [kind == "d" for kind in entry.kinds]
    assert isinstance(made, CacheTransfers)


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
        engine, [Quiz(odd=odd, tokens=8)], LOOKING, tmp_path, lambda share: None
    )
    assert [bool(entry.answer.output) for entry in found] == [True, True, False, True, True, True]
    assert found[2].answer.finish_reason == "length"
    assert len(found[2].kinds) == 0 == len(found[2].used)
    again = answer_questions(
        engine, [Quiz(odd=odd, tokens=8)], LOOKING, tmp_path, lambda share: None
    )
    assert without_seconds(again) == without_seconds(found)


def test_log_refuses_a_second_process(tmp_path: Path) -> None:
    with (
        AnswerTraceLog(tmp_path / "one", (2, 4)),
        pytest.raises(CoterieError, match="another process"),
    ):
        AnswerTraceLog(tmp_path / "one", (2, 4))


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
        with AnswerTraceLog(Path(folder) / "one", (2, 11)) as book:
            book.add([entry])
        with AnswerTraceLog(Path(folder) / "one", (2, 11)) as book:
            (found,) = book.entries.values()
    assert (found.answer, found.kinds) == (answer, entry.kinds)
    assert np.array_equal(found.used, used)


# The chapter


@pytest.mark.slow
def test_expert_cache_renders_from_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chapter, asked = ExpertCacheExperiment(), lab(tmp_path, tiny(tmp_path))
    facts = json.loads(json.dumps(chapter.measure(asked), allow_nan=False))
    grid = ResultGrid.from_record(facts)
    shares = len(slots_by_share(asked.engine))
    assert [one["name"] for one in grid.record["precisions"]] == ["bf16", "int8", "int4"]
    sizes = [one["expert_bytes"] for one in grid.record["precisions"]]
    assert sizes == sorted(sizes, reverse=True)
    plain = [point for point in grid.select("bf16") if not point.run["looks"]]
    assert {len([p for p in plain if p.policy == q]) for q in {p.policy for p in plain}} == {shares}
    looking = [run["items"] for run in grid.record["runs"] if run["looks"]]
    assert set(looking) == {6, 6 // REDUCED_ITEMS_DIVISOR}
    for drawing in chapter.drawings(facts):
        assert plotting.render_svg(drawing.draw, name=drawing.name, scheme="light").startswith(
            "<svg"
        )
    for table in chapter.tables(facts):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.heads)}
    assert all(chapter.findings(facts))
    monkeypatch.setattr(
        cache_simulation, "generate_outcomes", lambda *_, **__: pytest.fail("asked again")
    )
    assert json.loads(json.dumps(chapter.measure(asked))) == facts


def test_quantised_experts_keep_their_precision(tmp_path: Path) -> None:
    engine = tiny(tmp_path, experts="int8")
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


# Verdicts, from made-up records


def tally(name: str, right: int, n: int) -> VariantResult:
    bits = {"words": "1" * right + "0" * (n - right)}
    return VariantResult(name, name, {}, bits, 40.0, 1.0, 1.0, 1.0, 8.0, 1.0, 0)


def made_up(
    name: str, right: int, *, n: int = 1000, saved: float = 0.0, few: float | None = None,
    looks: bool = False, precision: str = "bf16", slower: float = 1.0,
) -> CacheRun:  # fmt: skip
    def ratio(value: float) -> list[float]:
        return [value, value - 0.01, value + 0.01]

    kept = CacheOutcome(
        share="35%", slots=44, used=200 * n, moved=int(100 * n * (1 - saved)), moved_decoding=n,
        to_vanilla=ratio(1 - saved) if saved else None,
        to_whole=None if few is None else ratio(few),
        ms={"25GB/s": 2.0 * (1 - saved), "3GB/s": 16.0},
    )  # fmt: skip
    return CacheRun(
        precision=precision, policy=name, commit="", looks=looks, items=n,
        tally=dict(vars(tally(name, right, n))), passes=3.0, decoding=1.0,
        to_vanilla=ratio(slower), to_whole=None if few is None else ratio(1.0), kept=[kept],
    )  # fmt: skip


def record(*runs: CacheRun) -> ExpertCacheRecord:
    names = dict.fromkeys(run["precision"] for run in runs)
    sizes = {"bf16": 2000, "int8": 1040}
    said = [PrecisionInfo(name=one, dtype="bfloat16", expert_bytes=sizes[one]) for one in names]
    return ExpertCacheRecord(
        experts=128, k=8, layers=4, block=32, main="35%", commits=False, precisions=said,
        left_out=[{"name": "int4", "why": "no room"}], runs=list(runs),
    )  # fmt: skip


def verdicts(facts: Any) -> dict[str, list[Verdict | None]]:
    found: dict[str, list[Verdict | None]] = {}
    for one in ExpertCacheExperiment().findings(facts):
        if isinstance(one, Finding):
            found.setdefault(one.claim, []).append(one.verdict)
    assert all(table.rows for table in ExpertCacheExperiment().tables(facts))
    return found


VANILLA = made_up("vanilla", 998)


@pytest.mark.parametrize(
    ("rule", "caching", "half"),
    [
        (made_up("priced-vote:price=1", 996, saved=0.6, looks=True), "holds", "holds"),
        (made_up("priced-vote:price=1", 996, saved=0.4, looks=True), "holds", "does not hold"),
        (made_up("priced-vote:price=1", 900, saved=0.6, looks=True), *["does not hold"] * 2),
        (made_up("priced-vote:price=1", 996, saved=-0.2, looks=True), *["does not hold"] * 2),
        (made_up("priced-vote:price=1", 996, saved=0.6, slower=1.5, looks=True), "does not hold",
         "holds"),
        (made_up("priced-vote:price=1", 39, n=40, saved=0.6, looks=True),
         *["inconclusive"] * 2),
        (made_up("priced-vote:price=1", 996, saved=0.6), "holds", "inconclusive"),
    ],
)  # fmt: skip
def test_caching_verdicts(rule: CacheRun, caching: Verdict, half: Verdict) -> None:
    told = verdicts(record(VANILLA, rule))
    assert (told[CACHING_CLAIM], told[HALF_BYTES_CLAIM]) == ([caching], [half])


def test_caching_is_inconclusive_without_correct_answers() -> None:
    facts = record(made_up("vanilla", 0), made_up("priced-vote:price=1", 0, saved=0.6, looks=True))
    assert verdicts(facts) == {CACHING_CLAIM: ["inconclusive"]}


def test_missing_task_has_an_empty_column() -> None:
    one, other = made_up("vanilla", 9, n=10), made_up("vanilla", 9, n=10, few=0.5, precision="int8")
    rule, few = (made_up("topk:k=1", 9, n=10, saved=0.5) for _ in range(2))
    for run in (one, other):
        run["tally"]["right"] = {"words": "1" * 9 + "0", "late": "1"}
    few["precision"] = "int8"
    table = ExpertCacheExperiment().tables(record(one, rule, other, few))[-1]
    assert [row[-1] for row in table.rows] == ["+0.0%", ""]


@pytest.mark.parametrize(
    ("right", "n", "few", "verdict"),
    [
        (997, 1000, 0.52, "holds"),
        (960, 1000, 0.52, "does not hold"),
        (997, 1000, 1.2, "does not hold"),
        (39, 40, 0.52, "inconclusive"),
    ],
)
def test_low_precision_verdicts(right: int, n: int, few: float, verdict: Verdict) -> None:
    coarse = made_up("vanilla", right, n=n, few=few, precision="int8")
    facts = record(VANILLA, coarse)
    assert verdicts(facts)[LOW_PRECISION_CLAIM.format(name="int8")] == [verdict]
    assert any(
        "int4 was not measured: no room" in str(one)
        for one in ExpertCacheExperiment().findings(facts)
    )


def test_simulated_residents_reach_the_policy_on_its_device() -> None:
    there = SimulatedCacheStore(
        ResidentExpertStore({}), 8, 5, device=torch.device("meta")
    ).resident(0)
    assert there is not None
    assert there.device.type == "meta"
