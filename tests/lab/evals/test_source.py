"""Benchmark data: files, folders and the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from types import ModuleType

import pytest
from benchmark_files import ROWS, write_benchmark, write_rows

from coterie.checkpoints import hub
from coterie.errors import CoterieError
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import gsm8k, open_tasks, source


def test_file_folder_parent_and_default_folder_give_the_same_data(tmp_path, monkeypatch):
    write_benchmark(tmp_path)
    locations = [tmp_path, tmp_path / "gsm8k", tmp_path / "gsm8k" / "test.jsonl"]
    sources = [source.read_benchmark(gsm8k.TEST, location) for location in locations]
    monkeypatch.setenv(source.DATA_ENV_VAR, str(tmp_path))
    sources.append(source.read_benchmark(gsm8k.TEST, None))
    assert len(set(map(repr, sources))) == 1
    content = (tmp_path / "gsm8k" / "test.jsonl").read_bytes()
    assert sources[0].settings() == {
        "data": "test.jsonl", "sha256": hashlib.sha256(content).hexdigest(), "rows": 2,
    }  # fmt: skip


def test_jsonl_json_and_gzip_have_the_same_rows(tmp_path):
    plain_file = write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "a.gz").write_bytes(gzip.compress(plain_file.read_bytes(), mtime=0))
    results = [
        source.read_benchmark(gsm8k.TEST, tmp_path / f"a.{end}").rows
        for end in ("jsonl", "json", "gz")
    ]
    assert results[0] == results[1] == results[2] == tuple(ROWS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; expected objects with 'question' (text), 'answer' (text)"),
        (b"\n\n", "empty; expected"),
        (
            b'{"question": "a", "answer": "#### 1"}\n{"question": "b", "ans',
            "line 2: invalid or truncated JSON",
        ),
        (b'{"question": ' + b"9" * 5000 + b"}", "JSON (a number in it has more than"),
        (b'{"question": "a"}\n', "line 1: 'answer' is missing"),
        (b'{"question": "a", "answer": 3}\n', "line 1: 'answer' is not text"),
        (b'{"question": "a", "answer": "b"}\n[1]\n', "line 2: not an object but list"),
        (b'[{"question": "a", "answer": "b"}, 3]', "item 2: not an object but int"),
        (b'[{"question": "a",\n "answer"', "line 2: invalid or truncated JSON"),
        (b'{"question": "a", "answer": "b"}\n\xff\n', "line 2: not UTF-8"),
        (gzip.compress(b"[" * 1000, mtime=0)[:-9], "broken or truncated gzip"),
        (b"\x1f\x8b\x00", "broken or truncated gzip"),
        (b'{"question": "a", "answer": "none"}\n', "row 1: 'none' holds no number"),
    ],
)
def test_a_broken_file_is_reported_with_the_line_and_the_expected_form(tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(CoterieError) as error:
        open_tasks(["gsm8k"], TaskOptions("llada2", data=path))
    assert message in str(error.value)
    assert "broken.jsonl" in str(error.value)


def test_a_location_without_the_data_is_reported(tmp_path):
    for location, message in ((tmp_path / "no", "no such file or folder"), (tmp_path, "neither")):
        with pytest.raises(CoterieError, match=message):
            source.read_benchmark(gsm8k.TEST, location)


def test_two_rows_with_one_id_raise(tmp_path):
    row = {"problem": "1+1?", "answer": "2", "unique_id": "test/a"}
    with pytest.raises(CoterieError, match="two rows with 'unique_id' 'test/a'"):
        open_tasks(
            ["math500"], TaskOptions("llada2", data=write_rows(tmp_path / "m.jsonl", [row, row]))
        )


def test_without_data_the_published_file_is_downloaded(tmp_path, monkeypatch):
    downloads = []

    def deliver(repository: str, file: str, *, repo_type: str) -> str:
        downloads.append((repository, file, repo_type))
        row = {"problem": "1+1?", "answer": "2", "unique_id": "test/a"}
        return str(write_rows(tmp_path / "hub.jsonl", [row]))

    monkeypatch.delenv(source.DATA_ENV_VAR, raising=False)
    monkeypatch.setattr(hub, "hf_hub_download", deliver)
    [task] = open_tasks(["math500"], TaskOptions("llada2"))
    assert downloads == [("HuggingFaceH4/MATH-500", "test.jsonl", "dataset")]
    assert task.settings()["data"] == "HuggingFaceH4/MATH-500"
    assert [item.id for item in task.items()] == ["math500/test/a"]


def test_a_failed_download_is_one_line_with_a_solution(monkeypatch):
    def fail(*_args: object, **_named: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.delenv(source.DATA_ENV_VAR, raising=False)
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(CoterieError, match=r"no route.*`data`.*gsm8k/test.jsonl"):
        source.read_benchmark(gsm8k.TEST, None)


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "test.parquet"
    path.write_bytes(b"PAR1...PAR1")

    class Table:
        def to_pylist(self) -> list[dict[str, object]]:
            return list(ROWS)

    library = ModuleType("pyarrow.parquet")
    library.read_table = lambda _file: Table()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", library)
    assert source.read_benchmark(gsm8k.TEST, path).rows == tuple(ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(CoterieError, match=r"pip install '\.\[harness\]'"):
        source.read_benchmark(gsm8k.TEST, path)
