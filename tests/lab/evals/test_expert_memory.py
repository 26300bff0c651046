"""Evaluations with a cache of experts: answers never depend on an interrupt."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from process_killer import CACHED_OPTIONS, CACHED_VARIANTS, cached_engine, quiz
from tiny_task import make_quiz

import coterie
from coterie.cli.entry import run as command
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.keys import to_json
from coterie.lab.evals.answer_log import AnswerTraffic
from coterie.lab.evals.report import TrafficSavings, traffic_savings
from coterie.lab.evals.results import EvalResult
from coterie.lab.evals.run import Variant, run_eval
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.testing import write_checkpoint

TESTS = Path(__file__).parents[2]
KILLER = TESTS / "support" / "process_killer.py"
VANILLA = Variant("vanilla")
VARIANTS = CACHED_VARIANTS


@cache
def model() -> Path:
    return write_checkpoint(Path(mkdtemp()) / "llada2", "llada2", dtype=torch.float32)


def engine(memory: str | None = "35%") -> Engine:
    config = None if memory is None else ExpertMemoryConfig.parse(memory, simulated=True)
    eval_engine = coterie.load(model(), block=8, unmask="fixed:steps=2", expert_memory=config)
    if eval_engine.model.store.traffic_log is not None:
        eval_engine.model.store.traffic_log.track_vanilla()
    return eval_engine


def documents_of(results: list[EvalResult]) -> list[dict[str, object]]:
    """All answers as JSON values, without times."""
    documents = [to_json(answer) for result in results for answer in result.answers]
    for document in documents:
        document["seconds"] = 0.0
        if document["served"] is not None:
            document["served"]["waited"] = 0.0
    return documents


@cache
def complete_run(reset_every: int) -> tuple[bytes, bytes, list[dict[str, object]]]:
    with TemporaryDirectory() as name:
        results = run_eval(
            engine(), [make_quiz()], VARIANTS, Path(name), batch_size=1, reset_every=reset_every
        )
        files = (Path(name) / file for file in ("items.jsonl", "run.json"))
        return *(file.read_bytes() for file in files), documents_of(results)  # type: ignore[return-value]


@law(3)
@given(st.integers(0, 12), st.sampled_from((1, 4, 6)))
def test_a_stopped_run_continues_with_the_same_cache(lines: int, reset_every: int) -> None:
    items, run_config, expected = complete_run(reset_every)
    remaining = b"".join(items.splitlines(keepends=True)[:lines])
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "items.jsonl").write_bytes(remaining)
        (folder / "run.json").write_bytes(run_config)
        assert (
            documents_of(
                run_eval(
                    engine(), [make_quiz()], VARIANTS, folder, batch_size=1, reset_every=reset_every
                )
            )
            == expected
        )
        assert (folder / "items.jsonl").read_bytes().startswith(remaining)


def test_items_generated_alone_have_the_same_answers(tmp_path: Path) -> None:
    """Single items and variants, in any order, have the same answers."""
    _, _, expected = complete_run(1)
    answers = []
    for variant in reversed(VARIANTS):
        for number in range(6):
            quiz = make_quiz(count=0, odd={number: make_quiz().items()[number].question})
            answers += documents_of(run_eval(engine(), [quiz], [variant], None, batch_size=1))
    assert sorted(map(str, answers)) == sorted(map(str, expected))


def test_a_cache_that_is_reset_less_often_has_more_hits() -> None:
    hits = []
    for reset_every in (1, 3, 6):
        traffic = run_eval(
            engine(), [make_quiz()], [VANILLA], None, batch_size=1, reset_every=reset_every
        )[0].traffic
        assert traffic is not None
        assert traffic.bytes_vanilla == traffic.bytes_moved
        hits.append(traffic.hit_rate)
    assert sorted(set(hits)) == hits


def test_a_different_stored_answer_stops_the_run(tmp_path: Path) -> None:
    items, run_config, _ = complete_run(6)
    first = json.loads(items.splitlines()[0])
    (tmp_path / "items.jsonl").write_text(json.dumps({**first, "output": "else"}) + "\n")
    (tmp_path / "run.json").write_bytes(run_config)
    with pytest.raises(CoterieError, match="quiz/0 has another answer"):
        run_eval(engine(), [make_quiz()], VARIANTS, tmp_path, batch_size=1, reset_every=6)


@pytest.mark.parametrize(
    ("memory", "reset_every", "message"),
    [
        ("6", 1, "`expert_memory` is"),
        ("35%", 2, "`reset_every` is 1 in the folder and 2"),
        (None, 1, "`expert_memory` is set in the folder and not set"),
    ],
)
def test_another_cache_is_another_run(
    memory: str | None, reset_every: int, message: str, tmp_path: Path
) -> None:
    for name, content in zip(("items.jsonl", "run.json"), complete_run(1)[:2], strict=True):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CoterieError, match="holds another run") as raised:
        run_eval(
            engine(memory), [make_quiz()], VARIANTS, tmp_path, batch_size=1, reset_every=reset_every
        )
    assert message in str(raised.value)


def test_answers_without_traffic_are_read(tmp_path: Path) -> None:
    run_eval(engine(None), [make_quiz()], [VANILLA], tmp_path, batch_size=1)
    path = tmp_path / "items.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line.pop("served") for line in lines} == {None}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (result,) = run_eval(engine(None), [make_quiz()], [VANILLA], tmp_path, batch_size=1)
    assert all(answer.from_disk for answer in result.answers)
    assert result.traffic is None


def test_a_cache_needs_a_batch_size_of_one() -> None:
    with pytest.raises(CoterieError, match="`batch_size` must be 1"):
        run_eval(engine(), [make_quiz()], VARIANTS, None, batch_size=2)


@pytest.mark.slow
def test_a_run_killed_within_a_segment_continues_with_the_same_cache(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, str(KILLER), str(model()), str(tmp_path), "3", "cached"],
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS / 'support'}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "killed" in process.stdout
    expected = documents_of(
        run_eval(cached_engine(str(model())), [quiz(3)], VARIANTS, None, **CACHED_OPTIONS)
    )
    results = run_eval(cached_engine(str(model())), [quiz(3)], VARIANTS, tmp_path, **CACHED_OPTIONS)
    assert all(answer.from_disk for result in results for answer in result.answers)
    assert documents_of(results) == expected


def test_savings_are_relative_to_the_first_variant() -> None:
    first = [AnswerTraffic(10, 5, moved, 100) for moved in (100, 200, 300)]
    other = [AnswerTraffic(10, 5, moved, 100) for moved in (50, 100, 150)]
    assert traffic_savings(first, other) == TrafficSavings(0.5, (0.5, 0.5))
    assert traffic_savings(
        [first[0], None, first[2]], [None, other[1], other[2]]
    ) == TrafficSavings(0.5, (0.5, 0.5))
    assert traffic_savings([None], [first[0]]) is None
    uneven = traffic_savings(first, [AnswerTraffic(10, 5, moved, 100) for moved in (100, 100, 100)])
    assert uneven is not None
    assert uneven.interval[0] < uneven.value == 0.5 < uneven.interval[1]


WORDS = ["eval", "--task", "words", "--num-problems", "2", "--simulate-expert-memory", "25%"]


def test_eval_reports_the_traffic(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [*WORDS, "-p", "des-vote:beta=0.3", "-o", str(tmp_path)]
    assert command([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"]["memory"]["slots"] == 32
    assert document["run"]["rows"] == document["run"]["memory"]["lasts"] == 1
    vanilla, other = (line["expert_traffic"] for line in document["policies"])
    assert vanilla["saved"] is None
    assert vanilla["saved_on_same_forwards"] == 0
    assert other["saved"] == pytest.approx(1 - other["moved"] / vanilla["moved"])
    low, high = other["saved_interval"]
    assert low <= other["saved"] <= high
    assert command([*arguments, "--csv"]) == 0  # read from the folder
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row["bytes_moved"]) for row in rows] == [vanilla["moved"], other["moved"]]
    assert command(arguments) == 0
    assert {"hit", "moved/forward", "saved"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--simulate-expert-memory", "25%", "--batch-size", "4"], "leave --batch-size out"),
        (["--reset-cache-every", "4"], "--reset-cache-every has no effect"),
        (["--eviction", "lfu"], "--eviction has no effect"),
    ],
)
def test_an_eval_refusal_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([*WORDS[:5], *arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err
