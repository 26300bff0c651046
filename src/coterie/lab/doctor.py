"""What this installation is and does: the machine, the kernels, the extras, and what is broken."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from torch import Tensor

from coterie import ops
from coterie.checkpoints.source import find_folder
from coterie.engine.engine import load
from coterie.errors import ConfigError, CoterieError
from coterie.keys import Key, to_json
from coterie.lab.bench.routings import balanced_routing
from coterie.lab.machine import (
    CPU,
    Gpu,
    HostMemory,
    Processor,
    measure_disk_bandwidth,
    measure_read_bandwidth,
)
from coterie.lab.records import package_versions
from coterie.lab.timing import load_warnings, timing_conditions
from coterie.offload.capacity import format_bytes
from coterie.ops import reference
from coterie.ops.cpu import build
from coterie.ops.cpu.library import ISA_VARIABLE, KernelLibrary, open_library
from coterie.quantization import FORMATS, QTensor, dequantize, quantize
from coterie.values import RouterSpec, Slab

State = Literal["ok", "note", "broken"]

REBUILD = f"python {build.__file__}"
QUESTION, ANSWER = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?", "7"
EXTRAS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "serve": ("the HTTP server", ("fastapi", "uvicorn", "pydantic", "prometheus_client")),
    "lab": ("figures, and grading of mathematics", ("matplotlib", "math_verify")),
    "harness": ("lm-evaluation-harness", ("lm_eval",)),
}
"""By extra: what it is for, and the modules that it installs."""

TEST_ROUTER = RouterSpec(8, 2, "softmax", renormalise=True)
TEST_TOKENS, TEST_HIDDEN, TEST_WIDTH = 16, 128, 64
MAX_ERRORS = {"bf16": 0.02, "int8": 0.04, "int4": 0.04}  # of a layer, from rounding alone


@dataclass(frozen=True)
class CheckResult:
    """One line: a fact, its state, and the command that mends it, if one does."""

    name: Annotated[str, Key("name")]
    value: Annotated[str, Key("value")]
    state: Annotated[State, Key("state")] = "ok"
    remedy: Annotated[str | None, Key("remedy")] = None


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and the measured numbers behind them."""

    processor: Annotated[Processor, Key("processor")]
    memory: Annotated[HostMemory, Key("memory")]
    gpu: Annotated[Gpu | None, Key("gpu")]
    read_bandwidth: Annotated[float, Key("read_bytes_per_second")]
    disk_bandwidth: Annotated[float | None, Key("disk_bytes_per_second")]
    checks: Annotated[tuple[CheckResult, ...], Key("checks")]

    @property
    def is_broken(self) -> bool:
        return any(check.state == "broken" for check in self.checks)

    def to_dict(self) -> dict[str, object]:
        versions = {"python": platform.python_version(), **package_versions()}
        return {**to_json(self), "versions": versions, "broken": self.is_broken}


def diagnose(model: str | None, on_progress: Callable[[str], None]) -> Diagnosis:
    """Examines this machine; the disk is read below the folder of ``model``."""
    on_progress("reading memory")
    processor, memory, gpu = Processor.of(), HostMemory.of(), Gpu.of()
    read = measure_read_bandwidth()
    folder = cache_folder() if model is None else find_folder(model, ())
    on_progress("reading the disk")
    disk = measure_disk_bandwidth(folder)
    on_progress("testing the kernels")
    checks = (
        processor_check(processor),
        memory_check(memory, read),
        disk_check(folder, disk),
        gpu_check(gpu),
        *kernel_checks(open_library()),
        triton_check(gpu),
        *(kernel_test(name) for name in MAX_ERRORS),
        answer_check(),
        *extra_checks(),
        *(
            CheckResult("load", warning, "note")
            for warning in load_warnings(timing_conditions(CPU))
        ),
        CheckResult("versions", ", ".join(f"{n} {v}" for n, v in package_versions().items())),
    )
    return Diagnosis(processor, memory, gpu, read, disk, checks)


def cache_folder() -> Path:
    """The nearest existing folder of the hub's cache."""
    cache = Path(HF_HUB_CACHE)  # perhaps below a folder of another user
    return next(folder for folder in (cache, *cache.parents) if os.path.isdir(folder))


def processor_check(processor: Processor) -> CheckResult:
    numbers = "" if processor.family is None else f" (family {processor.family}, "
    numbers += "" if processor.family is None else f"model {processor.model})"
    sets = ", ".join(processor.instruction_sets) or "no sets that the kernels use"
    threads = torch.get_num_threads()
    return CheckResult(
        "processor",
        f"{processor.name}{numbers}, {processor.cores} cores, {threads} threads; {sets}",
    )


def memory_check(memory: HostMemory, read: float) -> CheckResult:
    total, available = (
        "?" if size is None else format_bytes(size) for size in (memory.total, memory.available)
    )
    group = memory.group_available
    limit = "" if group is None else f", {format_bytes(group)} left in its control group"
    return CheckResult(
        "memory", f"{total}, {available} available{limit}, read at {read / 1e9:.1f} GB/s"
    )


def disk_check(folder: Path, disk: float | None) -> CheckResult:
    if disk is None:
        return CheckResult("disk", f"{folder} cannot be written to, so it was not timed", "note")
    return CheckResult("disk", f"{disk / 1e9:.2f} GB/s, checksums included, below {folder}")


def gpu_check(gpu: Gpu | None) -> CheckResult:
    if gpu is None:
        return CheckResult("GPU", "none that PyTorch sees")
    return CheckResult(
        "GPU",
        f"{gpu.name}, {format_bytes(gpu.available)} of {format_bytes(gpu.total)} free, "
        f"link {gpu.link_bandwidth / 1e9:.1f} GB/s",
    )


def kernel_checks(library: KernelLibrary | str) -> tuple[CheckResult, ...]:
    """The CPU kernels: whether they run, on which instruction set, and why not on a better one."""
    if isinstance(library, str):
        state: State = "broken" if build.LIBRARY_PATH.exists() else "note"
        compiler = find_compiler()
        remedy = REBUILD if compiler else f"install a C++ compiler (such as g++), then {REBUILD}"
        value = f"not used, PyTorch computes instead: {library}"
        return (CheckResult("CPU kernels", value, state, remedy),)
    try:
        chosen = library.isa()
    except ConfigError as error:
        return (CheckResult("CPU kernels", str(error), "broken", f"unset {ISA_VARIABLE}"),)
    name = next(isa for isa, number in library.isas.items() if number == chosen)
    reason = _why_not_better(library, name)
    value = f"{name}: experts, matrices, routing and attention of a bf16 model{reason}"
    checks = [CheckResult("CPU kernels", value, "note" if ISA_VARIABLE in os.environ else "ok")]
    if build.is_stale():
        stale = "the library is older than its sources"
        checks.append(CheckResult("library", stale, "note", REBUILD))
    return tuple(checks)


def _why_not_better(library: KernelLibrary, name: str) -> str:
    known = list(build.ISA_FLAGS)
    if name == known[-1]:
        return ""
    if name != list(library.isas)[-1]:
        return f"; {ISA_VARIABLE}={name} rules out {list(library.isas)[-1]}"
    missing = known[known.index(name) + 1] if name in known else known[-1]
    return f"; the processor lacks {missing}"


def find_compiler() -> str | None:
    """The C++ compiler that a rebuild would use; None without one."""
    with suppress(build.NoCompilerError):
        return " ".join(build.find_compiler())
    return None


def triton_check(gpu: Gpu | None) -> CheckResult:
    if find_spec("triton") is not None:
        use = "used on the GPU" if gpu is not None else "installed; it has no effect without a GPU"
        return CheckResult("Triton", use)
    if gpu is None:
        return CheckResult("Triton", "not installed, and of no use without a GPU")
    return CheckResult(
        "Triton", "not installed: the GPU runs PyTorch alone", "note", "pip install triton"
    )


def kernel_test(name: str) -> CheckResult:
    """One layer of random experts by the installed kernels, against plain torch."""
    title = f"layer in {name}"
    try:
        error = layer_error(name)
    except Exception as failure:  # whatever a broken library raises is reported
        text = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        return CheckResult(title, text, "broken", REBUILD)
    state: State = "ok" if error <= MAX_ERRORS[name] else "broken"
    remedy = None if state == "ok" else REBUILD
    return CheckResult(title, f"{error:.2%} off plain torch", state, remedy)


@torch.inference_mode()
def layer_error(name: str) -> float:
    """Relative error of a layer by ``ops`` against the reference with the same stored weights."""
    generator = torch.Generator().manual_seed(0)
    experts, hidden, width = TEST_ROUTER.experts, TEST_HIDDEN, TEST_WIDTH
    up = torch.randn(experts, 2 * width, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(experts, hidden, width, generator=generator) * width**-0.5
    x = torch.randn(TEST_TOKENS, hidden, generator=generator).bfloat16()
    routing = balanced_routing(TEST_ROUTER, TEST_TOKENS, experts, generator, CPU)
    slots = torch.arange(experts)
    stored_up, stored_down = (_stored(weight, name) for weight in (up, down))
    plain = Slab(_plain(stored_up), _plain(stored_down), slots)
    expected = reference.run_experts(x.float(), routing, plain)
    result = ops.run_experts(x, routing, ops.prepare(Slab(stored_up, stored_down, slots)))
    return float((result - expected).norm() / expected.norm())


def _stored(weight: Tensor, name: str) -> Tensor | QTensor:
    return quantize(weight, FORMATS[name]) if name in FORMATS else weight.bfloat16()


def _plain(weight: Tensor | QTensor) -> Tensor:
    return dequantize(weight) if isinstance(weight, QTensor) else weight.float()


def answer_check() -> CheckResult:
    """The model in the package answers one question."""
    try:
        result = load(None, device="cpu").generate(QUESTION, max_new_tokens=64)
    except (CoterieError, OSError, RuntimeError) as error:
        return CheckResult(
            "model", " ".join(str(error).split())[:200], "broken", "pip install coterie"
        )
    right = ANSWER in result.text
    value = f"{result.text.strip()!r} at {result.tokens_per_second:.0f} tokens/s"
    return CheckResult(
        "model", f"the one in the package answers {value}", "ok" if right else "broken"
    )


def extra_checks() -> list[CheckResult]:
    """Each optional extra: installed, or the command that installs it."""
    checks = []
    for name, (purpose, modules) in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        remedy = f"pip install '.[{name}]' in a clone of Coterie" if missing else None
        text = f"lacks {', '.join(missing)}" if missing else "installed"
        checks.append(CheckResult(f"extra {name}", f"{text}; for {purpose}", "ok", remedy))
    return checks
