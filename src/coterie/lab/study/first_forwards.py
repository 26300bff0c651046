"""First forwards of blocks: every position is masked and belongs to the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie import ops
from coterie.engine.engine import Engine
from coterie.engine.observation import first_forward, observe_forwards
from coterie.errors import TaskError
from coterie.telemetry import TensorRecorder
from coterie.values import Policy

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class BlockForward:
    """The first forward of one block under one policy, repeated in S rows."""

    trace: TensorRecorder
    block: slice  # its positions in the window
    hidden: Tensor  # [S, N, H], the input of the head
    logits: Tensor  # [S, N, vocabulary]

    @property
    def ids(self) -> Tensor:
        """[S, N]: the most likely tokens."""
        return self.logits.argmax(-1)


def prompts_at_block_start(engine: Engine, prompts: Sequence[str]) -> list[Prompt]:
    """Each prompt, extended by vanilla's answer up to the next block boundary.

    The block after the boundary holds answer tokens only. An answer that ends before it is
    omitted; raises TaskError where all do.
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
            extended.append((*engine.model.tokenizer.encode(prompt), *result.tokens[:shared]))
    if not extended:
        raise TaskError("every answer ends in the block of its prompt, so no block is all answer")
    return extended


@torch.inference_mode()
def run_first_forward(
    engine: Engine, prompt: Prompt, policy: str | Policy, rows: int = 1
) -> BlockForward:
    """The first block of the prompt under the policy, in ``rows`` equal rows."""
    first = first_forward(engine, [prompt] * rows, policy=policy)
    transformer = engine.model.transformer
    hidden = first.trace.outputs[-1][1].view(rows, -1, transformer.spec.hidden)
    logits = ops.linear(hidden, transformer.head, dtype=torch.float32)
    return BlockForward(first.trace, first.block, hidden, logits)


def _first_block(engine: Engine, prompt: str) -> tuple[int, int]:
    """Start and stop of the first block, counted from the first new token."""
    probe_engine = Engine(engine.model, generation=engine.generation)
    row = probe_engine.sequence(probe_engine.submit(prompt))
    return row.block.start - row.canvas.prompt_length, row.block.stop - row.canvas.prompt_length


def content_mask(engine: Engine, ids: Tensor) -> Tensor:
    """Bool [S, N] of tokens [S, N]: up to and including the first end-of-text token."""
    ends = torch.isin(ids, torch.tensor(engine.model.eos_ids, device=ids.device)).long()
    return ends.cumsum(-1) - ends == 0


def kl_divergence(vanilla: Tensor, other: Tensor) -> Tensor:
    """The Kullback-Leibler divergence in nats, [S, N] float64, of logits [1 or S, N, vocabulary].

    It is computed in float64, because rounding in float32 is as large as small divergences.
    """
    vanilla, rows = vanilla.expand(other.shape), []
    for vanilla_row, other_row in zip(vanilla, other, strict=True):
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (vanilla_row, other_row))
        rows.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0))
    return torch.stack(rows)


def relative_squared_error(vanilla: Tensor, other: Tensor) -> Tensor:
    """[S]: squared distance of hidden states [1 or S, N, H] to vanilla's, relative to vanilla's."""
    squared_error = (other.double() - vanilla.double()).square().sum((1, 2))
    return squared_error / vanilla.double().square().sum((1, 2))
