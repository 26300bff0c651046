"""Records: medians and spreads are the textbook's, and a record tells where it comes from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.lab.machine import machine_info, quick_peak
from coterie.lab.records import (
    Measurement,
    git_commit,
    is_record,
    make_record,
    package_versions,
    write_record,
)

readings = st.lists(st.floats(0, 1e6), min_size=1, max_size=30)


@given(samples=readings, shift=st.floats(0, 1e6))
def test_a_shift_moves_the_median_and_not_the_spread(samples: list[float], shift: float) -> None:
    here = Measurement("seconds", "s", tuple(samples))
    there = Measurement("seconds", "s", tuple(sample + shift for sample in samples))
    assert math.isclose(there.median, here.median + shift, abs_tol=1e-6)
    assert math.isclose(there.spread, here.spread, abs_tol=1e-6)


@given(samples=readings)
def test_the_order_of_samples_changes_nothing_but_the_list(samples: list[float]) -> None:
    here, there = Measurement("s", "s", tuple(samples)), Measurement("s", "s", tuple(samples[::-1]))
    assert (here.median, here.spread) == (there.median, there.spread)


def test_spread_is_between_the_quartiles_or_the_extremes() -> None:
    assert Measurement("a", "s", (1.0, 2.0, 3.0, 4.0, 5.0)).spread == 2.0
    assert Measurement("a", "s", (5.0, 1.0)).spread == 4.0
    assert Measurement("a", "s", (5.0,)).spread == 0.0


def test_a_measure_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="'speed' has no samples"):
        Measurement("speed", "tokens/s", ())


def test_a_record_says_command_commit_machine_versions_and_samples(tmp_path: Path) -> None:
    speed = Measurement("vanilla", "tokens/s", (10.0, 12.0, 11.0))
    path = write_record(
        tmp_path, make_record("Generate: CPU", ["scripts/bench"], [speed], facts={"experts": 7})
    )
    assert path.name == "generate-cpu.json"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["command"] == ["scripts/bench"]
    assert found["commit"] == git_commit()
    assert found["machine"] == {**machine_info(), "device": "cpu", "peak": quick_peak()}
    assert found["versions"] == package_versions()
    assert found["facts"] == {"experts": 7}
    assert found["measures"] == [
        {
            "name": "vanilla",
            "unit": "tokens/s",
            "median": 11.0,
            "spread": 2.0,
            "samples": [10.0, 12.0, 11.0],
        }
    ]


def test_a_record_that_is_not_json_is_never_written(tmp_path: Path) -> None:
    broken = make_record("bad", [], [], facts={"loss": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path, broken)
    assert not (tmp_path / "bad.json").exists()


def test_a_folder_outside_git_has_no_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == "unknown"


@given(st.data())
def test_a_record_that_lacks_or_retypes_what_it_should_hold_is_none(data: st.DataObject) -> None:
    record = make_record("title", ["command"], [])
    assert is_record(record)
    assert is_record({**record, "more": 1})
    key = data.draw(st.sampled_from(sorted(record)))
    value = data.draw(st.sampled_from([None, True, 7, -1.5]))
    assert not is_record({**record, key: value})
    del record[key]
    assert not is_record(record)
