"""The counts of the plug-in as gauges of SGLang's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from coterie.sglang.expert_counts import LayerCounts

GAUGES = {
    "blocks": "Blocks that the policy routed, one for each forward and request.",
    "experts": "Mean unique experts of a block.",
    "vanilla_experts": "Mean unique experts of a block under the model's own routing.",
    "vote_mass_kept": "Share of the votes for experts that were used.",
    "forward_experts": "Mean unique experts of all routed blocks of a forward.",
}


class CountGauges:
    """A gauge ``coterie:NAME`` with the label ``layer`` for each of ``GAUGES``.

    SGLang collects the metrics of its processes from files, so these appear under its /metrics.
    """

    def __init__(self) -> None:
        # SGLang sets the folder of these files before its processes start, and the package reads it
        # when it is imported.
        prometheus: Any = import_module("prometheus_client")
        self._gauges = {
            name: prometheus.Gauge(
                f"coterie:{name}", text, labelnames=("layer",), multiprocess_mode="mostrecent"
            )
            for name, text in GAUGES.items()
        }

    def set(self, counts: Sequence[LayerCounts]) -> None:
        for each in counts:
            for name, gauge in self._gauges.items():
                gauge.labels(layer=str(each.layer)).set(getattr(each, name))
