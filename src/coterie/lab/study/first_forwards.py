"""Blocks at the moment they are opened: every position masked, all of them part of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie import ops
from coterie.engine.engine import Engine
from coterie.engine.observation import first_forward, observe_forwards
from coterie.errors import CoterieError
from coterie.telemetry import TensorRecorder
from coterie.values import Policy

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class BlockForward:
    """One block's first forward under one policy, which S rows share."""

    trace: TensorRecorder
    block: slice  # where it lies in the window
    hidden: Tensor  # [S, N, H], as the head reads it
    logits: Tensor  # [S, N, vocabulary]

    @property
    def ids(self) -> Tensor:
        """[S, N] what would be written."""
        return self.logits.argmax(-1)


def prompts_at_block_start(engine: Engine, prompts: Sequence[str]) -> list[Prompt]:
    """Each prompt, and vanilla's answer as far as it shares a block with the prompt.

    A block that begins inside the prompt is mostly read, not written; the one after it is all
    answer. An answer that ends before it is left out; where all do, CoterieError.
    """
    blocks = [_first_block(engine, prompt) for prompt in prompts]
    results = observe_forwards(
        engine, prompts, lambda _: None, max_new_tokens=engine.generation.block
    )
    extended = []
    for prompt, (start, stop), result in zip(prompts, blocks, results, strict=True):
        shared = stop if start < 0 else 0
        if shared < result.new_tokens or (
            shared == result.new_tokens and result.finish_reason == "length"
        ):
            extended.append((*engine.model.codec.encode(prompt), *result.tokens[:shared]))
    if not extended:
        raise CoterieError("every answer ended in the block of its prompt: nothing to look at")
    return extended


@torch.inference_mode()
def run_first_forward(
    engine: Engine, prompt: Prompt, policy: str | Policy, rows: int = 1
) -> BlockForward:
    """The prompt's first block under the policy, ``rows`` times side by side."""
    first = first_forward(engine, [prompt] * rows, policy=policy)
    transformer = engine.model.transformer
    hidden = first.trace.outputs[-1][1].view(rows, -1, transformer.spec.hidden)
    logits = ops.linear(hidden, transformer.head, dtype=torch.float32)
    return BlockForward(first.trace, first.block, hidden, logits)


def _first_block(engine: Engine, prompt: str) -> tuple[int, int]:
    """Its start and stop, counted from the first new token."""
    probe_engine = Engine(engine.model, generation=engine.generation)
    row = probe_engine.sequence(probe_engine.submit(prompt))
    return row.block.start - row.canvas.prompt_length, row.block.stop - row.canvas.prompt_length


def content_mask(engine: Engine, ids: Tensor) -> Tensor:
    """Bool [S, N] of proposals [S, N]: up to the first end-of-text, which is a word too."""
    ends = torch.isin(ids, torch.tensor(engine.model.eos_ids, device=ids.device)).long()
    return ends.cumsum(-1) - ends == 0


def kl_divergence(vanilla: Tensor, other: Tensor) -> Tensor:
    """Kullback and Leibler's, [S, N] float64 nats, of logits [1 or S, N, vocabulary].

    In float64 and row by row: in float32 the logarithms' last digits would pass for small changes.
    """
    vanilla, rows = vanilla.expand(other.shape), []
    for vanilla_row, other_row in zip(vanilla, other, strict=True):
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (vanilla_row, other_row))
        rows.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0))
    return torch.stack(rows)


def relative_squared_error(vanilla: Tensor, other: Tensor) -> Tensor:
    """[S]: how far hidden states [1 or S, N, H] lie from vanilla's, squared, relative to these."""
    squared_error = (other.double() - vanilla.double()).square().sum((1, 2))
    return squared_error / vanilla.double().square().sum((1, 2))
