"""Plans on fake machines: what fits, in which order, and commands that the program accepts."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.cli.entry import root_command
from coterie.errors import ConfigError
from coterie.lab.planner.expert_counts import CountExperts, assumed_sample
from coterie.lab.planner.measurement import GivenRates, gpu_rates
from coterie.lab.planner.plan import Configuration, PlanDevice, PlanOptions, make_plan
from coterie.lab.planner.planned_model import PlannedModel
from coterie.lab.planner.rates import MachineRates
from coterie.lab.replay.hardware_model import HardwareModel
from coterie.lab.timing import LatencyFit
from coterie.testing import write_checkpoint

GIB = 1 << 30
KEYS = {
    *(
        "device",
        "expert_dtype",
        "policy",
        "share_in_memory",
        "slots",
        "tiers",
        "memory",
        "commands",
    ),
    *("experts_per_layer", "loads_per_layer", "bytes_a_forward", "fetched_bytes_a_forward"),
    *("ms_a_forward", "tokens_per_second"),
}
seconds = st.floats(1e-7, 1e-3)


def warm_fit(t0: float, b: float, a: float) -> LatencyFit:
    return {"t0": t0, "b": b, "a": a, "r2": 1.0, "error": 0.0}


fits = st.builds(warm_fit, seconds, seconds, seconds)
machines = st.builds(
    MachineRates,
    read_bandwidth=st.floats(1e9, 1e12),
    matrix_rate=st.floats(1e9, 1e13),
    router_rate=st.floats(1e9, 1e13),
    experts=st.fixed_dictionaries(dict.fromkeys(("fp32", "bf16", "int8", "int4"), fits)),
    overlap=st.floats(0, 1),
    layer_seconds=st.floats(0, 1e-2),
    copies=st.builds(
        HardwareModel,
        link_bandwidth=st.floats(1e8, 1e11),
        overlap=st.floats(0, 1),
        transfer_latency=st.floats(0, 1e-2),
    ),
)
MACHINE = MachineRates(
    *(40e9, 8e11, 4e11, dict.fromkeys(("bf16", "int8", "int4"), warm_fit(2e-5, 1e-5, 5e-6))),
    *(0.9, 5e-4, HardwareModel(4e9, None, 0.0, 0.7, 1e-3)),
)
NAMES = ("llada2-mini", "llada-moe")


@cache
def counter(name: str, steps: int = 4) -> CountExperts:
    model = PlannedModel.find(name)
    tokens = model.window_tokens(steps)
    router, unique = model.spec.router, model.shape.unique_experts
    return assumed_sample(router, unique, tokens=tokens, steps=steps, source="test").counter()


def plan(name: str, memory: float, rates: MachineRates = MACHINE) -> tuple[Configuration, ...]:
    model = PlannedModel.find(name)
    options = PlanOptions(model.shape.policies, model.formats, steps=4)
    return make_plan(model, [PlanDevice("cpu", rates, int(memory * GIB))], counter(name), options)


@given(machines, st.sampled_from(NAMES), st.floats(4, 40), st.floats(0, 40))
@law(6)
def test_more_memory_gives_no_worse_first_choice(
    machine: MachineRates, name: str, memory: float, more: float
) -> None:
    less, enough = plan(name, memory, machine)[0], plan(name, memory + more, machine)[0]
    assert enough.tokens_per_second >= less.tokens_per_second * (1 - 1e-9)


@given(machines, st.sampled_from(NAMES), st.floats(4, 40))
@law(6)
def test_each_configuration_fits_and_the_fastest_is_first(
    machine: MachineRates, name: str, memory: float
) -> None:
    found = plan(name, memory, machine)
    speeds = [each.tokens_per_second for each in found]
    assert speeds == sorted(speeds, reverse=True)
    assert all(each.memory <= memory * GIB for each in found)
    assert all((each.loads == 0) == (each.share == 1) for each in found)
    assert len({(each.format_name, each.policy) for each in found}) == len(found)


@given(machines, st.floats(1.1, 10))
@law(6)
def test_a_faster_disk_or_memory_is_never_slower(machine: MachineRates, factor: float) -> None:
    faster_disk = replace(machine.copies, link_bandwidth=factor * machine.copies.link_bandwidth)
    for faster in (
        replace(machine, copies=faster_disk),
        replace(machine, read_bandwidth=factor * machine.read_bandwidth),
    ):
        before, after = (plan("llada2-mini", 8, each)[0] for each in (machine, faster))
        assert after.tokens_per_second >= before.tokens_per_second * (1 - 1e-9)


@pytest.mark.parametrize("memory", [6, 8, 12, 40])
@pytest.mark.parametrize("name", NAMES)
def test_each_command_parses(name: str, memory: float) -> None:
    for each in plan(name, memory):
        for line in each.commands:
            parse(line)


@pytest.mark.parametrize("family", ["llada2", "llada-moe", "sdar-moe"])
def test_the_commands_of_a_folder_parse_and_name_it(family: str, tmp_path) -> None:
    folder = str(write_checkpoint(tmp_path / "a model", family, seed=1))
    model = PlannedModel.find(folder)
    assert model.stored_format == "fp32"
    options = PlanOptions(("vanilla",), ("fp32",), steps=2)
    rates = replace(MACHINE, experts={"fp32": warm_fit(1e-5, 1e-6, 1e-7)})
    router = model.spec.router
    tokens = model.window_tokens(2)
    sample = assumed_sample(router, router.k + 1, tokens=tokens, steps=2, source="test")
    (only,) = make_plan(model, [PlanDevice("cpu", rates, 2 * GIB)], sample.counter(), options)
    (line,) = only.commands
    assert parse(line)["model"] == folder


def parse(line: str) -> dict[str, object]:
    """The parameters of a command line, by the program's own parser."""
    program, *words = shlex.split(line)
    assert program == "coterie"
    command = root_command()
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context("coterie", words, resilient_parsing=False).params


def test_a_gpu_takes_the_experts_that_fit_and_the_host_the_others() -> None:
    model = PlannedModel.find("llada2-mini")
    options = PlanOptions(("vanilla",), ("bf16", "int8"), steps=4)
    rates = gpu_rates(options.formats, GivenRates(link=20e9))

    def found(host: int) -> dict[str, Configuration]:
        device = PlanDevice("cuda", rates, 12 * GIB, host * GIB)
        return {e.format_name: e for e in make_plan(model, [device], counter(model.name), options)}

    both, only = found(64), found(20)
    assert set(both) == {"bf16", "int8"}
    assert set(only) == {"int8"}
    assert all(each.tiers == ("gpu", "memory") for each in both.values())
    assert all(each.memory <= 12 * GIB for each in both.values())
    for each in both.values():
        (line,) = each.commands
        assert parse(line)["device"] == "cuda"


def test_too_little_memory_is_said_with_the_least_that_would_do() -> None:
    with pytest.raises(ConfigError, match=r"needs at least .* of memory"):
        plan("llada2-mini", 0.5)


def test_the_document_of_a_configuration_keeps_its_keys() -> None:
    assert all(set(each.to_dict()) == KEYS for each in plan("llada-moe", 8))


def test_the_passes_of_a_block_follow_the_familys_scheme() -> None:
    dual, causal = (PlannedModel.find(name) for name in ("llada-moe", "llada2-mini"))
    assert [each.kind for each in dual.decode_passes(3)] == ["refresh", "decode", "decode"]
    assert [each.width for each in causal.decode_passes(3)] == [32, 32, 32]
    assert dual.window_tokens(3) == 64


def test_an_unknown_router_is_as_skewed_as_the_published_one(tmp_path) -> None:
    model = PlannedModel.find(str(write_checkpoint(tmp_path, "llada2", seed=1)))
    assert model.spec.router.k <= model.shape.unique_experts < model.spec.router.experts
    assert "as skewed" in model.source
