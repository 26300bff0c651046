"""The process of a baseline, under its own interpreter: ``PYTHON worker.py BASELINE FOLDER``.

It imports numpy and the baseline's packages, and not Coterie, which its environment may lack.
FOLDER contains ``work.json`` (sizes of the layer, dtype, seed, threads) and ``cases.npz``:
x [C, T, H] fp32, ids [C, T, k], weights [C, T, k] and expected output [C, T, H] of C routed blocks.

It writes ``ready {..}`` with its kernels and versions, then one reply per line of input:
``time KERNEL CASE``: seconds; ``check KERNEL CASE``: the relative error. An error is reported as
``failed ..`` and ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

DISTINCT_EXPERTS = 4  # random experts of a layer; every copy has its own memory

LayerFunction: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
ExpertWeights: TypeAlias = "tuple[Tensor, Tensor]"


@dataclass(frozen=True)
class LayerWorkload:
    """One layer of experts: sizes, dtype, seed and threads."""

    experts: int
    k: int
    hidden: int
    width: int
    dtype: str
    seed: int
    threads: int


@dataclass(frozen=True)
class TimedCase:
    """One routed block: x [T, H] fp32, ids and weights [T, k], the output [T, H] of our kernel."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    expected: np.ndarray


@dataclass(frozen=True)
class BaselineRunner:
    """The functions of a baseline; both get a kernel and the number of a case."""

    kernels: tuple[str, ...]
    time_kernel: Callable[[str, int], float]
    relative_error: Callable[[str, int], float]
    packages: tuple[str, ...]


def make_experts(workload: LayerWorkload) -> tuple[np.ndarray, np.ndarray]:
    """fp32 gate_up [D, 2 I, H] and down [D, H, I]; expert e of a layer is number e % D."""
    rng = np.random.default_rng(workload.seed)
    experts, width, hidden = DISTINCT_EXPERTS, workload.width, workload.hidden
    up = rng.standard_normal((experts, 2 * width, hidden), dtype=np.float32)
    down = rng.standard_normal((experts, hidden, width), dtype=np.float32)
    return up * np.float32(hidden**-0.5), down * np.float32(width**-0.5)


def read_workload(folder: Path) -> tuple[LayerWorkload, list[TimedCase]]:
    """The layer and the cases of a folder."""
    workload = LayerWorkload(**json.loads((folder / "work.json").read_text(encoding="utf-8")))
    with np.load(folder / "cases.npz") as arrays:
        parts = [arrays[name] for name in ("x", "ids", "weights", "expected")]
    return workload, [TimedCase(*arrays_of_case) for arrays_of_case in zip(*parts, strict=True)]


def main() -> int:
    # Libraries print on standard output; that is redirected to the error stream.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        baseline, folder = sys.argv[1], Path(sys.argv[2])
        runner = BASELINES[baseline](folder, *read_workload(folder))
        versions = {name: metadata.version(name) for name in runner.packages}
        write_line(output, "ready " + json.dumps({"works": runner.kernels, "versions": versions}))
        for line in sys.stdin:
            write_line(output, answer(runner, line.split()))
    except Exception as error:
        write_line(output, "failed " + " ".join(f"{type(error).__name__}: {error}".split())[:400])
        return 1
    return 0


def write_line(stream: TextIO, line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


def answer(runner: BaselineRunner, fields: list[str]) -> str:
    command, name, case = fields
    functions = {"time": runner.time_kernel, "check": runner.relative_error}
    return repr(functions[command](name, int(case)))


def output_error(output: np.ndarray, expected: np.ndarray) -> float:
    """The relative error; infinite if the shape is wrong or a value is not finite."""
    if output.shape != expected.shape or not np.isfinite(output).all():
        return float("inf")
    return float(np.linalg.norm(output - expected) / np.linalg.norm(expected))


def torch_baseline(
    make_kernels: Callable[[LayerWorkload, ExpertWeights], Mapping[str, LayerFunction]],
    packages: tuple[str, ...],
) -> Callable[[Path, LayerWorkload, list[TimedCase]], BaselineRunner]:
    """A baseline on PyTorch; its kernels are functions of x, ids and weights."""

    def start_baseline(
        folder: Path, workload: LayerWorkload, cases: list[TimedCase]
    ) -> BaselineRunner:
        del folder
        import torch

        torch.set_num_threads(workload.threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[workload.dtype]

        def repeat_experts(distinct: np.ndarray) -> Tensor:
            copied = torch.arange(workload.experts) % DISTINCT_EXPERTS
            return torch.from_numpy(distinct).to(dtype)[copied]

        up, down = make_experts(workload)
        kernels = make_kernels(workload, (repeat_experts(up), repeat_experts(down)))
        inputs = [
            (
                torch.from_numpy(one_case.x).to(dtype),
                torch.from_numpy(one_case.ids),
                torch.from_numpy(one_case.weights),
            )
            for one_case in cases
        ]

        def seconds(name: str, case: int) -> float:
            with torch.inference_mode():
                start = time.perf_counter()
                kernels[name](*inputs[case])
                return time.perf_counter() - start

        def error(name: str, case: int) -> float:
            with torch.inference_mode():
                output = kernels[name](*inputs[case]).float().numpy()
            return output_error(output, cases[case].expected)

        return BaselineRunner(tuple(kernels), seconds, error, packages)

    return start_baseline


def torch_kernels(workload: LayerWorkload, experts: ExpertWeights) -> dict[str, LayerFunction]:
    """A loop over the used experts, and torch's grouped matrix product."""
    import torch
    from torch.nn import functional as F

    gate_up, down = experts

    def group_by_expert(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=workload.experts)
        return order, order // ids.shape[1], counts

    def combine(x: Tensor, outputs: Tensor, token: Tensor, token_weights: Tensor) -> Tensor:
        weighted = (outputs * token_weights[:, None]).to(x.dtype)
        return torch.zeros_like(x).index_add_(0, token, weighted)

    def loop(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order, token, counts = group_by_expert(ids)
        rows, y, start = x[token], torch.empty(len(token), x.shape[1], dtype=x.dtype), 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                part = slice(start, start + count)
                gate, up = F.linear(rows[part], gate_up[expert]).chunk(2, dim=-1)
                y[part] = F.linear(F.silu(gate) * up, down[expert])
                start += count
        return combine(x, y, token, weights.flatten()[order])

    def grouped(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order, token, counts = group_by_expert(ids)
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[token], gate_up.mT, offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
        return combine(x, y, token, weights.flatten()[order])

    return {"loop": loop, "grouped_mm": grouped}


def transformers_kernels(
    workload: LayerWorkload, experts: ExpertWeights
) -> dict[str, LayerFunction]:
    """The implementations of transformers' Qwen3-MoE layer."""
    import torch

    config_class = import_module("transformers").Qwen3MoeConfig
    layer_class = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeExperts
    config = config_class(
        hidden_size=workload.hidden,
        moe_intermediate_size=workload.width,
        num_experts=workload.experts,
        num_experts_per_tok=workload.k,
    )
    with torch.device("meta"):
        layer = layer_class(config)
    layer.gate_up_proj, layer.down_proj = (
        torch.nn.Parameter(weight, requires_grad=False) for weight in experts
    )

    def with_implementation(name: str) -> LayerFunction:
        def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            layer.config._experts_implementation = name
            return layer(x, ids, weights.to(x.dtype))

        return forward

    return {name: with_implementation(name) for name in ("eager", "grouped_mm", "batched_mm")}


def zentorch_kernels(workload: LayerWorkload, experts: ExpertWeights) -> dict[str, LayerFunction]:
    """AMD's fused MoE layer."""
    import torch

    import_module("zentorch")
    gate_up, down = experts

    def fused(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops.zentorch.zentorch_fused_moe(
            out, x, gate_up, down, None, None, weights, ids.to(torch.int32), False, "silu"
        )
        return out

    return {"fused_moe": fused}


BASELINES: Mapping[str, Callable[[Path, LayerWorkload, list[TimedCase]], BaselineRunner]] = {
    "torch": torch_baseline(torch_kernels, ("torch", "numpy")),
    "transformers": torch_baseline(transformers_kernels, ("torch", "numpy", "transformers")),
    "zentorch": torch_baseline(zentorch_kernels, ("torch", "numpy", "zentorch")),
}

if __name__ == "__main__":
    sys.exit(main())
