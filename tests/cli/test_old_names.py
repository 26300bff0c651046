"""Old names of options and values: accepted, with one note, until 0.2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coterie.cli.entry import command_flags, name_flags, root_command, run
from coterie.cli.old_names import OLD_OPTIONS, OLD_OPTIONS_OF, with_new_names
from coterie.testing import write_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("generate 5 --plan uncached", "generate 5 --kv-cache uncached"),
        ("generate 5 --plan=uncached", "generate 5 --kv-cache=uncached"),
        ("generate 5 -- --plan uncached", "generate 5 -- --plan uncached"),
        ("generate 5 --placement upgrades:most=1", "generate 5 --precision-policy promote:most=1"),
        ("generate 5 --placement=votes", "generate 5 --precision-policy=static"),
        ("quantize a b --layout panels --group 8", "quantize a b --layout packed --group-size 8"),
        ("inspect --memory 8", "inspect --fit-gib 8"),
        ("replay t --memory 6GB/s --rest 2", "replay t --memory-bandwidth 6GB/s --other-ms 2"),
        ("bench layer --turns 3 --dtype int8", "bench layer --repeats 3 --expert-dtype int8"),
        ("bench generate --prompts 3 --dtype bf16", "bench generate --num-prompts 3 --dtype bf16"),
        ("calibrate topk --prompts f --sure", "calibrate topk --prompt-file f --confident"),
        ("study --chapter a --again a", "study --experiment a --rerun a"),
        ("trace --votes v --forwards 3", "trace --save-votes v --max-forwards 3"),
        ("lm-eval --plan x --rows 3", "lm-eval --plan x --rows 3"),
    ],
)  # fmt: skip
def test_an_old_name_becomes_the_new_one(old: str, new: str, capsys: Capture) -> None:
    assert with_new_names(old.split()) == new.split()
    notes = capsys.readouterr().err.splitlines()
    assert all("the old name goes with 0.2" in note for note in notes)
    assert bool(notes) == (old != new)


def test_an_old_name_runs_with_one_note(capsys: Capture, tmp_path: Path) -> None:
    words = ["generate", "5", "-m", str(write_checkpoint(tmp_path, "llada2")), "-n", "4", "--json"]
    assert run([*words, "--plan", "uncached"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "coterie: --plan is now --kv-cache; the old name goes with 0.2\n"
    assert json.loads(shown.out)["schema"] == 2


def commands() -> dict[str, set[str]]:
    """The flags of every command."""
    root = root_command()
    found = {}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        for part, one in getattr(command, "commands", {"": command}).items():
            found[f"{name} {part}".strip()] = {flag for p in one.params for flag in p.opts}
    return found


def test_every_new_name_is_an_option_and_no_old_name_is() -> None:
    flags = commands()
    assert set(OLD_OPTIONS.values()) <= set().union(*flags.values())
    for command, names in OLD_OPTIONS_OF.items():
        of_command = [own for name, own in flags.items() if f"{name} ".startswith(f"{command} ")]
        assert set(names.values()) <= set().union(*of_command), command
        assert all(not own & set(names) for own in of_command), command
    assert all(not own & set(OLD_OPTIONS) for own in flags.values())


def test_an_error_names_flags_in_place_of_fields() -> None:
    flags = command_flags(["generate", "5"])
    text = "`host_memory` needs `expert_memory=auto`; `coterie trace` and `unknown` stay"
    assert name_flags(text, flags) == (
        "--host-memory needs --expert-memory auto; `coterie trace` and `unknown` stay"
    )
    assert name_flags("`simulated` or `drift`", flags) == (
        "--simulate-expert-memory or --coreset-reuse"
    )
