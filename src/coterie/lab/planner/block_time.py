"""The predicted time of one block of an answer: its forwards by the family's KV scheme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from coterie.decoding.canvas import Block
from coterie.decoding.kv_schemes import DecodePlan, ForwardPass, StepCounter, parse_plan
from coterie.lab.planner.expert_counts import BlockCounts, PassCounts
from coterie.lab.planner.planned_model import PlannedModel
from coterie.lab.planner.rates import MachineRates, ShapeCost
from coterie.values import RouterSpec

BLOCKS_BEFORE, BLOCKS_AFTER = 7, 4  # of the block that is predicted: the middle of an answer


@dataclass(frozen=True)
class BlockTime:
    """Seconds of a block with all its forwards; means of the forwards that decode it."""

    seconds: float
    forward_seconds: float
    forward_bytes: float


def predict_block(
    model: PlannedModel,
    cost: ShapeCost,
    rates: MachineRates,
    counts: BlockCounts,
    *,
    slots: int,
    steps: int,
) -> BlockTime:
    """The time of a block that is filled in ``steps`` forwards, as many tokens in each."""
    plan, block = decode_plan(model), middle_block(model)
    seconds, sizes = [], []
    for step, each in enumerate(decode_passes(model, steps)):
        counted = counts_of_pass(each, counts.decode, model, slots)
        logits = block.width - step * block.width // steps
        times = {"tokens": each.width, "num_logits": logits, "positions": each.visible}
        seconds.append(cost.seconds(rates, counted, **times))
        sizes.append(cost.bytes(each.visible, counted))
    commits = [
        cost.seconds(rates, counts.commit, tokens=each.width, num_logits=0, positions=each.visible)
        for each in plan.commit_passes(block)
    ]
    total = sum(seconds)
    return BlockTime(total + sum(commits), total / steps, sum(sizes) / steps)


def decode_plan(model: PlannedModel) -> DecodePlan:
    return parse_plan(model.shape.family.defaults.kv_cache)


def middle_block(model: PlannedModel) -> Block:
    return Block(BLOCKS_BEFORE, BLOCKS_BEFORE * model.block, (BLOCKS_BEFORE + 1) * model.block)


def decode_passes(model: PlannedModel, steps: int) -> Iterator[ForwardPass]:
    """The forwards that decode the middle block."""
    plan, block = decode_plan(model), middle_block(model)
    length = block.stop + BLOCKS_AFTER * model.block
    for step in range(steps):
        yield plan.next_pass(block, length, StepCounter(BLOCKS_BEFORE * steps + step, step))


def window_tokens(model: PlannedModel, steps: int) -> int:
    """Tokens of the narrowest forward that decodes: the block, and its surroundings if any."""
    return min(each.width for each in decode_passes(model, steps))


def counts_of_pass(
    each: ForwardPass, decode: PassCounts, model: PlannedModel, slots: int
) -> PassCounts:
    """The counted experts; for a pass over the whole row, all experts of each layer."""
    router: RouterSpec = model.spec.router
    if each.kind != "refresh":
        return decode
    used = np.full((1, 1), router.experts)
    return PassCounts(used, used - min(slots, router.experts), each.width * router.k)
