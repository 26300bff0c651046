"""The page, driven in a real browser, against a real server with the embedded model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from live_server import LiveServer, embedded_model, live_server
from shared_data import CHROMIUM

from coterie.engine.engine import Engine
from experiments.demo import bundle, recorded_run

pytest.importorskip("playwright", reason="the page's tests need playwright")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "docs" / "demo" / "index.html"
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
PROMPT = "Tom has 3 boxes of 4 pens. How many pens?"
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}

expect.set_options(timeout=20_000)  # a browser on a busy machine is slow
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}")


@dataclass
class Visit:
    """A page with what must not happen on it: errors, and requests to other hosts."""

    page: Page
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.on_console(message.type, message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self.on_request)

    def on_console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.errors.append(text)

    def on_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob", "file"):
            self.hosts.add(parts.netloc)

    def call(self, script: str) -> Any:
        return self.page.evaluate(script)

    @property
    def steps(self) -> int:
        return self.call("page.views[0].run.frames.length")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(Engine(embedded_model())) as running:
        yield running


@pytest.fixture
def visit(browser: Browser, server: LiveServer) -> Iterator[Visit]:
    """The served page; afterwards it has made no error, and no request elsewhere."""
    context = browser.new_context(viewport=DESKTOP, accept_downloads=True)
    visit = Visit(context.new_page())
    visit.page.goto(server.url)
    expect(visit.page.locator("#ask")).to_be_visible()
    yield visit
    context.close()
    assert visit.errors == []
    assert visit.hosts <= {urlsplit(server.url).netloc}


def run(visit: Visit, policy: str = "des-vote:beta=0.4", other: str | None = None) -> None:
    """Type a prompt, run it, and wait for the end."""
    page = visit.page
    page.fill("#prompt", PROMPT)
    page.fill("#policy", policy)
    if other is not None:
        page.check("#compare")
        page.fill("#other", other)
    page.press("#prompt", "Enter")
    expect(page.locator("#run")).to_have_text("Stop")
    expect(page.locator("#run")).to_have_text("Run")
    expect(page.locator("#error")).to_be_hidden()


def test_a_prompt_is_answered_and_its_steps_can_be_scrubbed(
    visit: Visit, server: LiveServer
) -> None:
    run(visit)
    engine = Engine(embedded_model())
    alone = engine.generate(PROMPT, policy="des-vote:beta=0.4", unmask="fixed:steps=8")
    assert visit.call("page.views[0].run.textAt(999)") == alone.text
    assert alone.text in visit.page.locator("#answer").text_content()
    assert visit.steps == alone.forwards
    scrubber, where = visit.page.locator("#scrubber"), visit.page.locator("#where b")
    expect(where).to_have_text(f"Step {alone.forwards} of {alone.forwards}")
    scrubber.focus()
    visit.page.keyboard.press("Home")
    expect(where).to_have_text(f"Step 1 of {alone.forwards}")
    visit.page.keyboard.press("ArrowRight")
    expect(where).to_have_text(f"Step 2 of {alone.forwards}")
    masked = visit.page.locator(".tokens .masked, .tokens .guess")
    assert masked.count() > 0
    visit.page.keyboard.press(" ")
    expect(visit.page.locator("#play")).to_have_attribute("aria-label", "Pause")
    visit.page.keyboard.press(" ")
    visit.page.keyboard.press("End")
    expect(masked).to_have_count(0)
    shown = visit.page.locator(".tokens").text_content().replace("↵", "").removesuffix("∎")
    assert shown == alone.text


def test_the_slider_replays_the_election(visit: Visit) -> None:
    run(visit, "des-vote:beta=0.5")
    slider, replay = visit.page.locator(".budget"), visit.page.locator(".replay")
    expect(replay).to_contain_text("As recorded")
    assert slider.input_value() == "64"
    slider.focus()
    for _ in range(3):
        visit.page.keyboard.press("ArrowLeft")
    expect(replay).to_contain_text("With 61 experts a layer")
    expect(replay).to_contain_text("would drop")
    frame = visit.call("page.views[0].vote")
    assert frame["experts"] <= 4 * 61
    assert frame["dropped"] == frame["recorded"] - frame["experts"]
    visit.page.click(".reset")
    expect(replay).to_contain_text("As recorded")


def test_at_the_recorded_budget_the_replay_is_the_recorded_election(visit: Visit) -> None:
    """In every layer of every step, although votes are rounded; fewer experts lose more votes."""
    run(visit, "des-vote:beta=0.25")
    recorded = visit.call(
        """page.views[0].run.votes.map((layers) => layers.map((layer) => [
            [...Runs.elect(layer, 32).elected].sort(), [...Runs.elect(layer, null).elected].sort()
        ]))"""
    )
    assert len(recorded) == visit.steps
    assert all(replayed == elected for layers in recorded for replayed, elected in layers)
    lost = visit.call(
        "[128, 64, 32, 16, 1].map((budget) => Runs.replay(page.views[0].run.votes[0], budget).lost)"
    )
    assert lost == sorted(lost)
    assert lost[0] < 1e-9 < lost[-1] < 1


def test_two_policies_are_compared_and_survive_export(visit: Visit, tmp_path: Path) -> None:
    run(visit, "des-vote:beta=0.2", other="vanilla")
    page = visit.page
    expect(page.locator(".run")).to_have_count(2)
    texts = visit.call("page.views.map(({run}) => run.textAt(999))")
    first, other = texts
    assert texts == [
        Engine(embedded_model()).generate(PROMPT, policy=policy, unmask="fixed:steps=8").text
        for policy in ("des-vote:beta=0.2", "vanilla")
    ]
    difference = page.locator("#difference-text")
    removed = "".join(difference.locator("span, del").all_text_contents())
    added = "".join(difference.locator("span, ins").all_text_contents())
    assert (removed, added) == (other, first)
    page.get_by_text("clock", exact=True).click()
    expect(page.locator("#where")).to_contain_text("s")
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "run.json"
    download.value.save_as(path)
    file = json.loads(path.read_text(encoding="utf-8"))
    assert (file["coterie_run"], file["prompt"]) == (1, PROMPT)
    assert (file["policy"], file["compared"]["policy"]) == ("des-vote:beta=0.2", "vanilla")
    page.reload()
    page.set_input_files("#file", path)
    expect(page.locator(".run")).to_have_count(2)
    assert visit.call("page.views.map(({run}) => run.textAt(999))") == texts


def test_a_file_that_is_no_run_is_refused(visit: Visit) -> None:
    for content in ("{", "[]", "null", '{"coterie_run": 2}', '{"coterie_run": 1, "frames": [{}]}'):
        file = {"name": "a.json", "mimeType": "application/json", "buffer": content.encode()}
        visit.page.set_input_files("#file", file)
        expect(visit.page.locator("#error")).to_contain_text("Cannot open the run")
        expect(visit.page.locator(".run")).to_have_count(0)
        visit.call("showError('')")


def test_a_damaged_run_is_refused_or_shown(visit: Visit) -> None:
    """Wherever one value of the file is another one, the page makes no error."""
    run, draw = recorded_run(DEMO.read_text(encoding="utf-8")), random.Random(0)
    run["frames"], run["compared"] = run["frames"][:2], None
    refused = 0
    for _ in range(30):
        damaged = json.loads(json.dumps(run))
        damage(damaged, draw)
        visit.page.evaluate("(text) => load(text, 1)", json.dumps(damaged))
        visit.call("if (page.views.length) draw()")
        refused += visit.page.locator("#error").is_visible()
        assert visit.errors == [], json.dumps(damaged)[:400]
    assert 10 < refused < 30


def damage(value: Any, draw: random.Random) -> None:
    """Replace one value, anywhere inside."""
    while True:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        child = value[key]
        if not isinstance(child, dict | list) or not child or draw.random() < 0.2:
            value[key] = draw.choice([None, -1, 1e9, "x", [], {}, True])
            return
        value = child


def test_a_policy_that_does_not_exist_is_explained(visit: Visit) -> None:
    visit.page.fill("#policy", "no-such-policy")
    visit.page.click("#run")
    expect(visit.page.locator("#error")).to_contain_text("no-such-policy")
    expect(visit.page.locator("#run")).to_have_text("Run")
    # The browser logs the status of the response.
    assert all("400" in error for error in visit.errors)
    visit.errors.clear()


def test_a_key_is_requested_and_sent(browser: Browser) -> None:
    with live_server(Engine(embedded_model()), api_keys=("secret",)) as server:
        visit = Visit(browser.new_context().new_page())
        visit.page.goto(server.url)
        visit.page.fill("#key", "secret")
        visit.page.press("#key", "Tab")
        expect(visit.page.locator("#error")).to_be_hidden()
        run(visit)
        assert visit.steps > 1
        assert all("401" in error for error in visit.errors)
        visit.page.context.close()


def test_a_stream_that_breaks_off_is_an_error_and_keeps_its_steps(visit: Visit) -> None:
    def half(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, body=response.body().partition(b"data: [DONE]")[0])

    visit.page.route("**/v1/chat/completions", half)
    visit.page.click("#run")
    expect(visit.page.locator("#error")).to_contain_text("ended the answer early")
    expect(visit.page.locator("#run")).to_have_text("Run")
    assert visit.steps > 1


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        pytest.param(PHONE, "dark", id="phone-dark"),
        pytest.param(DESKTOP, "light", id="desktop-light", marks=pytest.mark.slow),
        pytest.param(PHONE, "light", id="phone-light", marks=pytest.mark.slow),
        pytest.param(DESKTOP, "dark", id="desktop-dark", marks=pytest.mark.slow),
    ],
)
def test_the_demo_opens_from_a_file_at_each_size(
    browser: Browser, size: dict[str, int], scheme: str
) -> None:
    context = browser.new_context(viewport=size, color_scheme=scheme)
    visit = Visit(context.new_page())
    visit.page.goto(DEMO.as_uri())
    expect(visit.page.locator(".run")).to_have_count(2)
    expect(visit.page.locator(".token").first).to_be_visible()
    assert visit.call("document.documentElement.scrollWidth") <= size["width"]
    assert faults(visit.page) == []
    assert (visit.errors, visit.hosts) == ([], set())
    context.close()


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_the_served_page_is_accessible(visit: Visit, scheme: str) -> None:
    visit.page.emulate_media(color_scheme=scheme)
    assert faults(visit.page) == []
    run(visit)
    visit.page.locator(".budget").fill("10")
    assert faults(visit.page) == []


def test_the_demo_holds_the_page_of_this_version() -> None:
    text = DEMO.read_text(encoding="utf-8")
    assert bundle(recorded_run(text)) == text


def faults(page: Page) -> list[str]:
    """The serious and critical faults that axe finds."""
    violations = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:120]} {node.get('failureSummary', '')[:300]}"
        for each in violations
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
