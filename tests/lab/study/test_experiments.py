"""Every experiment of the study: renderings of its record, and its texts."""

from __future__ import annotations

import ast
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_study import drawings_of, findings_of, lab, tables_of, tally

from coterie.lab import plotting
from coterie.lab.study import speed
from coterie.lab.study.accuracy import ACCURACY, MIN_RELATIVE_ACCURACY, accuracy_findings
from coterie.lab.study.comparison import DEFINITIONS, PolicyComparison
from coterie.lab.study.experiment import Finding, decimal_bytes, read_record
from coterie.lab.study.report import make_section
from coterie.lab.study.results import VariantResults
from coterie.lab.study.study import EXPERIMENTS
from coterie.lab.study.variants import expand_policies

ROOT = Path(__file__).parents[3]


MEASURED = (
    *("accuracy", "block-size", "table-1"),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("beyond", "mass", "experts-per-token", "forwards")
    ),
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
    record = json.loads(json.dumps(experiment.measure(lab(tmp_path, 2)), allow_nan=False))
    for table in tables_of(experiment, record):
        assert {len(row) for row in table.rows} == {len(table.heads)}
        assert max(table.numbers, default=0) < len(table.heads)
    assert all(findings_of(experiment, record))
    assert (name == "table-1") == (not drawings_of(experiment, record))


def test_speed_renders_from_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 1)
    context = lab(tmp_path)
    context.engine.generation = context.engine.generation.replace(max_new_tokens=8)
    experiment = speed.SpeedExperiment()
    record = json.loads(json.dumps(experiment.measure(replace(context, num_prompts=1))))
    (table,) = tables_of(experiment, record)
    assert [row[0] for row in table.rows] == [entry["policy"] for entry in record["timed"]]
    assert {len(row) for row in table.rows} == {len(table.heads)}
    assert all(entry["rounds"][0] > 0 for entry in record["timed"])
    (finding,) = findings_of(experiment, record)
    assert isinstance(finding, Finding)
    assert speed.fastest_des(record)["policy"] in finding.text


@pytest.mark.parametrize("name", DRAWN)
def test_each_kind_of_figure_is_drawn(name: str) -> None:
    record = read_record(study_record(name).parent, name)
    assert record is not None
    named = {each.name: each for each in drawings_of(EXPERIMENTS[name], record["facts"])}
    svg = plotting.render_svg(named[DRAWN[name]].draw, name=name, scheme="light")
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
TEXT_METHODS = ("caption", "drawing", "sentence", "claim", "finding", "table")


def strings_of(tree: ast.AST) -> set[str]:
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def text_keys(name: str) -> set[str]:
    return {key for part in TEXTS[name].values() if isinstance(part, dict) for key in part}


def test_every_text_has_an_experiment_and_every_key_a_user() -> None:
    assert {name for name in TEXTS if "title" in TEXTS[name]} == set(EXPERIMENTS)
    trees = [ast.parse(path.read_text("utf-8")) for path in STUDY.glob("*.py")]
    compared = [each for one in DEFINITIONS.values() for each in one.get("comparisons", ())]
    notes = [note for one in DEFINITIONS.values() for note in one.get("notes", ())]
    strings = set().union(*map(strings_of, trees), (each.get("claim") for each in compared), notes)
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
