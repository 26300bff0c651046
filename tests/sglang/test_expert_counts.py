"""Counts of experts are those of the engine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from coterie.errors import ConfigError
from coterie.routing import parse_policy, route
from coterie.sglang.expert_counts import ExpertTotals, LayerCounts, append_counts, summarize
from coterie.telemetry import ExpertCounter
from coterie.values import RouterSpec, Scores

SPEC = RouterSpec(16, 4, "softmax", renormalise=True)
COUNTS = [LayerCounts(1, 10, 3.0, 6.0, 0.5, 8.0), LayerCounts(2, 10, 5.0, 6.0, 0.7, 8.0)]


def totals_of(*layers: int) -> ExpertTotals:
    return ExpertTotals(layers, torch.device("cpu"))


def test_totals_are_the_counts_of_the_engine_in_routed_rows() -> None:
    policy, totals, counter = parse_policy("des-vote:beta=0.4"), totals_of(1, 2), ExpertCounter()
    routed = torch.tensor([True, False, True])
    for seed in range(5):
        counter.on_forward((0, 1, 2))
        for layer in (1, 2):
            generator = torch.Generator().manual_seed(9 * seed + layer)
            logits = torch.randn(3, 8, 16, generator=generator)
            scores = Scores(logits, SPEC, layer=layer)
            routing = route(scores, policy)
            totals.add(scores, routing, routed)
            counter.on_routed(layer, scores, routing)
    of_rows = [counter.counts(row) for row in (0, 2)]
    for index, layer in enumerate(totals.read()):
        assert (layer.layer, layer.blocks) == (index + 1, 10)
        assert layer.experts == pytest.approx(sum(row.per_layer[index] for row in of_rows) / 2)
        vanilla = sum(row.vanilla_per_layer[index] for row in of_rows) / 2
        assert layer.vanilla_experts == pytest.approx(vanilla)
        assert layer.experts <= layer.forward_experts <= 2 * layer.experts


def test_without_a_routed_row_there_are_no_counts() -> None:
    totals, scores = totals_of(0), Scores(torch.randn(2, 4, 16), SPEC)
    totals.add(scores, route(scores, parse_policy("vanilla")), torch.tensor([False, False]))
    assert totals.read() == []
    assert "no block" in summarize([])


def test_a_summary_has_the_means_over_layers() -> None:
    line = summarize(COUNTS)
    assert all(part in line for part in ("4.00 experts", "6.00", "8.00", "60.0%", "10 blocks"))


def test_each_count_is_a_line_of_json(tmp_path: Path) -> None:
    for _ in range(2):
        append_counts(tmp_path / "counts", COUNTS)
    lines = (tmp_path / "counts").read_text().splitlines()
    assert [json.loads(line)["layers"] for line in lines] == [[asdict(c) for c in COUNTS]] * 2


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path.name}: cannot be written"):
        append_counts(tmp_path, COUNTS)
