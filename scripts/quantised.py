"""Holds experts in few bits against whole ones, paired on fresh problems; writes a record.

The engine loads one format after the other and answers the same items; every duel is against the
same policy with fp32 weights. The relative error of a Gaussian expert goes into the record too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import coterie
from coterie.lab.evals.results import EvalResult
from coterie.lab.evals.run import Variant, run_eval
from coterie.lab.evals.stats import Proportion, holm_adjust, paired_difference
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import open_tasks
from coterie.lab.problems import PROBLEM_MAKERS
from coterie.lab.records import make_record, write_record
from coterie.quantization import QuantFormat, dequantize, quantize

SEED = 7001
POLICIES = ("vanilla", "des-vote:beta=0.3")
# What is loaded, by the name it has in the record; the first is what the others are held against.
KEPT: Mapping[str, tuple[str, str | None]] = {
    "fp32": ("float32", None),
    "bf16": ("bfloat16", None),
    "int8": ("float32", "int8"),
    "int4": ("float32", "int4"),
}
GAUSSIAN = (
    QuantFormat(8, 64),
    QuantFormat(8, 128),
    QuantFormat(4, 32),
    QuantFormat(4, 64),
    QuantFormat(4, 128),
)
HIDDEN, WIDTH, TOKENS = 2048, 512, 64


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    sheets = {name: sheets_of(name, asked) for name in KEPT}
    facts = {
        "seed": asked.seed,
        "items_a_task": asked.items,
        "arms": [arm(name, policy, sheets) for name in KEPT for policy in range(len(POLICIES))],
        "duels": duels(sheets),
        "gaussian_expert": [gaussian(form) for form in GAUSSIAN],
    }
    content = make_record("Quantised embedded", ["scripts/quantised", *words], [], facts=facts)
    for line in (*facts["arms"], *facts["duels"], *facts["gaussian_expert"]):
        print("  ".join(f"{key} {value}" for key, value in line.items()))
    print(write_record(asked.out, content))
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/quantised", description=__doc__)
    parser.add_argument("--items", type=int, default=250, help="problems of each of the four tasks")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def sheets_of(name: str, asked: argparse.Namespace) -> list[EvalResult]:
    """One sheet a policy."""
    dtype, experts = KEPT[name]
    engine = coterie.load(dtype=dtype, device="cpu", experts=experts)
    wish = TaskOptions(engine.model.family.name, count=asked.items, seed=asked.seed)
    arms = [Variant(policy) for policy in POLICIES]
    return run_eval(
        engine, open_tasks(list(PROBLEM_MAKERS), wish), arms, None, batch_size=asked.rows
    )


def arm(name: str, policy: int, sheets: Mapping[str, Sequence[EvalResult]]) -> dict[str, object]:
    sheet = sheets[name][policy]
    share = Proportion(sum(sheet.correct()), len(sheet.correct()))
    return {
        "experts": name,
        "policy": sheet.policy,
        "right": share.successes,
        "n": share.n,
        "accuracy": share.value,
        "interval": list(share.interval),
        "forwards_per_block": sheet.forwards_per_block,
        "expert_bytes": sheet.expert_bytes,
    }


def duels(sheets: Mapping[str, Sequence[EvalResult]]) -> list[dict[str, object]]:
    """Each format against the first under the same policy; Holm over all of them."""
    first, *others = KEPT
    pairs = [
        (name, sheets[first][policy], sheets[name][policy])
        for name in others
        for policy in range(len(POLICIES))
    ]
    found = [paired_difference(a.correct(), b.correct()) for _, a, b in pairs]
    raised = holm_adjust([duel.p_value for duel in found])
    return [
        {
            "experts": name,
            "against": first,
            "policy": sheet.policy,
            "change": duel.difference,
            "interval": list(duel.interval),
            "gained": duel.gained,
            "lost": duel.lost,
            "p_holm": p,
        }
        for (name, sheet, _), duel, p in zip(pairs, found, raised, strict=True)
    ]


def gaussian(form: QuantFormat) -> dict[str, object]:
    """Relative errors of one matrix, and of a whole SwiGLU expert of LLaDA2.0-mini's shape."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=draw)
    gate, up = (torch.randn(WIDTH, HIDDEN, generator=draw) * HIDDEN**-0.5 for _ in range(2))
    down = torch.randn(HIDDEN, WIDTH, generator=draw) * WIDTH**-0.5
    coarse = [dequantize(quantize(weight, form)) for weight in (gate, up, down)]
    return {
        "experts": form.name,
        "group": form.group,
        "bits_a_weight": form.bits + 16 / form.group,
        "weight_error": relative(coarse[1], up),
        "layer_error": relative(expert(x, *coarse), expert(x, gate, up, down)),
    }


def expert(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
