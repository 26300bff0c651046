"""The figure of a run's traffic: for any number of forwards, without a word from matplotlib."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from coterie.cli.entry import run
from coterie.lab.plotting import render_svg
from coterie.lab.traffic_plot import TrafficPoint, draw_traffic
from coterie.offload.traffic import Traffic, Transfer
from coterie.offload.traffic_log import ForwardTraffic

pytestmark = pytest.mark.usefixtures("embedded_once")


@pytest.mark.parametrize(
    "kinds",
    [
        (),
        ("prefill", "decode"),
        pytest.param(("decode",), marks=pytest.mark.slow),
        pytest.param(("decode",) * 9, marks=pytest.mark.slow),
    ],
)
def test_a_figure_of_any_number_of_forwards(kinds: tuple[str, ...]) -> None:
    """A warning of matplotlib would be an error here."""
    traffic = Traffic(1, 1 << 20, 40, 30, {"elsewhere": Transfer(10, 10 << 20)}, vanilla_misses=20)
    points = [
        TrafficPoint(ForwardTraffic(number, kind, (0,), (number,), traffic), 0.5)
        for number, kind in enumerate(kinds)
    ]
    for scheme in ("light", "dark"):
        svg = render_svg(partial(draw_traffic, "title", points), name="name", scheme=scheme)
        assert svg.startswith("<svg")


def test_the_place_of_a_plot_is_tried_before_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "name.json").mkdir()
    words = ["generate", "2", "--simulate-expert-memory", "35%", "--plot-traffic"]
    for name in (tmp_path / "name", tmp_path / "nowhere" / "name"):
        assert run([*words, str(name)]) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1)
