"""Muon for matrices and AdamW for other parameters, over flat buffers that workers share.

A worker sums all gradients of its part of a buffer, and updates that part of the weights.
Shapes: W workers, n matrices of r rows and c columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from coterie.keys import Key

# The quintic iteration of Muon (Jordan et al. 2024), which moves singular values close to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
CHUNK_MATRICES = 64  # which fit a core's L2 cache


@dataclass(frozen=True)
class OptimizerOptions:
    """Peak learning rates and optimizer constants."""

    matrix: Annotated[float, Key("matrix")] = 0.02
    embedding: Annotated[float, Key("embedding")] = 0.01
    head: Annotated[float, Key("head")] = 0.003
    router: Annotated[float, Key("router")] = 0.002
    norm: Annotated[float, Key("norm")] = 0.003
    weight_decay: Annotated[float, Key("decay")] = 0.01  # of matrices, per unit of learning rate
    momentum: Annotated[float, Key("momentum")] = 0.95
    beta1: Annotated[float, Key("beta_first")] = 0.9
    beta2: Annotated[float, Key("beta_second")] = 0.98
    newton_schulz_steps: Annotated[int, Key("iterations")] = 5


@dataclass(frozen=True)
class ParameterBuffer:
    """Concatenated parameters of one kind, their gradients by worker, and the optimizer state."""

    weights: Tensor  # [n, r, c] or [n]
    gradients: Tensor  # [W, *weights.shape]
    state: tuple[Tensor, ...]  # each like weights
    rate: Tensor  # [n], of each matrix or element
    parameters: Sequence[nn.Parameter]  # views of the weights

    def attach_gradients(self, worker: int) -> None:
        """Make backward write this worker's gradients into the buffer."""
        parts = self.gradients[worker].view(-1).split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def worker_slice(self, worker: int) -> slice:
        """The part of the leading dimension that a worker updates."""
        workers, n = len(self.gradients), len(self.weights)
        return slice(n * worker // workers, n * (worker + 1) // workers)

    def reduce_gradients(self, worker: int) -> float:
        """Sum all gradients of this worker's part into the first; returns its squared norm."""
        part = self.worker_slice(worker)
        total = self.gradients[0, part]
        for other in self.gradients[1:]:
            total.add_(other[part])
        return float(torch.linalg.vector_norm(total) ** 2)


def build_buffer(
    pairs: Sequence[tuple[nn.Parameter, float]], workers: int, *, matrices: bool
) -> ParameterBuffer:
    """Move parameters and their rates into a shared buffer; the parameters become views of it."""
    size = pairs[0][0].shape[-2:] if matrices else ()
    reshaped = [p.data.reshape(-1, *size) for p, _ in pairs]
    weights = torch.cat(reshaped).share_memory_()
    counts = [len(s) for s in reshaped]
    for (parameter, _), view in zip(pairs, weights.split(counts), strict=True):
        parameter.data = view.view_as(parameter)
    rate = torch.cat([torch.full((n,), r) for n, (_, r) in zip(counts, pairs, strict=True)])
    gradients = torch.zeros(workers, *weights.shape).share_memory_()
    state = tuple(torch.zeros_like(weights).share_memory_() for _ in range(1 if matrices else 2))
    return ParameterBuffer(weights, gradients, state, rate, [parameter for parameter, _ in pairs])


def muon_step(
    buffer: ParameterBuffer,
    worker: int,
    options: OptimizerOptions,
    *,
    lr: float,
    momentum: float,
    precision: torch.dtype,
) -> None:
    """Update matrices by orthogonalized Nesterov momentum."""
    part = buffer.worker_slice(worker)
    for start in range(part.start, part.stop, CHUNK_MATRICES):
        span = slice(start, min(start + CHUNK_MATRICES, part.stop))
        gradient, momentum_buffer = buffer.gradients[0, span], buffer.state[0][span]
        weight = buffer.weights[span]
        momentum_buffer.lerp_(gradient, 1 - momentum)
        mixed = gradient.lerp_(momentum_buffer, momentum)
        step = orthogonalize(mixed, options.newton_schulz_steps, precision)
        rate = (lr * buffer.rate[span])[:, None, None]
        weight.mul_(1 - rate * options.weight_decay).addcmul_(step.to(weight.dtype), rate, value=-1)


def orthogonalize(
    matrices: Tensor, iterations: int = 5, precision: torch.dtype = torch.bfloat16
) -> Tensor:
    """Matrices [n, r, c] with singular values close to 1, by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)).to(precision)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adamw_step(
    buffer: ParameterBuffer, worker: int, options: OptimizerOptions, *, lr: float, step: int
) -> None:
    """Adam with bias correction, without weight decay."""
    part = buffer.worker_slice(worker)
    gradient, weight = buffer.gradients[0, part], buffer.weights[part]
    first, second = (memory[part] for memory in buffer.state)
    first.lerp_(gradient, 1 - options.beta1)
    second.lerp_(gradient.square_(), 1 - options.beta2)
    root = (second / (1 - options.beta2 ** (step + 1))).sqrt_().add_(1e-10)
    scale = lr * buffer.rate[part] / (1 - options.beta1 ** (step + 1))
    weight.sub_(first / root * scale)
