"""The study: what was measured stays, what fails fails alone, the page says what records say."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from script_modules import load_script
from tiny_task import Quiz

import coterie
from coterie.cli.entry import run
from coterie.engine.engine import Engine
from coterie.errors import CheckpointError, CoterieError
from coterie.lab import plotting
from coterie.lab.evals.cached_grading import CachedGradesTask
from coterie.lab.evals.run import Variant
from coterie.lab.study import speed
from coterie.lab.study import study as room
from coterie.lab.study.accuracy import ACCURACY, MIN_RELATIVE_ACCURACY, accuracy_findings
from coterie.lab.study.charts import pareto_front
from coterie.lab.study.comparison import DEFINITIONS, PolicyComparison
from coterie.lab.study.context import StudyContext, read_record
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    decimal_bytes,
)
from coterie.lab.study.experts_per_token import (
    LimitTopK,
    evaluate_policy,
)
from coterie.lab.study.paired import claim_finding, compare_pairs, is_better
from coterie.lab.study.report import (
    ReportSection,
    collect_claims,
    make_section,
    render_markdown,
    render_page,
)
from coterie.lab.study.results import JsonObject, VariantResult, VariantResults
from coterie.lab.study.study import EXPERIMENTS, ExperimentOutcome, StudyConfig, run_study
from coterie.lab.study.variants import (
    MAX_EXPERT_DIFFERENCE,
    coreset_size,
    expand_policies,
    run_comparison,
    vote_of_size,
)
from coterie.routing import POLICIES, Vanilla, parse_policy, route
from coterie.testing import write_checkpoint
from coterie.values import RouterSpec, Scores

ROOT = Path(__file__).parents[3]
SMALL = StudyConfig(items=6, prompts=2, seed=1)
QUIZ = Quiz(count=6, tokens=8)
HOSTILE = '<script src="http://evil.example/x.js"></script> & "quotes"'


@dataclass(frozen=True)
class Counted(Experiment):
    """An experiment that counts its measurements; it may read another record, or fail."""

    text: ExperimentText
    measured: list[str]
    reads: str = ""
    error: BaseException | None = None
    draws: bool = True

    def measure(self, context: StudyContext) -> JsonObject:
        context.on_progress(0.5, "counting")
        self.measured.append(self.name)
        if self.error is not None:
            raise self.error
        other = context.record(self.reads) if self.reads else {}
        return {"value": len(self.measured) / 7, "hostile": HOSTILE, "other": other}

    def drawings(self, record: JsonObject) -> Sequence[Drawing]:
        return [Drawing(f"{self.name}-figure", HOSTILE, lambda: self._figure(record))]

    def tables(self, record: JsonObject) -> Sequence[Table]:
        return [Table(["what", "value"], [[HOSTILE, f"{record['value']:.3f}"]], "Values", [1])]

    def findings(self, record: JsonObject) -> Sequence[Finding | str]:
        return [Finding(f"It is {record['value']:.3f}.", HOSTILE, "does not hold"), HOSTILE]

    def _figure(self, record: JsonObject) -> Figure:
        if not self.draws:
            raise KeyError("line")
        figure, ax = plotting.new_axes("x", str(record["hostile"]))
        ax.plot([0, 1], [0, float(str(record["value"]))], label="a line")
        plotting.add_legend(ax)
        return figure


def counted(
    name: str,
    measured: list[str],
    *,
    reads: str = "",
    error: BaseException | None = None,
    draws: bool = True,
) -> Counted:
    text = ExperimentText(name, "A chapter (Fig. 0)", "How often?")
    return Counted(text, measured, reads, error, draws)


@dataclass
class Looking:
    """Remembers what it was shown."""

    done: list[ExperimentOutcome] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)

    def on_experiment_start(self, chapter: Experiment, wanted: Sequence[Experiment]) -> None:
        assert chapter in wanted

    def on_progress(self, share: float, doing: str) -> None:
        assert doing
        self.moves.append(share)

    def on_experiment_end(self, done: ExperimentOutcome) -> None:
        self.done.append(done)


def tiny(folder: Path) -> Engine:
    """A random model with 16 experts and top-4."""
    where = write_checkpoint(folder / "model", "llada2", seed=3)
    return coterie.load(where, unmask="fixed:steps=2", block=8, device="cpu")


def studied(
    engine: Engine, folder: Path, chapters: Sequence[Experiment], **options: object
) -> tuple[list[ReportSection], Looking]:
    watch = Looking()
    known = {chapter.name: chapter for chapter in chapters}
    asked: dict = {"config": SMALL, **options}
    return run_study(engine, [QUIZ], folder, observer=watch, experiments=known, **asked), watch


def lab(folder: Path, items: int = 6) -> StudyContext:
    return StudyContext(tiny(folder), [QUIZ], folder, items, 2, 1, lambda share, doing: None)


def tally(name: str, right: str, experts: float = 10.0) -> VariantResult:
    return VariantResult(name, name, {}, {"quiz": right}, experts, 1.0, 1.0, 1.0, 8.0, 1.0, 0)


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
        tmp_path / "model", unmask="fixed:steps=2", block=8, device="cpu", experts="int4"
    )
    studied(few, tmp_path, [counted("a", measured)])
    assert measured == ["a", "a"]
    record = json.loads((tmp_path / "records" / "a.json").read_text())
    assert record["settings"]["experts"] == "int4 in groups of 32"
    studied(few, tmp_path, [counted("a", measured)])
    assert measured == ["a", "a"]


# The page


class Reader(HTMLParser):
    """Checks that elements nest, and gathers what is loaded, what has ids, and all text."""

    VOID = ("meta", "br", "link", "img", "hr", "input", "source")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [str(values["id"])] if "id" in values else []
        self.loads += [str(values[key]) for key in ("src", "srcset", "data") if key in values]
        self.links += [str(values[key]) for key in ("href", "xlink:href") if key in values]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_page_is_self_contained(tmp_path: Path) -> None:
    chapters = [counted("a", []), counted("b", [])]
    sections, _ = studied(tiny(tmp_path), tmp_path, chapters)
    html = (tmp_path / "report.html").read_text()
    reader = read(html)
    assert reader.loads == []
    assert all(link.startswith("#") for link in reader.links)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert not re.search(r"url\((?!#)|@import", html)
    assert "script" not in {tag for tag, _ in reader.tags}
    for scheme in ("light", "dark"):
        drawn = [values for _, values in reader.tags if values.get("class") == scheme]
        assert [values["aria-label"] for values in drawn] == [HOSTILE, HOSTILE]
        assert all(values["role"] == "img" for values in drawn)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert len(sections) == 2


def test_claims_are_collected_by_experiment() -> None:
    said = [Finding("a", "Big", "holds"), Finding("b", "Big", "does not hold"), Finding("c")]
    one = ReportSection("one", "One", "?", findings=(*said, Finding("d", "Big", "holds")))
    other = ReportSection("other", "Other", "?", findings=(Finding("e", "Big", "inconclusive"),))
    told = [(claim.section.name, claim.verdict_texts) for claim in collect_claims([one, other])]
    assert told == [
        ("one", [("holds", "holds (2)"), ("does not hold", "does not hold (1)")]),
        ("other", [("inconclusive", "inconclusive")]),
    ]


def test_page_numbers_equal_the_record(tmp_path: Path) -> None:
    studied(tiny(tmp_path), tmp_path, [counted("a", [])])
    value = json.loads((tmp_path / "records" / "a.json").read_text())["facts"]["value"]
    text = read((tmp_path / "report.html").read_text()).text
    assert f"It is {value:.3f}." in text
    assert text.count(f"{value:.3f}") == 2


def test_figures_are_written_as_files(tmp_path: Path) -> None:
    studied(tiny(tmp_path), tmp_path, [counted("a", [])])
    light, dark = (
        (tmp_path / "figures" / f"a-figure-{s}.svg").read_text() for s in plotting.BACKGROUND
    )
    html = (tmp_path / "report.html").read_text()
    assert light.strip() in html
    assert dark.strip() in html
    assert plotting.BACKGROUND["dark"] in dark
    assert plotting.BACKGROUND["dark"] not in light


def test_full_disk_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, measured = tiny(tmp_path), []
    studied(engine, tmp_path, [counted("a", measured)])
    old = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fill(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(CheckpointError, match="No space left"):
        studied(engine, tmp_path, [counted("a", measured)])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == old


def test_page_without_experiments() -> None:
    assert "nothing yet" in read(render_page([])).text


# The look


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("paper", plotting.BACKGROUND.values())
def test_series_colours_have_contrast(paper: str) -> None:
    colours = {*plotting.SERIES_COLOURS, *(look.colour for look in plotting.POLICY_STYLES.values())}
    assert min(contrast(colour, paper) for colour in colours) >= 3


def test_text_has_contrast() -> None:
    assert (
        min(
            contrast(plotting.FOREGROUND[scheme], plotting.BACKGROUND[scheme])
            for scheme in plotting.BACKGROUND
        )
        >= 7
    )


def test_every_policy_has_its_own_style() -> None:
    assert set(POLICIES) <= set(plotting.POLICY_STYLES)
    looks = [plotting.policy_style(name) for name in POLICIES]
    assert len({(look.colour, look.marker) for look in looks}) == len(looks)
    assert plotting.policy_style("des-vote:beta=0.3") == plotting.POLICY_STYLES["des-vote"]
    assert plotting.policy_style("of-somebody-else:x=1") == plotting.OTHER_STYLE


def test_figures_are_reproducible() -> None:
    chapter = counted("a", [])
    drawing = chapter.drawings({"value": 1.0, "hostile": "right & wrong"})[0]
    first, second = (plotting.render_svg(drawing.draw, name="one", scheme="dark") for _ in range(2))
    other = plotting.render_svg(drawing.draw, name="other", scheme="dark")
    assert first == second
    assert "right &amp; wrong</text>" in first
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, other)]
    assert ids[0] & ids[1] == set()
    assert all(f'id="{name}"' in first for name in re.findall(r'href="#([^"]+)"', first))


# Comparing arms

BITS = st.integers(2, 40).flatmap(lambda n: st.tuples(*[st.text("01", min_size=n, max_size=n)] * 2))


@given(BITS)
def test_variant_result_round_trip(bits: tuple[str, str]) -> None:
    first, second = tally("vanilla", bits[0]), tally("topk:k=2", bits[1])
    document = json.loads(json.dumps(second.to_json(first)))
    assert VariantResult.from_json(document) == second
    right = sum(digit == "1" for digit in bits[1])
    assert document["accuracy"]["right"] == right
    changed = sum(int(b) - int(a) for a, b in zip(*bits, strict=True))
    assert document["change"]["gained"] - document["change"]["lost"] == changed


@given(st.lists(BITS, min_size=1, max_size=4))
def test_comparison_is_antisymmetric(pairs: list[tuple[str, str]]) -> None:
    forth = compare_pairs([(tally("a", a), tally("b", b)) for a, b in pairs])
    back = compare_pairs([(tally("b", b), tally("a", a)) for a, b in pairs])
    assert [duel.sign for duel in forth] == [-duel.sign for duel in back]
    if {duel.sign for duel in forth} == {0}:
        assert is_better(forth) is is_better(back) is None


def test_claim_holds_with_wins_and_no_losses() -> None:
    names = {"second": "b", "first": "a", "condition": "at equal experts"}
    bad, good = "0" * 30 + "1" * 10, "1" * 40
    won, lost = (tally("a", bad), tally("b", good)), (tally("a", good), tally("b", bad))
    even = (tally("a", good), tally("b", good))
    assert is_better(compare_pairs([won, even])) is True
    assert is_better(compare_pairs([won, lost])) is False
    assert is_better(compare_pairs([even])) is None
    told = claim_finding("B is better.", [won, even], **names)
    assert "better than a in 1, worse in 0 and not significantly different in 1" in told.text
    assert "+75.0%" in told.text
    assert claim_finding("B is better.", [], **names).verdict == "inconclusive"


POINTS = st.lists(
    st.tuples(st.floats(0, 99), st.text("01", min_size=8, max_size=8)), min_size=1, max_size=12
)


@given(POINTS)
def test_pareto_front_of_results(
    points: list[tuple[float, str]],
) -> None:
    tallies = [tally(str(n), right, experts) for n, (experts, right) in enumerate(points)]
    front = pareto_front(tallies, lambda one: (one.experts, one.accuracy))
    for one, other in pairwise(front):
        assert one.experts <= other.experts
        assert one.accuracy < other.accuracy
    for one in tallies:
        assert any(f.experts <= one.experts and f.accuracy >= one.accuracy for f in front)


@given(st.integers(1, 512).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total))))
def test_vote_of_size_has_that_size(sizes: tuple[int, int]) -> None:
    size, total = sizes
    assert coreset_size(vote_of_size(size, total).policy, total) == size


def test_votes_are_matched_at_equal_experts(tmp_path: Path) -> None:
    others = ["topk:k={1,2}", "random:beta=0.5"]
    votes = "des-vote:beta={0.25,0.75}"
    arms = run_comparison(
        lab(tmp_path), {"votes": votes, "others": others}, rivals={"des-vote": others}
    )
    assert arms.pairs
    for other, vote in arms.pairs:
        assert other.name in {"topk:k=1", "topk:k=2", "random:beta=0.5"}
        assert vote.name.startswith("des-vote:beta=")
        assert abs(other.experts - vote.experts) <= MAX_EXPERT_DIFFERENCE


def test_comparison_uses_the_same_items(tmp_path: Path) -> None:
    measured = run_comparison(lab(tmp_path), {"all": "des-vote:beta=1.0"})
    arms = VariantResults.from_record(json.loads(json.dumps(measured.to_record())))
    assert arms == measured
    assert arms.vanilla.name == "vanilla"
    seq = arms.groups["all"][0]
    assert seq.correct_flags() == arms.vanilla.correct_flags()  # with all experts in the coreset
    assert seq.experts == arms.vanilla.experts
    assert arms.vanilla.accuracy_share().n == 6


def test_grades_are_cached_by_item_and_output() -> None:
    task = CachedGradesTask(QUIZ)
    first, second = task.items()[:2]
    outputs = ["1 2", "3 4", "1 2"]
    told = [task.grade(output, item) for item in (first, second) for output in outputs]
    assert told == [QUIZ.grade(output, item) for item in (first, second) for output in outputs]
    assert len(task.grades) == 4


SCORES = st.tuples(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 4))


@given(SCORES)
def test_limited_k_uses_the_best_of_the_coreset(drawn: tuple[int, int, int]) -> None:
    seed, tokens, k = drawn
    router = RouterSpec(experts=16, k=4, activation="sigmoid", renormalise=True)
    logits = torch.randn((2, tokens, 16), generator=torch.Generator().manual_seed(seed))
    scores = Scores(logits=logits, router=router)
    wide = parse_policy("des-vote:beta=0.5")
    ids = route(scores, wide).topk_ids
    assert route(scores, LimitTopK(wide, k)).topk_ids[:, :k].equal(ids[:, :k])
    assert (route(scores, LimitTopK(wide, k)).topk_ids[:, k:] == -1).all()
    assert route(scores, LimitTopK(Vanilla(), 4)).topk_ids.equal(route(scores, Vanilla()).topk_ids)


def test_policy_object_equals_its_spelling(tmp_path: Path) -> None:
    asked = lab(tmp_path)
    own = evaluate_policy(asked, parse_policy("topk:k=2"), "mine", "topk:k=2")
    kept = asked.evaluate([Variant("topk:k=2")])[0]
    same = replace(own, name=kept.name, tokens_per_second=kept.tokens_per_second)
    assert same == kept


# The chapters


MEASURED = (
    *("accuracy", "beyond", "mass", "block-size", "experts-per-token", "table-1", "forwards"),
)
DRAWN = {  # a record's experiment -> one figure of each kind
    "accuracy": "accuracy-few",
    "voters": "voters",
    "forwards": "forwards",
    "block-size": "block-size",
    "latency-accuracy": "latency-accuracy",
    "speed": "speed",
}


@pytest.mark.parametrize("name", MEASURED)
def test_experiment_renders_from_its_record(name: str, tmp_path: Path) -> None:
    experiment = EXPERIMENTS[name]
    record = json.loads(json.dumps(experiment.measure(lab(tmp_path)), allow_nan=False))
    for table in experiment.tables(record):
        assert {len(row) for row in table.rows} == {len(table.heads)}
        assert max(table.numbers, default=0) < len(table.heads)
    assert all(experiment.findings(record))
    assert (name == "table-1") == (not experiment.drawings(record))


def test_speed_renders_from_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 1)
    context = lab(tmp_path)
    context.engine.generation = context.engine.generation.replace(max_new_tokens=8)
    experiment = speed.SpeedExperiment()
    record = json.loads(json.dumps(experiment.measure(replace(context, num_prompts=1))))
    (table,) = experiment.tables(record)
    assert [row[0] for row in table.rows] == [entry["policy"] for entry in record["timed"]]
    assert {len(row) for row in table.rows} == {len(table.heads)}
    assert all(entry["rounds"][0] > 0 for entry in record["timed"])
    (finding,) = experiment.findings(record)
    assert isinstance(finding, Finding)
    assert speed.fastest_des(record)["policy"] in finding.text


@pytest.mark.parametrize("name", DRAWN)
def test_each_kind_of_figure_is_drawn(name: str) -> None:
    record = json.loads(study_record(name).read_text(encoding="utf-8"))["facts"]
    drawings = {drawing.name: drawing for drawing in EXPERIMENTS[name].drawings(record)}
    svg = plotting.render_svg(drawings[DRAWN[name]].draw, name=name, scheme="light")
    assert svg.startswith("<svg")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_figure_is_drawn_in_both_schemes(name: str) -> None:
    record = read_record(study_record(name).parent, name)
    section = make_section(EXPERIMENTS[name], record)
    assert section.failure is None
    assert all(figure.svg["light"] != figure.svg["dark"] for figure in section.figures)


def study_record(name: str) -> Path:
    return ROOT / "results" / "study" / f"{name}.json"


def test_headline_verdict_uses_the_smallest_accurate_policy() -> None:
    n = 100
    groups = {
        label: [tally(arm.name, "1" * 30 + "0" * 70) for arm in expand_policies(templates, 4)]
        for label, templates in ACCURACY.groups.items()
    }
    arms = VariantResults(128, 4, 32, {"vanilla": tally("vanilla", "1" * n, 80.0)}, groups, [])

    def judged(experts: float, right: int) -> Finding:
        vote = tally("des-vote:beta=0.3", "1" * right + "0" * (n - right), experts)
        changed = {**groups, "DES-Vote": [*groups["DES-Vote"], vote]}
        found = accuracy_findings(ACCURACY.text, replace(arms, groups=changed))
        return next(f for f in found if isinstance(f, Finding) and "55 %" in f.claim)

    assert judged(35.0, int(MIN_RELATIVE_ACCURACY * n)).verdict == "holds"
    assert judged(37.0, int(MIN_RELATIVE_ACCURACY * n)).verdict == "does not hold"
    assert judged(35.0, int(MIN_RELATIVE_ACCURACY * n) - 1).verdict == "does not hold"
    arms = replace(arms, by_name={"vanilla": tally("vanilla", "0" * n, 80.0)})
    assert judged(35.0, 0).verdict == "inconclusive"


def test_experiments_have_names_and_questions() -> None:
    assert all(chapter.name == name for name, chapter in EXPERIMENTS.items())
    assert all(chapter.text.question.endswith("?") for chapter in EXPERIMENTS.values())
    titles = [chapter.text.title for chapter in EXPERIMENTS.values()]
    assert len(set(titles)) == len(titles)


STUDY = ROOT / "src" / "coterie" / "lab" / "study"
TEXTS = {path.stem: tomllib.loads(path.read_text("utf-8")) for path in STUDY.glob("texts/*.toml")}
TEXT_METHODS = ("caption", "sentence", "claim", "finding", "table")


def strings_of(tree: ast.AST) -> set[str]:
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def text_keys(name: str) -> set[str]:
    return {key for part in TEXTS[name].values() if isinstance(part, dict) for key in part}


def test_every_text_has_an_experiment_and_every_key_a_user() -> None:
    assert {name for name in TEXTS if "title" in TEXTS[name]} == set(EXPERIMENTS)
    trees = [ast.parse(path.read_text("utf-8")) for path in STUDY.glob("*.py")]
    compared = [each for one in DEFINITIONS.values() for each in one.get("comparisons", ())]
    strings = set().union(*map(strings_of, trees), (each.get("claim") for each in compared))
    assert {name: unused for name in TEXTS if (unused := text_keys(name) - strings)} == {}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_comparisons_are_of_known_groups_and_claims(name: str) -> None:
    comparison = PolicyComparison.load(name)
    for each in comparison.comparisons:
        assert {each.second, *each.first} <= set(comparison.groups)
        assert not each.claim or each.claim in comparison.text.claims
    used = {label for labels in (comparison.charts or {}).values() for label in labels}
    assert used <= set(comparison.groups)
    variants = [v for group in comparison.groups.values() for v in expand_policies(group, 8)]
    rivals = [v for group in comparison.rivals.values() for v in expand_policies(group, 8)]
    assert {rival.name for rival in rivals} <= {variant.name for variant in variants}


def test_every_key_that_a_module_uses_is_in_a_text() -> None:
    for path in STUDY.glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        own = (strings_of(tree) & set(TEXTS)) or set(TEXTS)
        known = set().union(*map(text_keys, own))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
        for call in calls:
            is_text = isinstance(call.func, ast.Attribute) and call.func.attr in TEXT_METHODS
            if is_text and isinstance(key := call.args[0], ast.Constant):
                assert key.value in known, f"{path.name}: {key.value}"


def test_format_bytes() -> None:
    assert [decimal_bytes(size) for size in (999, 24_576, 6_291_456)] == [
        "999 B",
        "24.6 KB",
        "6.3 MB",
    ]


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


# The document


def test_markdown_has_the_content_of_the_page(tmp_path: Path) -> None:
    chapter = counted("a", [])
    studied(tiny(tmp_path), tmp_path, [chapter])
    record = json.loads((tmp_path / "records" / "a.json").read_text())
    one = make_section(chapter, record, schemes=())
    text = render_markdown([one], records="results/study", experts="16 experts", figures=())
    assert f"| {HOSTILE} | {record['facts']['value']:.3f} |" in text
    assert "✗ does not hold" in text
    assert "(#a-chapter-fig-0)" in text
    assert "`results/study/a.json`" in text
    assert "<picture>" not in text
    shown = render_markdown([one], records="r", experts="16 experts", figures=["a-figure"])
    assert "figures/a-figure-dark.svg" in shown


def test_results_page_equals_the_committed_records() -> None:
    docs = load_script("docs.py")
    found = docs.report_sections(())
    assert len(found) == len(EXPERIMENTS), "a chapter has no record under results/study"
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == docs.results_page(found)
    named = set(re.findall(r"figures/[\w-]+\.svg", written))
    assert named
    assert all((ROOT / "docs" / name).is_file() for name in named)
