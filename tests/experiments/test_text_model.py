"""The corpus of the text model and its baseline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import text_corpus
from experiments.text_model import trigram_bits


def test_corpus_is_split_by_file_and_leaves_tests_and_other_languages_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library, out = tmp_path / "library", tmp_path / "out"
    files = {f"module{i}.py": f"x = {i}\n" * 60 for i in range(80)}
    files |= {"test/part.py": "x = 1\n" * 60, "greek.py": "# αβγδ\n" * 60, "short.py": "x\n"}
    for name, content in files.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(content)
    monkeypatch.setattr(text_corpus, "PACKAGES", ())
    monkeypatch.setattr(text_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    records = [{"task_id": i, "text": "t", "code": f"c{i}", "test_list": []} for i in (510, 601)]
    mbpp = tmp_path / "mbpp.jsonl"
    mbpp.write_text("\n".join(map(json.dumps, records)))
    assert text_corpus.main(["--out", str(out), "--mbpp", str(mbpp)]) == 0
    sources = json.loads(capsys.readouterr().out)
    halves = [sources["python"][half]["files"] for half in ("train", "held-out")]
    assert sum(halves) == 80
    assert all(halves)
    written = [path.read_text() for path in out.rglob("*.txt")]
    assert sum("c601" in text for text in written) == 1
    assert not any("c510" in text for text in written)


@given(st.lists(st.integers(0, 9), min_size=3, max_size=40))
def test_trigram_is_a_distribution(history: list[int]) -> None:
    train = np.array([*range(10), *history], np.uint16)
    prefix = history[:2]
    ends = [trigram_bits(train, np.array([*prefix, token], np.uint16)) for token in range(10)]
    shared = trigram_bits(train, np.array(prefix, np.uint16))
    assert sum(2.0 ** (shared - end) for end in ends) == pytest.approx(1)
