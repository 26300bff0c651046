"""The machine: what the system says of it, and probes that measure something."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from coterie.lab.machine import (
    INSTRUCTION_SETS,
    HostMemory,
    Processor,
    machine_info,
    measure_disk_bandwidth,
    measure_read_bandwidth,
    quick_peak,
)

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: {model}
model name\t: AMD EPYC
flags\t\t: fpu {flags}

processor\t: 1
cpu family\t: 1
model name\t: another
"""


@given(
    family=st.integers(0, 255),
    model=st.integers(0, 255),
    flags=st.sets(st.sampled_from(INSTRUCTION_SETS)),
)
def test_the_first_processor_is_read(
    tmp_path_factory, family: int, model: int, flags: set[str]
) -> None:
    path = tmp_path_factory.mktemp("proc") / "cpuinfo"
    path.write_text(CPUINFO.format(family=family, model=model, flags=" ".join(flags)))
    processor = Processor.of(path)
    assert (processor.name, processor.vendor) == ("AMD EPYC", "AuthenticAMD")
    assert (processor.family, processor.model) == (family, model)
    assert set(processor.instruction_sets) == flags


def test_a_system_without_the_file_has_no_numbers(tmp_path: Path) -> None:
    processor = Processor.of(tmp_path / "none")
    assert (processor.family, processor.model, processor.instruction_sets) == (None, None, ())


def test_a_record_names_family_and_model() -> None:
    info, processor = machine_info(), Processor.of()
    assert (info["family"], info["model"]) == (processor.family, processor.model)
    assert {"read_gb_per_s", "bfloat16_gflop_per_s", "float32_gflop_per_s"} == set(quick_peak())
    assert min(quick_peak().values()) > 0


def test_memory_is_within_its_total() -> None:
    memory = HostMemory.of()
    assert memory.total is not None
    assert memory.available is not None
    assert 0 < memory.available <= memory.total


def test_probes_measure_and_leave_nothing(tmp_path: Path) -> None:
    assert measure_read_bandwidth(0.0, size=8 << 20) > 0
    disk = measure_disk_bandwidth(tmp_path, size=16 << 20)
    assert disk is not None
    assert disk > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_has_no_bandwidth(tmp_path: Path) -> None:
    assert measure_disk_bandwidth(tmp_path / "missing") is None
