"""Compares routing by block, block edits and decoding traces with reference files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.decoding.block_edit import (
    BlockEditRule,
    EditIds,
    EditState,
    JointEditRule,
    JointThresholdInDelRule,
    Predictions,
)
from coterie.decoding.sampling import Sampling, propose
from coterie.files import read_text
from coterie.lab.parity.forward import WEIGHTS_TOLERANCE
from coterie.routing import Vanilla, route
from coterie.routing.router import admitted_experts
from coterie.strict_json import LISTING_FILE, read_object
from coterie.values import RouterSpec, Scores

ROUTING, EDITS, TRACES = "block-routing.json", "edits.json", "edit-traces.jsonl"
TRACE_RULES = {"reference_rule": JointEditRule, "sglang_0_5_23": JointThresholdInDelRule}


def has_block_rules(folder: Path) -> bool:
    return any((folder / name).exists() for name in (ROUTING, EDITS, TRACES))


def block_rule_results(folder: Path, device: str = "cpu") -> Iterator[tuple[bool, str]]:
    """For each case of the files that are there: whether it agrees, and one line."""
    if (file := folder / ROUTING).exists():
        for number, case in enumerate(_read_document(file)["cases"]):
            yield _result(f"routing by block, case {number}", _routing_problem(case, device))
    if (file := folder / EDITS).exists():
        document = _read_document(file)
        for number, case in enumerate(document["cases"]):
            yield _result(f"edits, case {number}", _edit_problem(document, case))
    if (file := folder / TRACES).exists():
        for line in read_text(file, LISTING_FILE).splitlines():
            trace = json.loads(line)
            for key in sorted(TRACE_RULES.keys() & trace.keys()):
                yield _result(f"trace {trace['id']}, {key}", _trace_problem(trace, key))


def _read_document(file: Path) -> Mapping[str, Any]:
    return read_object(file)


def _result(name: str, problem: str) -> tuple[bool, str]:
    return not problem, f"{'FAILED' if problem else 'ok':8} {name:56} {problem or 'equal'}"


def _routing_problem(case: Mapping[str, Any], device: str) -> str:
    experts = case["experts"]
    router = RouterSpec(
        experts,
        case["top_k"],
        "sigmoid",
        renormalise=True,
        scale=case["scale"],
        epsilon=1e-20,
        capacity=case["capacity"],
        block=case["block"],
    )
    logits = torch.tensor(case["logits"], device=device)
    bias = torch.tensor(case["bias"], device=device)
    scores = Scores(logits[None], router, bias=bias)
    admitted = admitted_experts(scores)
    assert admitted is not None
    ours = [row.nonzero()[:, 0].tolist() for row in admitted[0, :: router.block]]
    if ours != case["allowed_per_block"]:
        return "other experts are admitted"
    routing = route(scores, Vanilla())
    weights = _dense(routing.topk_ids.cpu(), routing.topk_weights.cpu(), experts)
    expected = _dense(torch.tensor(case["ids"]), torch.tensor(case["weights"]), experts)
    if not torch.equal(weights > 0, expected > 0):
        return "tokens have other experts"
    error = float((weights - expected).abs().max())
    return f"max error of weights {error:.2e}" if error > WEIGHTS_TOLERANCE else ""


def _dense(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    return torch.zeros(len(ids), experts).scatter(-1, ids, weights)


def _edit_problem(document: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    ids = EditIds(document["mask"], document["delete"], document["split"])
    original = tuple(map(bool, case["old_is_original_mask"]))
    before = EditState(ids, tuple(case["old"]), case["prompt"], original, (), 0)
    return _difference(before.edited(case["written"]), case["tokens"], case["is_original_mask"])


def _trace_problem(trace: Mapping[str, Any], key: str) -> str:
    rule: BlockEditRule = TRACE_RULES[key](
        trace["threshold"], trace["edit_threshold"], trace["max_post_steps"]
    )
    ids = EditIds(trace["mask"], trace["delete"], trace["split"])
    prompt, rows = trace["prompt"], trace[key]
    tokens = [*prompt, *[ids.mask] * (trace["block"] - len(prompt))]
    state = EditState.start(tokens, len(prompt), ids)
    for number, (row, logits) in enumerate(zip(rows, trace["logits"], strict=False)):
        if state.done:
            # The reference stores the keys of a finished block by one more forward.
            stored = number == len(rows) - 1 and row["before"] == row["after"]
            return "" if stored else f"ends before forward {number}"
        generator = torch.Generator()
        proposal = propose(torch.tensor(logits), Sampling(), ids.mask, generator)
        state = rule.advance(state, Predictions(torch.tensor(logits), proposal), generator)
        if problem := _difference(state, row["after"], row["orig_after"]):
            return f"forward {number}: {problem}"
    stopped = trace.get("reference_end") == "would draw" and key == "reference_rule"
    return "" if state.done or stopped else "has not ended"


def _difference(state: EditState, tokens: list[int], original: list[int]) -> str:
    if list(state.tokens) != tokens:
        return f"tokens {list(state.tokens)}, not {tokens}"
    return "" if list(map(int, state.original)) == original else "other masks of the start"
