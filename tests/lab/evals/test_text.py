"""Bits of text: passages, intervals, and runs that resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.engine.engine import Engine, load
from coterie.errors import ConfigError, TaskError
from coterie.lab.evals.text import (
    BitsEstimate,
    read_text_data,
    score_text,
    summarize_text,
    text_identity,
)
from coterie.lab.journal import Journal
from coterie.lab.likelihood.estimator import LikelihoodEstimator
from coterie.lab.likelihood.passages import continuation_passage, split_text

POLICIES = ["vanilla", "des-vote:beta=0.3", "topk:k=4"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(device="cpu")


@given(st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=1, max_size=8))
def test_bits_are_a_mean_over_all_units_and_noise_is_that_of_samples(nats: list) -> None:
    units = list(range(1, len(nats) + 1))
    estimate = BitsEstimate.of(nats, units)
    assert estimate.value == pytest.approx(np.sum(nats) / 3 / np.log(2) / sum(units))
    assert estimate.interval[0] <= estimate.interval[1]
    same = BitsEstimate.of([[row[0]] * 3 for row in nats], units)
    assert same.noise == pytest.approx(0, abs=1e-9)
    assert BitsEstimate.of([row[:1] for row in nats], units).noise is None


@given(st.text(min_size=1, max_size=600))
def test_passages_hold_every_byte_of_a_text_once(engine: Engine, text: str) -> None:
    passages = list(split_text("a", text, engine))
    assert sum(passage.bytes for passage in passages) == len(text.encode())
    ids = [token for passage in passages for token in passage.ids[passage.given :]]
    assert engine.model.tokenizer.decode(ids) == text
    assert len({passage.id for passage in passages}) == len(passages)


@given(st.text(max_size=300), st.text(min_size=1, max_size=40).filter(str.strip))
def test_a_continuation_follows_its_context(engine: Engine, context: str, text: str) -> None:
    passage = continuation_passage("a", engine, context, text)
    scored = engine.model.tokenizer.decode(passage.ids[passage.given :])
    assert len(passage.ids) > passage.given >= 0
    assert (context + text).endswith(scored)
    assert passage.bytes == len(text.encode())


def test_a_long_context_loses_its_beginning(engine: Engine) -> None:
    passage = continuation_passage("a", engine, "x y " * 3000, "z")
    assert len(passage.ids) - passage.given == 1 + 1  # the space before it is its own
    assert len(passage.ids) <= engine.model.spec.max_length
    LikelihoodEstimator(engine).score([passage], ["vanilla"])


def test_a_folder_is_read_in_the_order_of_names(engine: Engine, tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", ".git/config", "a/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    data = read_text_data(tmp_path, engine)
    assert [passage.id for passage in data.passages] == ["a/c.txt/0", "b.txt/0"]
    assert data.settings()["bytes"] == len("a/c.txt") + len("b.txt")
    assert len(read_text_data(tmp_path, engine, limit=1).passages) == 1


@pytest.mark.parametrize(("content", "message"), [
    (b"\xff\xfe", "line 1: not UTF-8"),
    (b"one\ntwo <|mask|> three", "line 2: .*cannot encode '<|mask"),
    (b"", "no text"),
])  # fmt: skip
def test_a_text_that_cannot_be_encoded_is_refused(
    content: bytes, message: str, engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(TaskError, match=message.replace("|", r"\|")):
        read_text_data(tmp_path / "a.txt", engine)


def test_a_stopped_run_resumes_with_the_scores_of_a_whole_one(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Tom has 3 boxes of 4 pens.\n" * 60)
    data, estimator = read_text_data(tmp_path / "a.txt", engine), LikelihoodEstimator(engine, 2)
    identity, file = text_identity(estimator, data), tmp_path / "run.jsonl"
    whole = score_text(estimator, data.passages, POLICIES, Journal(None, {}), batch_size=2)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with Journal(file, identity) as journal, pytest.raises(KeyboardInterrupt):
        score_text(estimator, data.passages, POLICIES, journal, batch_size=2, on_score=stop)
    with Journal(file, identity) as journal:
        assert len(journal.steps) == len(POLICIES)
        resumed = score_text(estimator, data.passages, POLICIES, journal, batch_size=2)
    assert resumed == whole
    with Journal(file, identity) as journal:  # nothing is measured again
        broken = replace(estimator, samples=0)
        assert score_text(broken, data.passages, POLICIES, journal, batch_size=2) == whole
    with pytest.raises(ConfigError, match="seed"):
        Journal(file, text_identity(replace(estimator, seed=5), data))
    first, *others = summarize_text(engine.model, data.passages, POLICIES, whole)
    assert first.change is None
    for summary in others:
        assert summary.change is not None
        difference = summary.bits_per_byte.value - first.bits_per_byte.value
        assert summary.change.value == pytest.approx(difference, abs=1e-9)
        assert summary.rise == pytest.approx(difference / first.bits_per_byte.value)
        assert summary.experts < first.experts
