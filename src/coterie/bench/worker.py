"""A peer at work, in a process and under a Python of its own: ``PYTHON worker.py PEER FOLDER``.

This file imports nothing of Coterie, for a peer's environment need not hold it: numpy, and what the
peer itself is made of. FOLDER holds ``work.json`` (a layer's sizes, dtype, seed, threads) and
``cases.npz``: x [C, T, H] fp32, ids [C, T, k], weights [C, T, k] of so many routed blocks.

It says ``ready {..}`` with the names of what it can do and its packages' versions, then answers
each line: ``time WORK CASE`` with seconds, ``keep WORK CASE FILE`` with ``kept`` once the layer's
output [T, H] is in that .npy file, ``check WORK CASE`` with its own relative error, where a peer
cannot show its output. What goes wrong is answered with ``failed ..``, and ends it.
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

FEW = 4  # different experts in a layer; every copy lies in memory of its own

Forward: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
Experts: TypeAlias = "tuple[Tensor, Tensor]"


@dataclass(frozen=True)
class Work:
    """One layer of experts: its sizes, and what it is computed in."""

    experts: int
    k: int
    hidden: int
    width: int
    dtype: str
    seed: int
    threads: int


@dataclass(frozen=True)
class Case:
    """One routed block: x [T, H] fp32, ids and weights [T, k]."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Ready:
    """What a peer can do: the seconds of a work on a case, its output or else its error."""

    works: tuple[str, ...]
    time: Callable[[str, int], float]
    packages: tuple[str, ...]
    output: Callable[[str, int], np.ndarray] | None = None
    error: Callable[[str, int], float] | None = None


def few_experts(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """fp32 gate_up [FEW, 2 I, H] and down [FEW, H, I]: expert e of a layer is number e % FEW."""
    draw = np.random.default_rng(work.seed)
    up = draw.standard_normal((FEW, 2 * work.width, work.hidden), dtype=np.float32)
    down = draw.standard_normal((FEW, work.hidden, work.width), dtype=np.float32)
    return up * np.float32(work.hidden**-0.5), down * np.float32(work.width**-0.5)


def read_work(folder: Path) -> tuple[Work, list[Case]]:
    """What the folder asks for."""
    work = Work(**json.loads((folder / "work.json").read_text(encoding="utf-8")))
    with np.load(folder / "cases.npz") as held:
        parts = [held[name] for name in ("x", "ids", "weights")]
    return work, [Case(*one) for one in zip(*parts, strict=True)]


def main() -> int:
    # Libraries chatter on standard output: what they write goes to the error stream instead.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        peer, folder = sys.argv[1], Path(sys.argv[2])
        ready = PEERS[peer](folder, *read_work(folder))
        versions = {name: metadata.version(name) for name in ready.packages}
        say(answers, "ready " + json.dumps({"works": ready.works, "versions": versions}))
        for line in sys.stdin:
            say(answers, answered(ready, line.split()))
    except Exception as error:
        say(answers, "failed " + " ".join(f"{type(error).__name__}: {error}".split())[:400])
        return 1
    return 0


def say(to: TextIO, line: str) -> None:
    to.write(line + "\n")
    to.flush()


def answered(ready: Ready, words: list[str]) -> str:
    verb, name, case, *rest = words
    if verb == "time":
        return repr(ready.time(name, int(case)))
    if verb == "check" and ready.error is not None:
        return repr(ready.error(name, int(case)))
    if verb == "keep" and ready.output is not None:
        np.save(rest[0], ready.output(name, int(case)))
        return "kept"
    raise ValueError(f"cannot {verb}")


# What runs on PyTorch: tensors in, a tensor out


def on_torch(
    make: Callable[[Work, Experts], Mapping[str, Forward]], packages: tuple[str, ...]
) -> Callable[[Path, Work, list[Case]], Ready]:
    """A peer whose works are functions of x, ids and weights, made once the experts are there."""

    def opened(folder: Path, work: Work, cases: list[Case]) -> Ready:
        del folder
        import torch

        torch.set_num_threads(work.threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[work.dtype]

        def whole(few: np.ndarray) -> Tensor:
            some = torch.from_numpy(few).to(dtype)
            every = torch.empty(work.experts, *some.shape[1:], dtype=dtype)
            for expert in range(work.experts):
                every[expert] = some[expert % FEW]
            return every

        up, down = few_experts(work)
        works = make(work, (whole(up), whole(down)))
        given = [
            (torch.from_numpy(c.x).to(dtype), torch.from_numpy(c.ids), torch.from_numpy(c.weights))
            for c in cases
        ]

        def seconds(name: str, case: int) -> float:
            with torch.inference_mode():
                began = time.perf_counter()
                works[name](*given[case])
                return time.perf_counter() - began

        def output(name: str, case: int) -> np.ndarray:
            with torch.inference_mode():
                return works[name](*given[case]).float().numpy()

        return Ready(tuple(works), seconds, packages, output=output)

    return opened


def torch_works(work: Work, experts: Experts) -> dict[str, Forward]:
    """A loop over the experts that somebody chose, and torch's grouped product."""
    import torch
    from torch.nn import functional as F

    gate_up, down = experts

    def by_expert(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=work.experts)
        return order, order // ids.shape[1], counts

    def combined(x: Tensor, y: Tensor, token: Tensor, shares: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add_(0, token, (y * shares[:, None]).to(x.dtype))

    def loop(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order, token, counts = by_expert(ids)
        rows, y, first = x[token], torch.empty(len(token), x.shape[1], dtype=x.dtype), 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                part = slice(first, first + count)
                gate, up = F.linear(rows[part], gate_up[expert]).chunk(2, dim=-1)
                y[part] = F.linear(F.silu(gate) * up, down[expert])
                first += count
        return combined(x, y, token, weights.flatten()[order])

    def grouped(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order, token, counts = by_expert(ids)
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[token], gate_up.mT, offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
        return combined(x, y, token, weights.flatten()[order])

    return {"loop": loop, "grouped_mm": grouped}


def transformers_works(work: Work, experts: Experts) -> dict[str, Forward]:
    """The implementations that transformers chooses from, in its Qwen3-MoE layer."""
    import torch

    config_of = import_module("transformers").Qwen3MoeConfig
    layer_of = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeExperts
    config = config_of(
        hidden_size=work.hidden,
        moe_intermediate_size=work.width,
        num_experts=work.experts,
        num_experts_per_tok=work.k,
    )
    with torch.device("meta"):
        layer = layer_of(config)
    layer.gate_up_proj, layer.down_proj = (
        torch.nn.Parameter(weight, requires_grad=False) for weight in experts
    )

    def using(name: str) -> Forward:
        def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            layer.config._experts_implementation = name
            return layer(x, ids, weights.to(x.dtype))

        return forward

    return {name: using(name) for name in ("eager", "grouped_mm", "batched_mm")}


def zentorch_works(work: Work, experts: Experts) -> dict[str, Forward]:
    """AMD's fused layer."""
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


PEERS: Mapping[str, Callable[[Path, Work, list[Case]], Ready]] = {
    "torch": on_torch(torch_works, ("torch", "numpy")),
    "transformers": on_torch(transformers_works, ("torch", "numpy", "transformers")),
    "zentorch": on_torch(zentorch_works, ("torch", "numpy", "zentorch")),
}

if __name__ == "__main__":
    sys.exit(main())
