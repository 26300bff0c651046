"""What one arm came to, small enough for a record and whole enough to be compared again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypedDict, cast

from coterie.engine.generation_config import GenerationConfig
from coterie.keys import Key, by_key, from_json, names_of, to_json
from coterie.lab.evals.run import EvalResult
from coterie.lab.evals.stats import PairedDifference, Proportion, paired_difference

JsonObject = dict[str, object]


@dataclass(frozen=True)
class VariantResult:
    """Right and wrong, item by item of each task, and what was read and done for it.

    Experts and bytes are per layer and decoding forward; ``tokens_per_second`` is of all rows that
    were decoded together.
    """

    name: Annotated[str, Key("name")]  # the arm's: policy, then the generation that is its own
    policy: Annotated[str, Key("policy")]
    generation: Annotated[Mapping[str, object], Key("generation")]
    right: Annotated[Mapping[str, str], Key("right")]  # task -> "0110", an item a digit
    experts: Annotated[float, Key("experts")]
    expert_bytes: Annotated[float, Key("expert_bytes")]
    vote_mass_kept: Annotated[float, Key("vote_mass_kept")]
    forwards_per_block: Annotated[float, Key("forwards_per_block")]
    new_tokens: Annotated[float, Key("new_tokens")]
    tokens_per_second: Annotated[float, Key("tokens_per_second")]
    failed: Annotated[int, Key("failed")]  # items without an output

    @staticmethod
    def from_eval_result(eval_result: EvalResult) -> VariantResult:
        tasks = dict.fromkeys(answer.task for answer in eval_result.answers)
        return VariantResult(
            name=eval_result.policy,
            policy=eval_result.variant.policy,
            generation=by_key(GenerationConfig, eval_result.variant.generation),
            right={task: "".join(str(int(r)) for r in eval_result.correct(task)) for task in tasks},
            experts=eval_result.experts,
            expert_bytes=eval_result.expert_bytes,
            vote_mass_kept=eval_result.vote_mass_kept,
            forwards_per_block=eval_result.forwards_per_block,
            new_tokens=eval_result.new_tokens,
            tokens_per_second=eval_result.tokens_per_second,
            failed=eval_result.num_failed,
        )

    @staticmethod
    def from_json(document: Mapping[str, object]) -> VariantResult:
        """Back from a record."""
        return from_json(VariantResult, {name: document[name] for name in names_of(VariantResult)})

    def to_json(self, baseline: VariantResult) -> JsonObject:
        """As JSON values, with what follows from them; ``first`` is what changes are against."""
        fields_json: JsonObject = to_json(self)
        change = self.compare_to(baseline)
        return {
            **fields_json,
            "accuracy": _share_to_json(self.accuracy_share()),
            "by_task": {task: _share_to_json(self.accuracy_share(task)) for task in self.right},
            "change": {
                "value": change.difference,
                "gained": change.gained,
                "lost": change.lost,
                "interval": list(change.interval),
                "p": change.p_value,
            },
            "relative_accuracy": self.accuracy_share().value / baseline.accuracy_share().value
            if baseline.accuracy_share().successes
            else None,
        }

    def correct_flags(self, task: str | None = None) -> list[bool]:
        """Right or wrong, of one task or of all in their order."""
        digit_strings = self.right.values() if task is None else [self.right[task]]
        return [digit == "1" for digits in digit_strings for digit in digits]

    def accuracy_share(self, task: str | None = None) -> Proportion:
        bits = self.correct_flags(task)
        return Proportion(sum(bits), len(bits))

    @property
    def accuracy(self) -> float:
        return self.accuracy_share().value

    def compare_to(self, baseline: VariantResult) -> PairedDifference:
        """This minus ``first``, on the same items."""
        return paired_difference(baseline.correct_flags(), self.correct_flags())


class VariantsRecord(TypedDict):
    """Arms compared on one model: vanilla first, each once, and which belong together."""

    experts: int
    k: int
    block: int
    arms: list[JsonObject]
    groups: dict[str, list[str]]  # what a line is called -> names of its arms, in order
    pairs: list[list[str]]  # two names each, at nearly equal experts


@dataclass(frozen=True)
class VariantResults:
    """The same, read back."""

    experts: int
    k: int
    block: int
    by_name: Mapping[str, VariantResult]
    groups: Mapping[str, list[VariantResult]]
    pairs: Sequence[tuple[VariantResult, VariantResult]]

    @staticmethod
    def from_data(data: Mapping[str, object]) -> VariantResults:
        record = cast("VariantsRecord", data)
        variant_results = {
            str(variant["name"]): VariantResult.from_json(variant) for variant in record["arms"]
        }
        return VariantResults(
            experts=record["experts"],
            k=record["k"],
            block=record["block"],
            by_name=variant_results,
            groups={
                label: [variant_results[n] for n in names]
                for label, names in record["groups"].items()
            },
            pairs=[
                (variant_results[first], variant_results[second])
                for first, second in record["pairs"]
            ],
        )

    @property
    def vanilla(self) -> VariantResult:
        return next(iter(self.by_name.values()))


def _share_to_json(share: Proportion) -> JsonObject:
    return {
        "value": share.value,
        "right": share.successes,
        "n": share.n,
        "interval": [*share.interval],
    }
