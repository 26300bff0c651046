"""The study: what was measured stays, what fails fails alone, the page says what records say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tiny_study import SMALL, Counted, counted, lab, studied, tiny

import coterie
from coterie.cli.entry import run
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.lab.evals.run import Variant
from coterie.lab.study import report
from coterie.lab.study import study as room
from coterie.lab.study.experiment import ExperimentText, StudyContext
from coterie.lab.study.results import JsonObject
from coterie.lab.study.study import EXPERIMENTS


@pytest.fixture(autouse=True)
def empty_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not turned into SVG: that takes most of a study of fakes."""

    def render(draw: Callable[[], Figure], *, name: str, scheme: str) -> str:
        draw()
        return f"<svg><!-- {name}, {scheme} --></svg>"

    monkeypatch.setattr(report, "render_svg", render)


# What is measured, and what is only drawn


def test_second_study_reuses_all_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, measured = tiny(tmp_path), []
    real = [EXPERIMENTS["votes"], counted("a", measured)]
    first, _ = studied(engine, tmp_path, real)
    before = (tmp_path / "report.html").read_text()
    monkeypatch.setattr(Engine, "step", lambda self: pytest.fail("a forward was run"))
    second, watch = studied(engine, tmp_path, real)
    assert measured == ["a"]
    assert [done.measured for done in watch.done] == [False, False]
    assert second == first
    assert (tmp_path / "report.html").read_text() == before


def test_interrupted_study_resumes(tmp_path: Path) -> None:
    """An interrupt, like a kill, passes through whatever a chapter was doing."""
    engine, measured = tiny(tmp_path), []
    a, c = counted("a", measured), counted("c", measured)
    with pytest.raises(KeyboardInterrupt):
        studied(engine, tmp_path, [a, counted("b", measured, error=KeyboardInterrupt()), c])
    sections, _ = studied(engine, tmp_path, [a, counted("b", measured), c])
    assert measured == ["a", "b", "b", "c"]
    assert [one.failure for one in sections] == [None, None, None]


def test_stored_answers_are_reused(tmp_path: Path) -> None:
    """Also when the chapter that asked for them did not come to its end."""
    engine = tiny(tmp_path)
    asked = lab(tmp_path)
    asked.evaluate([Variant("vanilla"), Variant("topk:k=2")])
    lines = (tmp_path / "items" / "items.jsonl").read_text().splitlines()
    again = replace(asked, engine=engine)
    again.evaluate([Variant("topk:k=2"), Variant("topk:k=1"), Variant("vanilla")])
    told = (tmp_path / "items" / "items.jsonl").read_text().splitlines()
    assert told[: len(lines)] == lines
    assert len(told) == len(lines) * 3 // 2


def test_invalid_record_is_measured_again(tmp_path: Path) -> None:
    engine, measured = tiny(tmp_path), []
    chapter = counted("a", measured)
    studied(engine, tmp_path, [chapter])
    path = tmp_path / "records" / "a.json"
    path.write_text(path.read_text()[:-9])
    studied(engine, tmp_path, [chapter])
    studied(engine, tmp_path, [chapter], config=replace(SMALL, items=4))
    engine.generation = engine.generation.replace(block=4)
    studied(engine, tmp_path, [chapter], config=replace(SMALL, items=4))
    assert len(measured) == 4


@pytest.mark.parametrize("key", ["versions", "machine", "command", "when", "seconds", "read"])
def test_a_damaged_record_is_measured_again(tmp_path: Path, key: str) -> None:
    engine, measured = tiny(tmp_path), []
    chapter = counted("a", measured)
    studied(engine, tmp_path, [chapter])
    path = tmp_path / "records" / "a.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), key: 7.5 if key != "seconds" else "x"})
    )
    studied(engine, tmp_path, [chapter])
    assert len(measured) == 2


def test_rerun_includes_dependent_experiments(tmp_path: Path) -> None:
    engine, measured = tiny(tmp_path), []
    chapters = [counted("a", measured), counted("b", measured, reads="a"), counted("c", measured)]
    studied(engine, tmp_path, chapters)
    record = json.loads((tmp_path / "records" / "a.json").read_text())
    record["when"] = "long ago"  # so that the clock's second does not matter
    (tmp_path / "records" / "a.json").write_text(json.dumps(record))
    measured.clear()
    sections, _ = studied(engine, tmp_path, chapters, rerun=["c"])
    assert measured == ["b", "c"]
    assert len(sections) == 3


def test_report_includes_other_experiments_with_a_record(
    tmp_path: Path,
) -> None:
    engine, measured = tiny(tmp_path), []
    chapters = [counted("a", measured), counted("b", measured), counted("c", measured)]
    studied(engine, tmp_path, chapters, names=["a"])
    sections, _ = studied(engine, tmp_path, chapters, names=["c"])
    assert [one.name for one in sections] == ["a", "c"]
    assert measured == ["a", "c"]


def test_record_of_a_deleted_experiment_is_ignored(tmp_path: Path) -> None:
    engine, measured = tiny(tmp_path), []
    studied(engine, tmp_path, [counted("a", measured), counted("old", measured)])
    kept = (tmp_path / "records" / "old.json").read_bytes()
    sections, _ = studied(engine, tmp_path, [counted("a", measured)])
    assert [section.name for section in sections] == ["a"]
    assert (tmp_path / "records" / "old.json").read_bytes() == kept


def test_failed_experiment_does_not_stop_the_study(tmp_path: Path) -> None:
    engine, measured = tiny(tmp_path), []
    chapters = [
        counted("a", measured),
        counted("b", measured, error=CoterieError("needs a larger model")),
        counted("c", measured, error=ZeroDivisionError("by nothing")),
        counted("d", measured, draws=False),
        counted("e", measured),
    ]
    sections, watch = studied(engine, tmp_path, chapters)
    failures = {one.name: one.failure for one in sections if one.failure}
    assert failures["b"] == "needs a larger model"
    assert failures["c"] == "ZeroDivisionError: by nothing"
    assert "cannot be rendered (KeyError: 'line')" in failures["d"]
    assert [done.failure is None for done in watch.done] == [True, False, False, False, True]
    html = (tmp_path / "report.html").read_text()
    assert all(text.replace("'", "&#39;") in html for text in failures.values())
    assert {path.stem for path in (tmp_path / "records").iterdir()} == {"a", "d", "e"}


def test_record_must_be_json(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Odd(Counted):
        def measure(self, context: StudyContext) -> JsonObject:
            return {"value": float("nan")}

    sections, _ = studied(tiny(tmp_path), tmp_path, [Odd(ExperimentText("odd", "Odd", "?"), [])])
    assert sections[0].failure is not None
    assert not (tmp_path / "records" / "odd.json").exists()


def test_record_has_provenance(tmp_path: Path) -> None:
    studied(tiny(tmp_path), tmp_path, [counted("a", [])], command=["coterie", "study"])
    record = json.loads((tmp_path / "records" / "a.json").read_text())
    assert record["command"] == ["coterie", "study"]
    assert record["facts"]["value"] == 1 / 7
    assert {"commit", "machine", "versions", "when", "seconds"} <= set(record)
    assert record["settings"]["items"] == SMALL.items
    assert len(record["settings"]["fingerprint"]) == 16


def test_expert_format_is_part_of_the_settings(tmp_path: Path) -> None:
    studied(tiny(tmp_path), tmp_path, [counted("a", (measured := []))])
    few = coterie.load(
        tmp_path / "model", unmask="fixed:steps=2", block=8, device="cpu", expert_dtype="int4"
    )
    studied(few, tmp_path, [counted("a", measured)])
    assert measured == ["a", "a"]
    record = json.loads((tmp_path / "records" / "a.json").read_text())
    assert record["settings"]["experts"] == "int4 in groups of 32"
    studied(few, tmp_path, [counted("a", measured)])
    assert measured == ["a", "a"]


# The command


def test_other_model_needs_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "some/model", "-o", "never"]) == 2
    said = capsys.readouterr().err
    assert "--task" in said
    assert "gsm8k" in said


@pytest.mark.parametrize("flag", ["--experiment", "--rerun", "--task"])
def test_unknown_name_lists_the_known_ones(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["study", "-o", str(tmp_path), flag, "bogus"]) == 2
    said = capsys.readouterr().err
    assert "unknown" in said
    assert ("words" if flag == "--task" else "explosion") in said


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rooms = ("coterie.lab.study", "coterie.lab.plotting")
    for name in [name for name in sys.modules if name.startswith(rooms)]:
        monkeypatch.delitem(sys.modules, name)
    for room_name in rooms:
        monkeypatch.delattr(room_name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["study", "-o", str(tmp_path)]) == 2
    assert "pip install '.[lab]'" in capsys.readouterr().err


@pytest.mark.parametrize(("broken", "status"), [(None, 0), (CoterieError("too small"), 1)])
def test_exit_status_reports_failures(
    broken: CoterieError | None,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(room, "EXPERIMENTS", {"a": counted("a", [], error=broken)})
    assert run(["study", "-o", str(tmp_path / "out"), "--quick"]) == status
    said = capsys.readouterr()
    assert said.out.endswith(f"{tmp_path / 'out' / 'report.html'}\n")
    assert ("too small" in said.out) == (status == 1)
    assert "1 of 1, a: " in said.err
