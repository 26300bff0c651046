"""An evaluation where not all experts are in memory: what is there never depends on a stop."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from process_killer import QUIZ, SHORT, short
from tiny_task import Quiz

import coterie
from coterie.cli.entry import run as command
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.lab.evals.answer_log import Answer
from coterie.lab.evals.results import EvalResult
from coterie.lab.evals.run import Variant, run_eval
from coterie.lab.evals.traffic import AnswerTraffic, TrafficSavings, traffic_savings
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.testing import write_checkpoint

TESTS = Path(__file__).parent
VANILLA = Variant("vanilla")
PREFERRING = Variant("resident-vote:beta=0.3,resident_bonus=8,max_vote_loss=0.5")
ARMS = [VANILLA, PREFERRING]
TIMED = ("seconds", "found", "served")


@cache
def model() -> Path:
    return write_checkpoint(Path(mkdtemp()) / "llada2", "llada2", dtype=torch.float32)


def engine(memory: str | None = "35%") -> Engine:
    asked = None if memory is None else ExpertMemoryConfig.parse(memory, simulated=True)
    own = coterie.load(model(), block=8, unmask="fixed:steps=2", expert_memory=asked)
    if own.model.store.traffic_log is not None:
        own.model.store.traffic_log.track_vanilla()
    return own


def told(sheets: list[EvalResult]) -> list[dict[str, object]]:
    """All but what a clock says."""
    answers: Iterator[Answer] = (answer for sheet in sheets for answer in sheet.answers)
    return [
        {name: value for name, value in vars(one).items() if name not in TIMED}
        | {"served": None if one.traffic is None else vars(one.traffic) | {"waited": 0.0}}
        for one in answers
    ]


@cache
def whole(lasts: int) -> tuple[bytes, bytes, list[dict[str, object]]]:
    with TemporaryDirectory() as name:
        sheets = run_eval(engine(), [Quiz()], ARMS, Path(name), batch_size=1, reset_every=lasts)
        files = (Path(name) / file for file in ("items.jsonl", "run.json"))
        return *(file.read_bytes() for file in files), told(sheets)  # type: ignore[return-value]


@settings(max_examples=8)
@given(st.integers(0, 12), st.sampled_from((1, 4, 6)))
def test_a_run_that_stopped_goes_on_with_the_memory_that_it_had(lines: int, lasts: int) -> None:
    items, about, true = whole(lasts)
    left = b"".join(items.splitlines(keepends=True)[:lines])
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "items.jsonl").write_bytes(left)
        (folder / "run.json").write_bytes(about)
        assert (
            told(run_eval(engine(), [Quiz()], ARMS, folder, batch_size=1, reset_every=lasts))
            == true
        )
        assert (folder / "items.jsonl").read_bytes().startswith(left)


def test_what_is_asked_alone_is_answered_the_same(tmp_path: Path) -> None:
    """Each question and each policy of its own, in any order: nothing is felt of the others."""
    _, _, true = whole(1)
    found = []
    for arm in reversed(ARMS):
        for number in range(6):
            one = Quiz(count=0, odd={number: Quiz().items()[number].question})
            found += told(run_eval(engine(), [one], [arm], None, batch_size=1))
    assert sorted(map(str, found)) == sorted(map(str, true))


def test_a_memory_that_lasts_is_hit_more_often() -> None:
    hits = []
    for lasts in (1, 3, 6):
        served = run_eval(engine(), [Quiz()], [VANILLA], None, batch_size=1, reset_every=lasts)[
            0
        ].traffic
        assert served is not None
        assert served.bytes_vanilla == served.bytes_moved
        hits.append(served.hit_rate)
    assert sorted(set(hits)) == hits


def test_a_question_that_was_answered_otherwise_stops_the_run(tmp_path: Path) -> None:
    items, about, _ = whole(6)
    first = json.loads(items.splitlines()[0])
    (tmp_path / "items.jsonl").write_text(json.dumps({**first, "output": "else"}) + "\n")
    (tmp_path / "run.json").write_bytes(about)
    with pytest.raises(CoterieError, match="quiz/0 was answered otherwise before"):
        run_eval(engine(), [Quiz()], ARMS, tmp_path, batch_size=1, reset_every=6)


@pytest.mark.parametrize(
    ("memory", "lasts", "said"),
    [
        ("6", 1, "memory.expert_memory is"),
        ("35%", 2, "memory.lasts is 1 there and 2 here"),
        (None, 1, "memory is set there and not set here"),
    ],
)
def test_answers_in_another_memory_are_another_run(
    memory: str | None, lasts: int, said: str, tmp_path: Path
) -> None:
    for name, content in zip(("items.jsonl", "run.json"), whole(1)[:2], strict=True):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CoterieError, match="holds another run") as raised:
        run_eval(engine(memory), [Quiz()], ARMS, tmp_path, batch_size=1, reset_every=lasts)
    assert said in str(raised.value)


def test_answers_of_before_there_were_memories_are_read(tmp_path: Path) -> None:
    run_eval(engine(None), [Quiz()], [VANILLA], tmp_path, batch_size=1)
    path = tmp_path / "items.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line.pop("served") for line in lines} == {None}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (sheet,) = run_eval(engine(None), [Quiz()], [VANILLA], tmp_path, batch_size=1)
    assert all(answer.from_disk for answer in sheet.answers)
    assert sheet.traffic is None


def test_rows_do_not_share_a_memory() -> None:
    with pytest.raises(CoterieError, match="ask one by one"):
        run_eval(engine(), [Quiz()], ARMS, None, batch_size=2)


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_stretch_goes_on_in_the_same_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TESTS / "killing.py"), str(model()), str(tmp_path), "3", "short"],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "killed" in done.stdout
    true = told(run_eval(short(str(model())), [QUIZ], ARMS, None, **SHORT))
    found = run_eval(short(str(model())), [QUIZ], ARMS, tmp_path, **SHORT)
    assert all(answer.from_disk for sheet in found for answer in sheet.answers)
    assert told(found) == true


def test_saved_is_of_the_first_arms_bytes_item_by_item() -> None:
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


WORDS = ["eval", "--task", "words", "--items", "2", "--imagine-memory", "25%"]


def test_eval_tells_what_was_moved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = [*WORDS, "-p", "des-vote:beta=0.3", "-o", str(tmp_path)]
    assert command([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"]["memory"]["slots"] == 32
    assert document["run"]["rows"] == document["run"]["memory"]["lasts"] == 1
    vanilla, other = (line["expert_traffic"] for line in document["policies"])
    assert vanilla["saved"] is None
    assert vanilla["saved_on_same_forwards"] == 0
    assert other["saved"] == pytest.approx(1 - other["moved"] / vanilla["moved"])
    low, high = other["saved_interval"]
    assert low <= other["saved"] <= high
    assert command([*asked, "--csv"]) == 0  # found in the folder
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row["bytes_moved"]) for row in rows] == [vanilla["moved"], other["moved"]]
    assert command(asked) == 0
    assert {"hit", "moved/forward", "saved"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--simulate-expert-memory", "25%", "--batch-size", "4"], "leave --batch-size out"),
        (["--reset-cache-every", "4"], "--reset-cache-every has no effect"),
        (["--eviction", "lfu"], "--eviction has no effect"),
    ],
)
def test_what_eval_cannot_do_with_a_memory_is_one_line(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([*WORDS[:5], *typed]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert said in told.err
