"""The command lines that run a configuration."""

from __future__ import annotations

import shlex

from coterie.lab.planner.planned_model import PlannedModel, default_folder

PROMPT = "Solve 3x + 4 = 19 for x."
PLACEHOLDER = "FOLDER"  # the original model of a shape, which a plan does not know


def run_commands(
    model: PlannedModel,
    device: str,
    format_name: str,
    policy: str,
    percent: int,
    *,
    commit_routing: str,
) -> tuple[str, ...]:
    """One command, or two where the experts must be packed first to be fetched from a disk."""
    resident, on_gpu = percent == 100, device == "cuda"
    if resident and model.is_shape and not on_gpu:
        shaped = ["bench", "generate", "--shape", model.name, "--expert-dtype", format_name]
        return (_line([*shaped, "--policy", policy]),)
    options = ["--policy", policy, *(["--device", device] if on_gpu else [])]
    options += [] if commit_routing == "vanilla" else ["--commit-routing", commit_routing]
    options += [] if resident else ["--expert-memory", f"{percent}%"]
    converted = [] if format_name == model.stored_format else ["--expert-dtype", format_name]
    source = PLACEHOLDER if model.is_shape else model.name
    name = [] if model.is_embedded else ["--model", source]
    if resident or on_gpu or model.spec.panels:
        return (_line(["generate", PROMPT, *name, *converted, *options]),)
    packed = default_folder(model.name, format_name)
    return (
        _line(["quantize", source, packed, "--expert-dtype", format_name]),
        _line(["generate", PROMPT, "--model", packed, *options]),
    )


def _line(words: list[str]) -> str:
    return shlex.join(["coterie", *words])
