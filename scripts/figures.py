"""Puts the figures of the records between the README's two marks: none is typed by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from coterie.routing import respell_all

ROOT = Path(__file__).parents[1]
ACCURACY = ROOT / "results" / "embedded-tasks-by-policy.json"
SPEED = ROOT / "results" / "generate-embedded-cpu.json"
BEGIN, END = "<!-- figures: scripts/figures writes these lines -->", "<!-- end of figures -->"


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def filled(text: str) -> str:
    """The README with its figures as the records have them; a record that is absent is left out."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    drawn = {ACCURACY: accuracy, SPEED: speed}
    tables = [
        draw(respell_all(json.loads(path.read_text(encoding="utf-8")))) + source(path)
        for path, draw in drawn.items()
        if path.is_file()
    ]
    return f"{before}{BEGIN}\n" + "\n".join(tables) + f"{END}{after}"


def accuracy(record: dict[str, Any]) -> str:
    """Right answers by policy, with the change against vanilla on the same problems."""
    facts = record["facts"]
    tasks = list(facts["policies"][0]["by_task"])
    lines = [
        f"| policy | right, 95 % interval | {' | '.join(tasks)} | change, p | experts a layer "
        "| forwards a block |",
        "|---|---|" + "---|" * len(tasks) + "---|---|---|",
    ]
    for found in facts["policies"]:
        whole, change = found["accuracy"], found["change"]
        low, high = whole["interval"]
        against = "" if change is None else f"{change['value']:+.1%}, {change['p']:.1g}"
        by_task = " | ".join(f"{found['by_task'][task]['value']:.1%}" for task in tasks)
        right = f"{whole['value']:.1%} of {whole['n']}, {low:.1%} to {high:.1%}"
        traffic = f"{found['experts']:.1f} | {found['forwards_per_block']:.1f}"
        lines.append(f"| `{found['policy']}` | {right} | {by_task} | {against} | {traffic} |")
    return "\n".join(lines) + "\n"


def speed(record: dict[str, Any]) -> str:
    """Tokens a second by policy, with the experts that were read."""
    facts = record["facts"]
    lines = [
        "| policy | experts a layer | tokens/s, spread | forwards | texts as vanilla |",
        "|---|---|---|---|---|",
    ]
    for measure in record["measures"]:
        counted = facts["policies"][measure["name"]]
        lines.append(
            f"| `{measure['name']}` | {counted['experts_mean']:.1f} of {counted['experts_total']} "
            f"| {measure['median']:.0f}, {measure['spread']:.0f} | {counted['forwards']} "
            f"| {counted['texts_as_vanilla']} of {facts['prompts']} |"
        )
    return "\n".join(lines) + "\n"


def source(path: Path) -> str:
    """Where a table comes from, in one line under it."""
    record = json.loads(path.read_text(encoding="utf-8"))
    machine, command = record["machine"], " ".join(record["command"])
    return (
        f"\n`{path.relative_to(ROOT)}`: `{command}` on {machine['cores']} cores of "
        f"{machine['processor']}, torch {record['versions']['torch']}, commit "
        f"`{record['commit'].partition('+')[0][:12]}`.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
