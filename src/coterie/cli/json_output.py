"""What ``--json`` prints: results as plain JSON values."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.offload.traffic import Traffic


def result_document(result: Result) -> dict[str, object]:
    """One generation; experts and bytes are per layer and decoding forward."""
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "forwards": result.forwards,
        "prefills": result.prefills,
        "commits": result.commits,
        "blocks": result.blocks,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "policy": result.policy,
        "model": result.model,
        "dtype": result.dtype,
        "device": result.device,
        "experts": {
            "total": result.experts.total,
            "max": result.experts.max,
            "mean": result.experts.mean,
            "per_layer": list(result.experts.per_layer),
        },
        "expert_bytes": result.expert_bytes,
        "expert_bytes_vanilla": result.expert_bytes_vanilla,
        "vote_mass_kept": result.vote_mass_kept,
        "coresets_kept": result.coreset_reuse_rate,
        "drift": result.reuse_vote_loss,
    }


def traffic_document(engine: Engine, result: Result) -> dict[str, object]:
    """What its forwards moved; empty where all experts are in memory. Nobody waits for what is
    imagined to come, so both stalls are None there."""
    model = engine.model
    if result.traffic is None:
        return {}
    document = {"slots": model.store.capacity, **transfer_document(result.traffic)}
    if model.memory_config is not None and model.memory_config.simulated:
        document |= {"stall_seconds": None, "stalled": None}
    return {"expert_traffic": document}


def precision_document(engine: Engine) -> dict[str, object]:
    """Which precision served, in shares of votes; means over layers and all forwards so far. Empty
    where there is one; both losses are None where a manifest does not tell what experts lost."""
    stats = engine.model.store.precision_stats
    if stats is None:
        return {}
    document = {
        "fine": stats.high_format,
        "coarse": stats.low_format,
        "fine_slots": stats.high_slots,
        "coarse_slots": stats.low_slots,
        "votes_fine": stats.high_precision_share,
        "votes_coarse": 1 - stats.high_precision_share,
        "upgrades": stats.promotions,
        "loss_bound": stats.loss_bound,
        "loss_rms": stats.loss_rms,
    }
    return {"expert_precision": document}


def transfer_document(traffic: Traffic) -> dict[str, object]:
    """All of it: by the forwards that denoise, which are counted, and those that only write keys.

    "Vanilla" is what the unmodified model would have moved under LRU in the same slots on the same
    forwards, None where nobody asked; left to itself it might make others.
    """
    return {
        "forwards": traffic.forwards,
        "experts_used": traffic.experts_used,
        "experts_moved": traffic.experts_moved,
        "experts_on_cpu": traffic.on_cpu,
        "hit_rate": traffic.hit_rate,
        "bytes_moved": traffic.bytes_moved,
        "bytes_moved_from": {tier: transfer.bytes for tier, transfer in traffic.transfers.items()},
        "bytes_avoided": traffic.bytes_saved,
        "bytes_avoided_against_vanilla": traffic.bytes_saved_vs_vanilla,
        "saved_against_vanilla": traffic.fraction_saved,
        "stall_seconds": traffic.stall_seconds,
        "stalled": traffic.stall_fraction,
    }


def comparison_document(
    engine: Engine, prompt: str, results: Sequence[Result]
) -> dict[str, object]:
    """Several generations of one prompt; the first of ``results`` is vanilla's.

    ``saved`` is the share of the bytes that vanilla's own run moved, as in the table.
    """
    vanilla = results[0]
    runs = [
        {
            **result_document(result),
            "equals_vanilla": result.tokens == vanilla.tokens,
            **({} if result.traffic is None else {"saved": saved_share(result, vanilla)}),
            **traffic_document(engine, result),
        }
        for result in results
    ]
    return {"prompt": prompt, "runs": runs}


def saved_share(result: Result, vanilla: Result) -> float | None:
    """Of the bytes that vanilla moved in a run of its own; None for vanilla, and where it moved
    none."""
    traffic, vanilla_traffic = result.traffic, vanilla.traffic
    if (
        result == vanilla
        or traffic is None
        or vanilla_traffic is None
        or not vanilla_traffic.bytes_moved
    ):
        return None
    return 1 - traffic.bytes_moved / vanilla_traffic.bytes_moved


def print_document(document: Mapping[str, object] | Sequence[object]) -> None:
    """The one document on standard output; escaped, so that any encoding can carry it."""
    json.dump(document, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()
