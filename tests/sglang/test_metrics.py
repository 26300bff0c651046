"""The counts as Prometheus gauges."""

from __future__ import annotations

import pytest

from coterie.sglang.expert_counts import LayerCounts
from coterie.sglang.metrics import GAUGES, CountGauges


def test_each_count_of_each_layer_is_a_gauge() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    counts = [LayerCounts(1, 10, 3.0, 6.0, 0.5, 8.0), LayerCounts(2, 20, 5.0, 6.0, 0.7, 8.0)]
    gauges = CountGauges()
    gauges.set(counts)
    for name in GAUGES:
        for each in counts:
            labels = {"layer": str(each.layer)}
            value = prometheus.REGISTRY.get_sample_value(f"coterie:{name}", labels)
            assert value == getattr(each, name)
