"""Writes docs/demo/index.html: the page of `coterie serve` with one recorded run, in one file.

    python -m experiments demo          record two policies on one question, and write the page
    python -m experiments demo page     write the page again, with the runs that it has

The embedded model answers; half of its experts are cached.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence

import coterie
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.model.weights import expert_bytes
from coterie.routing import parse_policy
from coterie.server.app import STATIC
from coterie.server.frames import Json, model_summary, step_frame
from coterie.server.votes import VoteRecorder
from experiments.records import ROOT

PAGE = ROOT / "docs" / "demo" / "index.html"
PROMPT = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
POLICIES = ("des-vote:beta=0.4", "vanilla")


def main(argv: Sequence[str]) -> int:
    """Record both runs, and write the page with them; `page` keeps the runs of the last time."""
    if list(argv) == ["page"]:
        run = recorded_run(PAGE.read_text(encoding="utf-8"))
    else:
        run, other = (record(policy) for policy in POLICIES)
        run["compared"] = other
    PAGE.write_text(bundle(run), encoding="utf-8")
    return 0


def recorded_run(page: str) -> Json:
    """The run inside a page."""
    tag = re.compile(r'<script type="application/json" id="recorded">(.*)</script>')
    match = tag.search(page)
    assert match is not None
    return json.loads(match[1])


def record(policy: str) -> Json:
    """A run as the page exports it."""
    memory = ExpertMemoryConfig.parse("50%", simulated=True)
    engine = coterie.load(expert_memory=memory, unmask="fixed:steps=10")
    engine.generate("warm up", max_new_tokens=32)
    engine.reset_cache()
    return {
        "coterie_run": 1,
        "meta": model_summary(engine.model),
        "prompt": PROMPT,
        "policy": policy,
        "frames": list(frames(engine, VoteRecorder.of(engine.model), policy)),
    }


def frames(engine: Engine, recorder: VoteRecorder, policy: str) -> Iterator[Json]:
    """The frames of one answer, alone on the engine."""
    row = engine.submit(PROMPT, policy=policy)
    recorder.watch(row, parse_policy(policy))
    engine.set_recorder(recorder)
    start, before = time.perf_counter(), engine.traffic()
    while engine.rows:
        for event in engine.step():
            if isinstance(event, Denoised):
                yield step_frame(
                    event,
                    engine.model.tokenizer.decode_token,
                    recorder.latest(row),
                    expert_bytes=expert_bytes(engine.model.spec, engine.model.transformer.dtype),
                    traffic=engine.traffic(before),
                    seconds=time.perf_counter() - start,
                )
        before = engine.traffic()


def bundle(run: Json) -> str:
    """The page with its style, its scripts and a run inside."""
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    page = page.replace('<link rel="stylesheet" href="style.css">', f"<style>\n{style}</style>")
    document = json.dumps(run, separators=(",", ":")).replace("<", "\\u003c")
    scripts = re.findall(r'<script src="(\w+\.js)"></script>', page)
    for name in scripts:
        code = (STATIC / name).read_text(encoding="utf-8")
        page = page.replace(f'<script src="{name}"></script>', f"<script>\n{code}</script>")
    recorded = f'<script type="application/json" id="recorded">{document}</script>\n'
    return page.replace("<script>", recorded + "<script>", 1)
