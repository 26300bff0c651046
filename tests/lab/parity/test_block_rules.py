"""Reference files of block routing and block edits are compared, and differences are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shared_data import golden

from coterie.lab.parity.__main__ import main


def test_the_reference_folder_agrees() -> None:
    assert main([str(golden("llada22"))]) == 0


@pytest.mark.parametrize("name", ["block-routing.json", "edits.json", "edit-traces.jsonl"])
def test_a_changed_result_does_not_agree(name: str, tmp_path: Path) -> None:
    text = (golden("llada22") / name).read_text()
    lines = text.splitlines() if name.endswith("jsonl") else [text]
    document = json.loads(lines[0])
    if name == "block-routing.json":
        document["cases"][0]["weights"][0][0] += 0.1
    elif name == "edits.json":
        document["cases"][0]["tokens"][-1] += 1
    else:
        document["reference_rule"][0]["after"][-1] = 0
    (tmp_path / name).write_text("\n".join([json.dumps(document), *lines[1:]]))
    assert main([str(tmp_path)]) == 1
