"""The training loop: forked workers over weights in shared memory.

In each step, a worker computes the gradients of its rows on one thread, and then updates its part
of the weights from the sum of all gradients. Results depend on the seed and the number of workers
only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from coterie.errors import CheckpointError, ConfigError, CoterieError
from coterie.files import LockedFile, atomic_write, opened
from coterie.keys import Key, to_json
from coterie.lab.training.feed import BatchFunction, BatchLoader, LeaderBarrier, TrainingBatch
from coterie.lab.training.network import NetworkShape, TrainingNetwork, attention_groups
from coterie.lab.training.optim import OptimizerOptions, adamw_step, build_buffer, muon_step
from coterie.lab.training.signals import StopSignals
from coterie.strict_json import parse_object

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"
FREE_SETTINGS = ("steps", "save_every", "log_every")  # which a resumed run may change
LogCallback = Callable[[dict[str, object]], None]  # gets each line of the log
StepCallback = Callable[[int], None]  # gets the number of finished steps


@dataclass(frozen=True)
class TrainingConfig:
    """The settings that determine a training run."""

    steps: Annotated[int, Key("steps")]
    seed: Annotated[int, Key("seed")] = 0
    workers: Annotated[int, Key("workers")] = 2
    precision: Annotated[Literal["bf16", "fp32"], Key("precision")] = "bf16"
    shape: Annotated[NetworkShape, Key("shape")] = field(default_factory=NetworkShape)
    optimizer: Annotated[OptimizerOptions, Key("rates")] = field(default_factory=OptimizerOptions)
    warmup_steps: Annotated[int, Key("warm_up")] = 100
    # The learning rate falls linearly over the last ``decay_fraction`` of the run, to ``min_rate``
    # of the peak. Muon's momentum rises from 0.85 over ``momentum_warmup_steps``.
    decay_fraction: Annotated[float, Key("decay")] = 0.4
    min_rate: Annotated[float, Key("floor")] = 0.0
    momentum_warmup_steps: Annotated[int, Key("momentum_warm_up")] = 300
    max_grad_norm: Annotated[float, Key("clip")] = 1.0
    # The selection bias update falls from the initial rate over ``bias_update_decay_steps``.
    bias_update_rate: Annotated[float, Key("balance")] = 1e-3
    initial_bias_update_rate: Annotated[float, Key("balance_early")] = 3e-3
    bias_update_decay_steps: Annotated[int, Key("balance_steps")] = 2000
    log_every: Annotated[int, Key("log_every")] = 20
    save_every: Annotated[int, Key("save_every")] = 100
    task_names: Annotated[tuple[str, ...], Key("tasks")] = ()  # names of the task ids in batches

    def lr_factor(self, step: int) -> float:
        """The learning rate relative to the peak: warm-up, constant, linear decay."""
        remaining = (self.steps - step) / max(1, round(self.decay_fraction * self.steps))
        return min(1.0, (step + 1) / self.warmup_steps) * max(self.min_rate, min(1.0, remaining))

    def momentum_at(self, step: int) -> float:
        full = self.optimizer.momentum
        return full - (full - 0.85) * max(0.0, 1 - step / self.momentum_warmup_steps)

    def bias_rate_at(self, step: int) -> float:
        early = max(0.0, 1 - step / self.bias_update_decay_steps)
        return (
            self.bias_update_rate + (self.initial_bias_update_rate - self.bias_update_rate) * early
        )


class TrainingState:
    """The state of a run, in memory that the workers share."""

    def __init__(self, config: TrainingConfig) -> None:
        precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.network = TrainingNetwork(config.shape, seed=config.seed, precision=precision)
        self.step = 0
        self.run_config = json.dumps(to_json(config), sort_keys=True)
        workers, network = config.workers, self.network
        groups = _parameter_groups(network, config.optimizer)
        self.buffers = [
            build_buffer(pairs, workers, matrices=i > 0) for i, pairs in enumerate(groups)
        ]
        for bias in network.biases():
            bias.share_memory_()
        self.expert_loads = torch.zeros(
            workers, len(network.biases()), config.shape.experts, dtype=torch.int64
        ).share_memory_()
        # Per worker: the squared length of each flat gradient part, then (loss, weight) by task.
        self.squared_norms = torch.zeros(
            workers, len(self.buffers), dtype=torch.float64
        ).share_memory_()
        tasks = max(1, len(config.task_names))
        self.losses = torch.zeros(workers, tasks, 2, dtype=torch.float64).share_memory_()

    def tensors(self) -> list[Tensor]:
        """The saved tensors, in a fixed order."""
        buffer_tensors = [t for buffer in self.buffers for t in (buffer.weights, *buffer.state)]
        return [*buffer_tensors, *self.network.biases()]

    def save(self, path: Path) -> None:
        """Write the state to one file atomically."""
        tensors_by_name = {f"{i:03}": tensor.clone() for i, tensor in enumerate(self.tensors())}
        metadata = {"step": str(self.step), "run": self.run_config}
        atomic_write(path, save(tensors_by_name, metadata))

    def load(self, path: Path) -> None:
        """Read a saved state. Raises ConfigError if it is of a run with other settings."""
        step, stored = read_state_metadata(path)
        ours = json.loads(self.run_config)
        names = [name for name in ours if name not in FREE_SETTINGS]
        if changed := [name for name in names if stored.get(name) != ours[name]]:
            raise ConfigError(
                f"{path}: a run with other settings ({', '.join(changed)}); choose another folder"
            )
        with _opened_state(path) as file:
            for i, tensor in enumerate(self.tensors()):
                value = file.get_tensor(f"{i:03}")
                if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
                    raise CheckpointError(f"tensor {i} is not of this network")
                tensor.copy_(value)
        self.step = step


def read_state_metadata(path: Path) -> tuple[int, Mapping[str, object]]:
    """The step and the settings of a saved state; raises CheckpointError for another file."""
    with _opened_state(path) as file:
        metadata = file.metadata() or {}
        if not (metadata.keys() >= {"step", "run"} and metadata["step"].isdecimal()):
            raise CheckpointError("not the state of a training run")
        return int(metadata["step"]), parse_object(metadata["run"].encode(), "a training run")


@contextmanager
def _opened_state(path: Path) -> Iterator[safe_open]:
    with opened(path):
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise CheckpointError(f"damaged ({error})") from None


def saved_step(folder: Path) -> int:
    """The step that a run in this folder goes on from."""
    path = folder / STATE_FILE
    return read_state_metadata(path)[0] if path.exists() else 0


def train(
    make_batch: BatchFunction,
    config: TrainingConfig,
    out: Path,
    *,
    on_log: LogCallback = lambda entry: None,
    on_step: StepCallback = lambda step: None,
) -> TrainingNetwork:
    """Train to the last step, resuming the run in ``out``, and log to ``out/log.jsonl``.

    ``make_batch`` runs in its own process, and its result may depend on the step only. A run may be
    resumed with another number of steps, which changes its schedule. Ctrl-C and SIGTERM end a run
    after its current step; the state is saved then too.
    """
    out.mkdir(parents=True, exist_ok=True)
    with LockedFile(out / LOG_FILE) as log, StopSignals() as signals:
        state = TrainingState(config)
        if (out / STATE_FILE).exists():
            state.load(out / STATE_FILE)
        on_step(first_step := state.step)
        with _started_workers(make_batch, config, state) as worker:
            start = last_log = time.monotonic()
            log.append(_encode_line({"config": to_json(config), "step": state.step}))
            while state.step < config.steps and signals.received is None:
                worker.step()
                on_step(state.step)
                if state.step % config.log_every == 0 or state.step == config.steps:
                    now = time.monotonic()
                    steps = min(config.log_every, state.step - first_step)
                    speed = _positions(state) * steps / (now - last_log)
                    entry = {"step": state.step, "elapsed": round(now - start, 1)}
                    entry |= {"speed": round(speed), **_log_entry(state, config)}
                    log.append(_encode_line(entry))
                    on_log(entry)
                    last_log = now
                if state.step % config.save_every == 0:
                    state.save(out / STATE_FILE)
        state.save(out / STATE_FILE)
        signals.raise_received()
    return state.network


@contextmanager
def _started_workers(
    make_batch: BatchFunction, config: TrainingConfig, state: TrainingState
) -> Iterator[_TrainingWorker]:
    """The first worker, which is of this process; all others run in their own."""
    torch.set_num_threads(1)  # before forking: an OpenMP pool does not survive a fork
    loader = BatchLoader(make_batch, state.step, config.steps, num_workers=config.workers)
    barrier = LeaderBarrier()
    for index in range(1, config.workers):
        barrier.start_follower(partial(_run_follower, index, config, state, loader))
    try:
        worker = _TrainingWorker(0, config, state, loader, barrier.wait)
        worker.attach_gradients()
        yield worker
    finally:
        loader.close()
        barrier.close()


@dataclass(frozen=True)
class _TrainingWorker:
    """The part of one process in every step."""

    index: int
    config: TrainingConfig
    state: TrainingState
    loader: BatchLoader
    barrier_wait: Callable[[], None]

    def attach_gradients(self) -> None:
        """Make backward write this worker's gradients into the shared buffers."""
        for buffer in self.state.buffers:
            buffer.attach_gradients(self.index)

    def step(self) -> None:
        """Compute the gradients of this worker's rows, then update its part of the weights."""
        state, config = self.state, self.config
        for buffer in state.buffers:
            buffer.gradients[self.index].zero_()
        self._compute_gradients(self.loader.next_batch(self.index))
        self.barrier_wait()
        for i, buffer in enumerate(state.buffers):
            state.squared_norms[self.index, i] = buffer.reduce_gradients(self.index)
        self.barrier_wait()
        grad_norm = math.sqrt(float(state.squared_norms.sum()))
        clip = min(1.0, config.max_grad_norm / (grad_norm + 1e-6))
        self._update_weights(clip)
        if self.index == 0:
            _update_biases(state, config.bias_rate_at(state.step))
        self.barrier_wait()
        state.step += 1

    def _compute_gradients(self, batch: TrainingBatch) -> None:
        state = self.state
        logits_indices = (batch.targets.flatten() >= 0).nonzero().squeeze(1)
        groups = attention_groups(batch.block_mask, self.config.shape.block)
        logits, loads = state.network(batch.tokens, batch.positions, groups, logits_indices)
        loss = F.cross_entropy(logits, batch.targets.flatten()[logits_indices], reduction="none")
        weight = batch.weights.flatten()[logits_indices]
        torch.dot(loss, weight).div(batch.total_weight()).backward()
        state.expert_loads[self.index] = loads
        task = (
            torch.zeros_like(logits_indices)
            if batch.tasks is None
            else batch.tasks.flatten()[logits_indices]
        )
        sums = torch.stack([loss.detach() * weight, weight], -1).double()
        state.losses[self.index].zero_().index_add_(0, task, sums)

    @torch.no_grad()
    def _update_weights(self, clip: float) -> None:
        """Update this worker's part by the sum of gradients, scaled by ``clip``."""
        config, step = self.config, self.state.step
        lr, momentum = config.lr_factor(step), config.momentum_at(step)
        vectors, *matrices = self.state.buffers
        for buffer in self.state.buffers:
            buffer.gradients[0, buffer.worker_slice(self.index)].mul_(clip)
        adamw_step(vectors, self.index, config.optimizer, lr=lr, step=step)
        for buffer in matrices:
            muon_step(
                buffer,
                self.index,
                config.optimizer,
                lr=lr,
                momentum=momentum,
                precision=self.state.network.precision,
            )


def _run_follower(
    index: int,
    config: TrainingConfig,
    state: TrainingState,
    loader: BatchLoader,
    barrier_wait: Callable[[], None],
) -> None:
    worker = _TrainingWorker(index, config, state, loader, barrier_wait)
    worker.attach_gradients()
    with suppress(CoterieError):  # the first worker finds this process ended, and says so
        while state.step < config.steps:
            worker.step()


def _positions(state: TrainingState) -> int:
    """Token positions of the last step."""
    loads = state.expert_loads
    return int(loads.sum()) // (state.network.shape.k * max(1, loads.shape[1]))


def _parameter_groups(
    network: TrainingNetwork, options: OptimizerOptions
) -> list[list[tuple[torch.nn.Parameter, float]]]:
    """Parameters with their learning rates: those for AdamW, then matrices for Muon by size."""
    hidden = network.shape.hidden_size
    rates_by_name = {"embeddings": options.embedding, "head": options.head, "gate": options.router}
    other_parameters = [
        (p, rates_by_name.get(name.rpartition(".")[2], options.norm))
        for name, p in network.named_parameters()
        if p.ndim <= 2
    ]
    by_size: dict[torch.Size, list[tuple[torch.nn.Parameter, float]]] = {}
    for p in network.matrices():
        # The entries of an orthogonal r x c step are of size 1 / sqrt(max(r, c)).
        rate = options.matrix * math.sqrt(max(p.shape[-2:]) / hidden)
        by_size.setdefault(p.shape[-2:], []).append((p, rate))
    return [other_parameters, *by_size.values()]


def _update_biases(state: TrainingState, rate: float) -> None:
    """Raise the bias of experts with less than the mean load, and lower that of all others."""
    loads = state.expert_loads.sum(0).float()  # [moe, E]
    for bias, load in zip(state.network.biases(), loads, strict=True):
        bias.add_(torch.sign(load.mean() - load), alpha=rate)


def _encode_line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _log_entry(state: TrainingState, config: TrainingConfig) -> dict[str, object]:
    loss, weight = state.losses.sum(0).unbind(-1)
    loads = state.expert_loads.sum(0).double()
    load_share = loads / loads.sum(-1, keepdim=True).clamp_min(1)
    entropy = -(load_share * load_share.clamp_min(1e-12).log()).sum(-1)
    by_task = (loss / weight.clamp_min(1e-9)).tolist()
    return {
        "loss": round(float(loss.sum() / weight.sum().clamp_min(1e-9)), 4),
        "tasks": {n: round(v, 4) for n, v in zip(config.task_names, by_task, strict=False)},
        "length": round(math.sqrt(float(state.squared_norms.sum())), 4),
        "rate": round(config.lr_factor(state.step - 1), 4),
        "crowding": [round(v, 2) for v in (load_share.amax(-1) * load_share.shape[-1]).tolist()],
        "effective": [round(v, 1) for v in entropy.exp().tolist()],
        "dead": [int(v) for v in (loads == 0).sum(-1).tolist()],
    }
