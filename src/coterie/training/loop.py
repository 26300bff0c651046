"""The training run: forked workers over shared weights, one optimiser step after another.

Every worker computes gradients of its own rows on one thread, then updates its own part of the
shared weights from the sum. Nothing is copied between processes, and a stolen core delays a step
but never spins. Results depend on the seed and on the number of workers, on nothing else.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coterie.keys import Key, to_json
from coterie.naming import CoterieError
from coterie.training.batch import Batch
from coterie.training.feed import FORK, Feed, Make, fork
from coterie.training.network import Network, Shape, visibility
from coterie.training.optim import Flat, Rates, adamw, attach, flatten, muon

# Seconds that the leader waits for a worker before it takes it for dead.
PATIENCE = 600.0

STATE = "state.safetensors"
Told = Callable[[dict[str, object]], None]  # hears each line of the log


@dataclass(frozen=True)
class Config:
    """A run, reproducible from these values."""

    steps: Annotated[int, Key("steps")]
    seed: Annotated[int, Key("seed")] = 0
    workers: Annotated[int, Key("workers")] = 2
    precision: Annotated[Literal["bf16", "fp32"], Key("precision")] = "bf16"
    shape: Annotated[Shape, Key("shape")] = field(default_factory=Shape)
    rates: Annotated[Rates, Key("rates")] = field(default_factory=Rates)
    warm_up: Annotated[int, Key("warm_up")] = 100
    decay: Annotated[float, Key("decay")] = (
        0.4  # the last part of the run, over which rates fall linearly
    )
    floor: Annotated[float, Key("floor")] = 0.0  # the rate at the end, as a part of the peak
    momentum_warm_up: Annotated[int, Key("momentum_warm_up")] = (
        300  # steps over which Muon's momentum rises from 0.85
    )
    clip: Annotated[float, Key("clip")] = 1.0
    balance: Annotated[float, Key("balance")] = 1e-3  # the bias update
    balance_early: Annotated[float, Key("balance_early")] = (
        3e-3  # ... at the start, falling to ``balance``
    )
    balance_steps: Annotated[int, Key("balance_steps")] = 2000  # ... over so many steps
    log_every: Annotated[int, Key("log_every")] = 20
    save_every: Annotated[int, Key("save_every")] = 500
    tasks: Annotated[tuple[str, ...], Key("tasks")] = ()  # names of the task ids in batches

    def rate(self, step: int) -> float:
        """The learning rate as a part of the peak: up, flat, down."""
        left = (self.steps - step) / max(1, round(self.decay * self.steps))
        return min(1.0, (step + 1) / self.warm_up) * max(self.floor, min(1.0, left))

    def momentum(self, step: int) -> float:
        """Muon's momentum."""
        full = self.rates.momentum
        return full - (full - 0.85) * max(0.0, 1 - step / self.momentum_warm_up)

    def bias_rate(self, step: int) -> float:
        """The size of the bias update."""
        early = max(0.0, 1 - step / self.balance_steps)
        return self.balance + (self.balance_early - self.balance) * early


class State:
    """All that a run changes, in memory that workers share."""

    def __init__(self, config: Config) -> None:
        precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.network = Network(config.shape, seed=config.seed, precision=precision)
        self.step = 0
        self.run = json.dumps(to_json(config) | {"steps": 0}, sort_keys=True)
        workers, network = config.workers, self.network
        self.groups = _groups(network, config.rates)
        self.flats = [
            flatten(pairs, workers, 1 if i else 2, matrices=i > 0)
            for i, pairs in enumerate(self.groups)
        ]
        for bias in network.biases():
            bias.share_memory_()
        self.loads = torch.zeros(
            workers, len(network.biases()), config.shape.experts, dtype=torch.int64
        ).share_memory_()
        # Per worker: the squared length of each flat gradient part, then (loss, weight) by task.
        self.squares = torch.zeros(workers, len(self.flats), dtype=torch.float64).share_memory_()
        tasks = max(1, len(config.tasks))
        self.losses = torch.zeros(workers, tasks, 2, dtype=torch.float64).share_memory_()

    def tensors(self) -> list[Tensor]:
        """What a checkpoint holds, in a fixed order."""
        flats = [t for f in self.flats for t in (f.weights, *f.state)]
        return [*flats, *self.network.biases()]

    def save(self, path: Path) -> None:
        """Write everything to one file that appears whole or not at all."""
        partial = path.with_suffix(".partial")
        named = {f"{i:03}": tensor.clone() for i, tensor in enumerate(self.tensors())}
        save_file(named, partial, metadata={"step": str(self.step), "run": self.run})
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote into this state; CoterieError if another run wrote it."""
        with safe_open(path, framework="pt") as saved:
            facts = saved.metadata()
            if facts["run"] != self.run:
                raise CoterieError(
                    f"{path}: left by a run of other settings; choose another folder"
                )
            self.step = int(facts["step"])
            for i, mine in enumerate(self.tensors()):
                mine.copy_(saved.get_tensor(f"{i:03}"))


def train(make: Make, config: Config, out: Path, *, told: Told | None = None) -> Network:
    """Train to the last step, from what ``out`` holds of this run; log to ``out/log.jsonl``.

    ``make(step)`` gives the batch of a step and runs in a process of its own; it must depend on
    nothing but the step and on what it was built with. ``told`` hears each line of the log. A run
    that is continued may be given another number of steps, which moves its schedule.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # before forking: an OpenMP pool does not survive a fork
    state = State(config)
    if (out / STATE).exists():
        state.load(out / STATE)
    feed = Feed(make, state.step, config.steps, lanes=config.workers)
    barrier = FORK.Barrier(config.workers)
    # Only the leader may be late (it saves and tells), so only the leader's patience ends.
    meets = [partial(barrier.wait, None if i else PATIENCE) for i in range(config.workers)]
    workers = [_Worker(i, config, state, feed, meet) for i, meet in enumerate(meets)]
    others = [fork(_follow, worker, barrier.abort) for worker in workers[1:]]
    try:
        _lead(workers[0], out, told)
    finally:
        barrier.abort()
        feed.close()
        for process in others:
            process.terminate()
            process.join()
    state.save(out / STATE)
    return state.network


class _Worker:
    """One process's part of every step."""

    def __init__(
        self, index: int, config: Config, state: State, feed: Feed, meet: Callable[[], int]
    ) -> None:
        self.index, self.config, self.state = index, config, state
        self.feed, self.meet = feed, meet

    def attach(self) -> None:
        """Point this process's gradients at its own rows of the shared buffers."""
        for flat, pairs in zip(self.state.flats, self.state.groups, strict=True):
            attach(flat, [p for p, _ in pairs], self.index)

    def step(self) -> None:
        """Gradients of own rows, then the update of own part of the weights."""
        state, config = self.state, self.config
        for flat in state.flats:
            flat.gradients[self.index].zero_()
        self._differentiate(self.feed.take(self.index))
        self.meet()
        for i, flat in enumerate(state.flats):
            state.squares[self.index, i] = flat.gather(self.index)
        self.meet()
        length = math.sqrt(float(state.squares.sum()))
        clip = min(1.0, config.clip / (length + 1e-6))
        lr = config.rate(state.step)
        for i, flat in enumerate(state.flats):
            self._update(flat, matrices=i > 0, lr=lr, clip=clip)
        if self.index == 0:
            _rebalance(state, config.bias_rate(state.step))
        self.meet()
        state.step += 1

    def _differentiate(self, batch: Batch) -> None:
        state = self.state
        wanted = (batch.targets.flatten() >= 0).nonzero().squeeze(1)
        mask = visibility(batch.visible, self.config.shape.block)
        logits, loads = state.network(batch.tokens, batch.positions, mask, wanted)
        loss = F.cross_entropy(logits, batch.targets.flatten()[wanted], reduction="none")
        weight = batch.weights.flatten()[wanted]
        torch.dot(loss, weight).div(batch.weight()).backward()
        state.loads[self.index] = loads
        task = torch.zeros_like(wanted) if batch.tasks is None else batch.tasks.flatten()[wanted]
        sums = torch.stack([loss.detach() * weight, weight], -1).double()
        state.losses[self.index].zero_().index_add_(0, task, sums)

    def _update(self, flat: Flat, *, matrices: bool, lr: float, clip: float) -> None:
        part, rates, step = flat.part(self.index), self.config.rates, self.state.step
        with torch.no_grad():
            if matrices:
                muon(flat, part, rates, lr=lr, momentum=self.config.momentum(step), clip=clip)
            else:
                adamw(flat, part, rates, lr=lr, step=step, clip=clip)


def _lead(worker: _Worker, out: Path, told: Told | None) -> None:
    config, state = worker.config, worker.state
    worker.attach()
    begun, first, since = time.monotonic(), state.step, time.monotonic()
    with (out / "log.jsonl").open("a", buffering=1) as log:
        log.write(json.dumps({"config": to_json(config), "step": state.step}) + "\n")
        while state.step < config.steps:
            worker.step()
            step = state.step
            if step % config.log_every == 0 or step == config.steps:
                now = time.monotonic()
                positions = int(state.loads.sum()) // (
                    config.shape.k * max(1, state.loads.shape[1])
                )
                speed = positions * min(config.log_every, step - first) / (now - since)
                facts = {"step": step, "elapsed": round(now - begun, 1), "speed": round(speed)}
                facts |= _facts(state, config)
                log.write(json.dumps(facts) + "\n")
                if told is not None:
                    told(facts)
                since = now
            if step % config.save_every == 0:
                state.save(out / STATE)


def _follow(worker: _Worker, abort: Callable[[], None]) -> None:
    try:
        worker.attach()
        while worker.state.step < worker.config.steps:
            worker.step()
    except BaseException:
        abort()
        raise


def _groups(network: Network, rates: Rates) -> list[list[tuple[torch.nn.Parameter, float]]]:
    """Parameters with their rates: first what AdamW moves, then matrices by their size."""
    matrices = network.matrices()
    hidden = network.shape.hidden
    seen = {id(p) for p in matrices}
    named = {"embeddings": rates.embedding, "head": rates.head, "gate": rates.router}
    rest = [
        (p, named.get(name.rpartition(".")[2], rates.norm))
        for name, p in network.named_parameters()
        if id(p) not in seen
    ]
    sizes: dict[torch.Size, list[tuple[torch.nn.Parameter, float]]] = {}
    for p in matrices:
        # An orthogonal step of r x c has entries of size 1 / sqrt(max(r, c)): make all alike.
        rate = rates.matrix * math.sqrt(max(p.shape[-2:]) / hidden)
        sizes.setdefault(p.shape[-2:], []).append((p, rate))
    return [rest, *sizes.values()]


def _rebalance(state: State, rate: float) -> None:
    """Raise the bias of every expert that got less than its share, lower the others."""
    loads = state.loads.sum(0).float()  # [moe, E]
    for bias, load in zip(state.network.biases(), loads, strict=True):
        bias.add_(torch.sign(load.mean() - load), alpha=rate)


def _facts(state: State, config: Config) -> dict[str, object]:
    loss, weight = state.losses.sum(0).unbind(-1)
    loads = state.loads.sum(0).double()
    share = loads / loads.sum(-1, keepdim=True).clamp_min(1)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(-1)
    by_task = (loss / weight.clamp_min(1e-9)).tolist()
    return {
        "loss": round(float(loss.sum() / weight.sum().clamp_min(1e-9)), 4),
        "tasks": {n: round(v, 4) for n, v in zip(config.tasks, by_task, strict=False)},
        "length": round(math.sqrt(float(state.squares.sum())), 4),
        "rate": round(config.rate(state.step - 1), 4),
        "crowding": [round(v, 2) for v in (share.amax(-1) * share.shape[-1]).tolist()],
        "effective": [round(v, 1) for v in entropy.exp().tolist()],
        "dead": [int(v) for v in (loads == 0).sum(-1).tolist()],
    }
