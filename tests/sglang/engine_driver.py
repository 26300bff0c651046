"""Runs SGLang's engine over a job: the script that tests start in SGLang's environment.

The job is a JSON file with the engine's options and steps. A step writes the text of a policy to a
file, which ``switched_policy`` reads, and generates from prompts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import sglang


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = sglang.Engine(**job["engine"])
    answers = []
    for step in job["steps"]:
        Path(job["policy_file"]).write_text(step["policy"], encoding="utf-8")
        Path(job["counts_file"]).write_text("", encoding="utf-8")
        results = engine.generate(input_ids=step["prompts"], sampling_params=job["sampling"])
        counts = Path(job["counts_file"]).read_text(encoding="utf-8").splitlines()
        answers.append(
            {"tokens": [each["output_ids"] for each in results], "counts": counts[-1:]}
        )
    Path(job["answers"]).write_text(json.dumps(answers), encoding="utf-8")
    engine.shutdown()


if __name__ == "__main__":
    main()
