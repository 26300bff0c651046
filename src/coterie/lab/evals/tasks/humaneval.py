"""HumanEval: Python functions from a docstring (Chen et al., arXiv 2107.03374); pass@1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coterie.keys import to_json
from coterie.lab.evals.task import Grade, Item, TaskOptions
from coterie.lab.evals.tasks import code
from coterie.lab.evals.tasks.source import BenchmarkData, BenchmarkFile, read_benchmark
from coterie.lab.sandbox import Limits, require_backend

TEST = BenchmarkFile(
    "humaneval/HumanEval.jsonl.gz",
    "openai/openai_humaneval",
    ("openai_humaneval/test-00000-of-00001.parquet",),
    {"task_id": str, "prompt": str, "test": str, "entry_point": str},
    unique_key="task_id",
)
COMPLETE = "Complete the following python code:\n{prompt}"  # OpenCompass, for chat models
INSTRUCT = (  # OpenCompass, for models that explain their answers
    "You are an intelligent programming assistant to produce Python algorithmic solutions.\n"
    "Can you complete the following Python function?\n```python\n{prompt}\n```"
)
TEMPLATES = {"llada-moe": COMPLETE}  # other families: INSTRUCT
MAX_NEW_TOKENS = {"llada-moe": 512}  # other families: 2048


@dataclass(frozen=True)
class HumanEval:
    """The 164 problems, zero-shot. ``gold`` is the tests and the call that runs them."""

    source: BenchmarkData
    family: str
    trust: bool = False
    name: str = field(default="humaneval", init=False)

    def settings(self) -> Mapping[str, object]:
        return {
            **self.source.settings(),
            "shots": 0,
            "template": self._template,
            "counts": "the prompt's imports and helpers, the answer and the tests run to their end",
            "limits": to_json(Limits()),
        }

    def generation(self) -> Mapping[str, object]:
        return {"max_new_tokens": MAX_NEW_TOKENS.get(self.family, 2048)}

    def items(self) -> Sequence[Item]:
        rows = self.source.rows
        golds = [f"{row['test']}\n\ncheck({row['entry_point']})\n" for row in rows]
        return [
            Item(str(row["task_id"]), str(row["prompt"]), gold)
            for row, gold in zip(rows, golds, strict=True)
        ]

    def prompt(self, item: Item) -> str:
        return self._template.format(prompt=item.question)

    def grade(self, output: str, item: Item) -> Grade:
        return code.grade(output, item.gold, header=item.question, trust=self.trust)

    @property
    def _template(self) -> str:
        return TEMPLATES.get(self.family, INSTRUCT)


def open_humaneval(options: TaskOptions) -> HumanEval:
    """Raises TaskError if no sandbox works and ``options.trust`` is false."""
    options.require_zero_shot("humaneval")
    require_backend(options.trust)
    return HumanEval(read_benchmark(TEST, options.data), options.family, options.trust)
