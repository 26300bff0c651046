"""``coterie bench``: its records, their figures, and what a stopped run keeps."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coterie.cli import bench_output
from coterie.cli.entry import run
from coterie.files import LockedFile
from coterie.lab.bench import forward, layer
from coterie.lab.bench.plots import make_chart


@pytest.fixture(autouse=True)
def small_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here depends on what the processor's cache holds."""
    monkeypatch.setattr(layer, "FLUSH_BYTES", 1 << 12)


@pytest.fixture
def plotted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The records that would be drawn."""
    names: list[str] = []
    monkeypatch.setattr(bench_output, "plot_record", lambda path: names.append(path.name) or [])
    return names


def test_the_layer_command_writes_a_record_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "layer", "--shape", "tiny", "--baseline", "none", "--repeats", "2"]
    assert (
        run(
            [*arguments, "--json", "-p", "vanilla", "-p", "des-vote:beta=0.25", "-o", str(tmp_path)]
        )
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "bench-layer-tiny-bf16.json").read_text())
    assert document == {"schema": 2, **record}
    assert [each["policy"] for each in record["facts"]["policies"]] == [
        "vanilla",
        "des-vote:beta=0.25",
    ]
    chart = make_chart(record)
    assert set(chart.rows) == {"read", "ours"}
    samples = {each["name"]: each["samples"] for each in record["measures"]}
    assert chart.samples["vanilla"]["ours"] == samples["vanilla ours"]
    figure = tmp_path / "bench-layer-tiny-bf16-dark.svg"
    before = figure.read_text()
    figure.unlink()
    assert run(["bench", "plot", str(tmp_path / "bench-layer-tiny-bf16.json")]) == 0
    assert figure.read_text() == before
    assert "des-vote:beta=0.25" in before


def test_forward_and_generate_write_records_with_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plotted: list[str]
) -> None:
    options = ["--shape", "tiny", "--repeats", "1", "-o", str(tmp_path), "-p", "des-vote:beta=0.25"]
    assert run(["bench", "forward", *options, "--layers", "2", "--context", "0"]) == 0
    capsys.readouterr()
    assert run(["bench", "generate", *options, "--num-prompts", "1", "--tokens", "8"]) == 0
    vanilla = next(line for line in capsys.readouterr().out.splitlines() if "vanilla " in line)
    assert vanilla.rstrip().endswith("1 of 1")  # texts as vanilla
    forward = json.loads((tmp_path / "bench-forward-tiny-int8-2-layers.json").read_text())
    assert set(make_chart(forward).rows) == {"read", "floor", "forward"}
    assert forward["facts"]["wanted"] == "block"
    generate = json.loads((tmp_path / "generate-random-tiny-cpu.json").read_text())
    assert make_chart(generate).rows == ["vanilla", "des-vote:beta=0.25"]
    assert plotted == [
        "bench-forward-tiny-int8-2-layers.json",
        "generate-random-tiny-cpu.json",
    ]


def test_serve_writes_a_record_with_a_figure(tmp_path: Path, plotted: list[str]) -> None:
    options = ["--shape", "tiny", "--repeats", "1", "-o", str(tmp_path), "-p", "vanilla"]
    options += ["--batch-size", "1", "--batch-size", "2"]
    assert run(["bench", "serve", *options, "--tokens", "8"]) == 0
    record = json.loads((tmp_path / "bench-serve-random-tiny-cpu.json").read_text())
    assert [each["rows"] for each in record["facts"]["settings"]] == [1, 2]
    chart = make_chart(record)
    assert (list(chart.rows), list(chart.samples)) == (["1 row", "2 rows"], ["vanilla"])
    assert plotted == ["bench-serve-random-tiny-cpu.json"]


@pytest.mark.usefixtures("plotted")
def test_other_sizes_have_other_record_names(tmp_path: Path) -> None:
    options = ["--shape", "tiny", "--repeats", "1", "-o", str(tmp_path), "-p", "vanilla"]
    assert run(["bench", "layer", *options, "--baseline", "none", "--tokens", "8"]) == 0
    assert run(["bench", "forward", *options, "--tokens", "8", "--context", "0"]) == 0
    distinct = [*options, "--num-prompts", "1", "--tokens", "8"]
    assert run(["bench", "generate", *distinct, "--dtype", "int8", "--layers", "2"]) == 0
    assert run(["bench", "generate", *distinct, "--dtype", "bf16"]) == 0
    assert {path.stem for path in tmp_path.glob("*.json")} == {
        "bench-layer-tiny-bf16-8-tokens",
        "bench-forward-tiny-int8-8-tokens",
        "generate-random-tiny-cpu-int8-2-layers",
        "generate-random-tiny-cpu",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--shape", "llada3"], "unknown shape 'llada3'"),
        (
            ["layer", "--baseline", "none", "--baseline", "torch"],
            "has no effect with --baseline none",
        ),
        (["layer", "--baseline", "none", "--include-slow"], "--include-slow has no effect"),
        (
            ["layer", "--baseline", "none", "--baseline-memory", "2"],
            "--baseline-memory has no effect",
        ),
        (["layer", "--baseline-python", "zentorch"], "not NAME=PATH"),
        (["layer", "--baseline", "torch", "--baseline-python", "zentorch=x"], "not one of torch"),
        (["layer", "-p", "des-votes"], "unknown policy"),
        (["layer", "--threads", "99999"], "--threads 99999: this machine has"),
        (["forward", "--threads", "99999"], "--threads 99999: this machine has"),
        (["generate", "--threads", "99999"], "--threads 99999: this machine has"),
        (["forward", "--shape", "tiny", "--layers", "1"], "must be 2 to 3"),
        (["forward", "--logits", "most"], "neither a number nor block"),
        (["forward", "--logits", "0"], "must be 1 to 32"),
        (["generate", "--layers", "2"], "--layers needs --shape"),
        (["generate", "--shape", "tiny", "--dtype", "fp8"], "known: fp32, bf16, int8, int4"),
        (["generate", "--prompt", "a", "--num-prompts", "3"], "--num-prompts has no effect"),
        (["generate", "--model", "some/where"], "--model needs --prompt"),
        (["plot", "pyproject.toml"], "not a JSON file"),
    ],
)
def test_a_refusal_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1


def test_the_command_alone_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench"]) == 0
    assert "generate" in capsys.readouterr().out


SHORT = ["bench", "forward", "--shape", "tiny", "--repeats", "3", "-p", "vanilla"]


@pytest.mark.usefixtures("plotted")
def test_the_tiny_shape_works_with_the_defaults_and_stays_out_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "forward", "--shape", "tiny", "--repeats", "1"]) == 0
    record = json.loads((tmp_path / "runs/bench/bench-forward-tiny-int8.json").read_text())
    assert record["facts"]["context"] == 480
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.usefixtures("plotted")
def test_a_record_is_not_replaced_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SHORT[:4], "--repeats", "1", "-p", "vanilla", "-o", str(tmp_path)]
    assert run(words) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(forward, "random_blocks", None)  # refused before any work
    assert run(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    assert run([*words, "--overwrite"]) == 0
    assert (tmp_path / "bench-forward-tiny-int8.json").read_bytes() != before


@pytest.mark.usefixtures("plotted")
def test_a_stopped_benchmark_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    time_block, calls = forward._time_block, 0

    def stop(*arguments: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 20:  # in the third repeat of 8 forwards
            raise KeyboardInterrupt
        return time_block(*arguments)

    monkeypatch.setattr(forward, "_time_block", stop)
    words = [*SHORT, "-o", str(tmp_path)]
    with suppress(KeyboardInterrupt):
        assert run(words) == 130
    assert "keeps 2 measurements" in capsys.readouterr().err
    journal = tmp_path / "bench-forward-tiny-int8.journal"
    kept = [json.loads(line)[1] for line in journal.read_text().splitlines()[1:]]
    assert run([*words, "--context", "32"]) == 2
    assert "context differ" in capsys.readouterr().err
    assert run(words) == 0
    assert calls == 20 + 8
    record = json.loads((tmp_path / "bench-forward-tiny-int8.json").read_text())
    (forwards,) = (m["samples"] for m in record["measures"] if m["name"] == "vanilla forward")
    assert forwards[:2] == [repeat["vanilla"]["forward"] * 1e3 for repeat in kept]
    assert len(forwards) == 3
    assert not journal.exists()


def test_two_benchmarks_of_one_record_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LockedFile(tmp_path / "bench-forward-tiny-int8.journal"):
        assert run([*SHORT, "-o", str(tmp_path)]) == 2
    assert "another process" in capsys.readouterr().err


def test_the_table_is_shown_where_the_record_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(folder: Path, content: object) -> Path:
        del content
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "x.json"))

    monkeypatch.setattr(bench_output, "write_record", full_disk)
    assert run([*SHORT, "-o", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "vanilla" in shown.out
    assert "x.json: No space left" in shown.err
    assert (tmp_path / "bench-forward-tiny-int8.journal").exists()


def test_a_benchmark_killed_between_its_record_and_its_figures_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Killed(BaseException):
        pass

    def kill(path: Path) -> list[Path]:
        raise Killed(path)

    words = [*SHORT, "-o", str(tmp_path)]
    monkeypatch.setattr(bench_output, "plot_record", kill)
    with pytest.raises(Killed):
        run(words)
    names = {path.suffix for path in tmp_path.iterdir()}
    assert names == {".json", ".journal"}
    monkeypatch.setattr(bench_output, "plot_record", lambda path: [tmp_path / "figure.svg"])
    assert run(words) == 0
    assert "figure.svg" in capsys.readouterr().err
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
    assert run(words) == 2
