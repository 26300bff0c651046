"""The metrics keep to Prometheus' conventions, and the dashboard shows what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from live_server import byte_engine
from prometheus_client.parser import text_string_to_metric_families

import coterie.server
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised
from coterie.offload.traffic import Traffic, Transfer
from coterie.server.metrics import ServerMetrics

DASHBOARD = Path(coterie.server.__file__).with_name("grafana.json")
UNITS = ("_seconds", "_bytes", "_total", "_info", "_kept", "_running", "_waiting", "_fds")
COLUMNS = 24  # of a dashboard's grid


def metrics() -> ServerMetrics:
    """Metrics after one step, of a forward whose experts a disk had."""
    made = ServerMetrics(byte_engine(), "bytes")
    made.watch_queue(lambda: 2, lambda: 3)
    event = Denoised(0, stop=8, experts=(3, 4), vanilla_experts=(5, 6), vote_mass_kept=0.9)
    moved = Traffic(1, 10, experts_used=9, hits=6, transfers={"disk": Transfer(3, 30)})
    made.on_step(0.01, [event], moved)
    return made


def test_every_name_has_a_unit_and_every_metric_a_help() -> None:
    families = list(text_string_to_metric_families(metrics().render().decode()))
    for family in families:
        assert family.documentation
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert name.endswith(UNITS), name
        assert name.startswith(("coterie_", "vllm:diffusion_num_", "process_"))
    assert len(families) > 20


def test_a_step_is_counted() -> None:
    made = metrics()

    def value(name: str, **labels: str) -> float | None:
        return made.registry.get_sample_value(name, labels)

    assert value("coterie_requests_running") == 2
    assert value("coterie_requests_waiting") == 3
    assert value("coterie_unique_experts_total", layer="1") == 3
    assert value("coterie_expert_bytes_moved_total", tier="disk") == 30
    assert value("coterie_expert_cache_hits_total") == 6
    read, vanilla = (value(f"coterie_expert_bytes_{name}_total") for name in ("read", "vanilla"))
    assert read * 11 == vanilla * 7
    assert value("vllm:diffusion_num_canvas_positions_total", model_name="bytes") == 8


def dashboard() -> dict:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    content = dashboard()
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= content.keys()
    assert isinstance(content["schemaVersion"], int)
    (variable,) = content["templating"]["list"]
    source = {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
    panels = content["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["datasource"] == source
        assert panel["fieldConfig"]["defaults"]["unit"]
        letters = [target["refId"] for target in panel["targets"]]
        assert sorted(set(letters)) == letters
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken
        taken |= cells


SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


@pytest.mark.parametrize("panel", dashboard()["panels"], ids=lambda panel: panel["title"])
def test_a_panel_shows_metrics_that_exist(panel: dict) -> None:
    families = text_string_to_metric_families(metrics().render().decode())
    known = {
        family.name + suffix for family in families for suffix in SUFFIXES.get(family.type, ())
    }
    for target in panel["targets"]:
        names = re.findall(r"\b(?:coterie_|process_|vllm:)[\w:]+", target["expr"])
        assert names
        assert set(names) <= known


def test_two_servers_of_one_process_count_for_themselves() -> None:
    engine: Engine = byte_engine()
    first, second = ServerMetrics(engine, "a"), ServerMetrics(engine, "b")
    first.on_cancelled()
    assert b'finish_reason="cancelled"' not in second.render()
