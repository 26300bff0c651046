"""Puts the figures of a benchmark's record between the README's two marks: none is typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "results" / "generate-embedded-cpu.json"
BEGIN, END = "<!-- figures: scripts/figures writes these lines -->", "<!-- end of figures -->"


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def filled(text: str) -> str:
    """The README with its figures as the record has them."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(json.loads(RECORD.read_text(encoding='utf-8')))}{END}{after}"


def table(record: dict) -> str:
    machine, facts = record["machine"], record["facts"]
    lines = [
        f"{facts['prompts']} held-out problems, {facts['dtype']}, {machine['cores']} cores of "
        f"{machine['processor']}, torch {record['versions']['torch']}, commit "
        f"`{record['commit'][:12]}`; from `results/{RECORD.name}`:",
        "",
        "| policy | experts a layer | tokens/s (median, spread) | forwards | texts as vanilla |",
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


if __name__ == "__main__":
    sys.exit(main())
