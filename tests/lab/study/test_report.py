"""The report: one page without other files, readable colours, and the results page."""

from __future__ import annotations

import errno
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from script_modules import load_script
from tiny_study import HOSTILE, counted, drawings_of, studied, tiny

from coterie.errors import CheckpointError
from coterie.lab import plotting
from coterie.lab.study.experiment import Finding
from coterie.lab.study.report import (
    ReportSection,
    collect_claims,
    make_section,
    render_markdown,
    render_page,
    render_section,
)
from coterie.lab.study.study import EXPERIMENTS
from coterie.routing import POLICIES

ROOT = Path(__file__).parents[3]


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


# Colours


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
    drawing = drawings_of(chapter, {"value": 1.0, "hostile": "right & wrong"})[0]
    first, second = (plotting.render_svg(drawing.draw, name="one", scheme="dark") for _ in range(2))
    other = plotting.render_svg(drawing.draw, name="other", scheme="dark")
    assert first == second
    assert "right &amp; wrong</text>" in first
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, other)]
    assert ids[0] & ids[1] == set()
    assert all(f'id="{name}"' in first for name in re.findall(r'href="#([^"]+)"', first))


# The document


def test_markdown_has_the_content_of_the_page(tmp_path: Path) -> None:
    chapter = counted("a", [])
    studied(tiny(tmp_path), tmp_path, [chapter])
    record = json.loads((tmp_path / "records" / "a.json").read_text())
    one = make_section(chapter, record, schemes=())
    opening = render_markdown([one], records="results/study", experts="16 experts")
    assert "✗ does not hold" in opening
    assert "(results/a.md)" in opening
    text = render_section(one, records="results/study")
    assert f"| {HOSTILE} | {record['facts']['value']:.3f} |" in text
    assert "✗ does not hold" in text
    assert "`results/study/a.json`" in text
    assert "<picture>" not in text
    shown = render_section(one, records="r", figures=["a-figure"])
    assert "../figures/a-figure-dark.svg" in shown


def test_results_pages_equal_the_committed_records() -> None:
    docs = load_script("docs.py")
    found = docs.report_sections(())
    assert len(found) == len(EXPERIMENTS), "a chapter has no record under results/study"
    pages = docs.results_pages(found)
    assert {path: path.read_text(encoding="utf-8") for path in pages} == pages
    assert set((ROOT / "docs" / "results").iterdir()) == set(pages) - {docs.RESULTS_PAGE}
    named = {name for text in pages.values() for name in re.findall(r"figures/[\w-]+\.svg", text)}
    assert named
    assert all((ROOT / "docs" / name).is_file() for name in named)
