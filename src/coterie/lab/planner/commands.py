"""The command lines that run a configuration."""

from __future__ import annotations

import shlex

from coterie.lab.planner.planned_model import PlannedModel, default_folder

PROMPT = "Solve 3x + 4 = 19 for x."
PLACEHOLDER = "FOLDER"  # the original model of a shape, which a plan does not know


def run_commands(
    model: PlannedModel, format_name: str, policy: str, percent: int, *, commit_routing: str
) -> tuple[str, ...]:
    """One command, or two where the experts must be packed first to be fetched from a disk."""
    options = [] if commit_routing == "vanilla" else ["--commit-routing", commit_routing]
    converted = [] if format_name == model.stored_format else ["--expert-dtype", format_name]
    if percent == 100 and model.is_shape:
        shaped = ["bench", "generate", "--shape", model.name, "--expert-dtype", format_name]
        return (_line([*shaped, "--policy", policy]),)
    name = [] if model.is_embedded else ["--model", model.name]
    if percent == 100:
        return (_line(["generate", PROMPT, *name, *converted, "--policy", policy, *options]),)
    options += ["--expert-memory", f"{percent}%"]
    if model.spec.panels:
        return (_line(["generate", PROMPT, *name, "--policy", policy, *options]),)
    packed = default_folder(model.name, format_name)
    source = PLACEHOLDER if model.is_shape else model.name
    return (
        _line(["quantize", source, packed, "--expert-dtype", format_name]),
        _line(["generate", PROMPT, "--model", packed, "--policy", policy, *options]),
    )


def _line(words: list[str]) -> str:
    return shlex.join(["coterie", *words])
