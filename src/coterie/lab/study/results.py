"""The result of one policy on all problems, compact enough for a record and still comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from coterie.engine.generation_config import GenerationConfig
from coterie.keys import Key, by_key, from_json, names_of, to_json
from coterie.lab.evals.run import EvalResult
from coterie.lab.evals.stats import PairedDifference, Proportion, paired_difference

JsonObject = dict[str, object]


@dataclass(frozen=True)
class VariantResult:
    """Correct and wrong answers, item by item of each task, with the experts and forwards used.

    Experts and bytes are per layer and decoding forward. ``tokens_per_second`` covers all rows of
    a batch together.
    """

    name: Annotated[str, Key("name")]  # the policy and the generation options of the variant
    policy: Annotated[str, Key("policy")]
    generation: Annotated[Mapping[str, object], Key("generation")]
    right: Annotated[Mapping[str, str], Key("right")]  # task -> "0110", one digit per item
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
        return from_json(VariantResult, {name: document[name] for name in names_of(VariantResult)})

    def to_json(self, baseline: VariantResult) -> JsonObject:
        """JSON values, with accuracies and the change against ``baseline`` computed from them."""
        change, base = self.compare_to(baseline), baseline.accuracy
        return {
            **to_json(self),
            "accuracy": _share_to_json(self.accuracy_share()),
            "by_task": {task: _share_to_json(self.accuracy_share(task)) for task in self.right},
            "change": {
                "value": change.difference,
                **{"gained": change.gained, "lost": change.lost, "n": change.n},
                "interval": list(change.interval),
                "p": change.p_value,
            },
            "relative_accuracy": self.accuracy / base if base else None,
        }

    def correct_flags(self, task: str | None = None) -> list[bool]:
        """One flag per item, of one task or of all tasks in order."""
        digit_strings = self.right.values() if task is None else [self.right[task]]
        return [digit == "1" for digits in digit_strings for digit in digits]

    def accuracy_share(self, task: str | None = None) -> Proportion:
        flags = self.correct_flags(task)
        return Proportion(sum(flags), len(flags))

    @property
    def family(self) -> str:
        return self.policy.partition(":")[0]

    @property
    def accuracy(self) -> float:
        return self.accuracy_share().value

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the accuracy."""
        return self.accuracy_share().interval

    @property
    def experts_per_block(self) -> float:
        """Unique experts of a layer over all forwards of a block."""
        return self.experts * self.forwards_per_block

    def compare_to(self, baseline: VariantResult) -> PairedDifference:
        """The paired difference to ``baseline`` on the same items."""
        return paired_difference(baseline.correct_flags(), self.correct_flags())

    def relative_accuracy(self, baseline: VariantResult) -> str:
        """The share of the baseline's accuracy, as text; empty where the baseline has none."""
        return f"{self.accuracy / baseline.accuracy:.1%}" if baseline.accuracy else ""


Pair = tuple[VariantResult, VariantResult]


@dataclass(frozen=True)
class VariantResults:
    """Variants compared on one model."""

    experts: int
    k: int
    block: int
    by_name: Mapping[str, VariantResult]  # vanilla first
    groups: Mapping[str, list[VariantResult]]  # label of a line -> its results, in order
    pairs: Sequence[Pair]  # at nearly equal experts

    @staticmethod
    def from_record(record: Mapping[str, Any], labels: Sequence[str] = ()) -> VariantResults:
        """``labels`` rename the groups of a record, in order, where there is one for each."""
        results = map(VariantResult.from_json, record["arms"])
        by_name, groups = {result.name: result for result in results}, record["groups"]
        names = labels if len(labels) == len(groups) else list(groups)
        return VariantResults(
            experts=record["experts"],
            k=record["k"],
            block=record["block"],
            by_name=by_name,
            groups={
                label: [by_name[name] for name in group]
                for label, group in zip(names, groups.values(), strict=True)
            },
            pairs=[(by_name[first], by_name[second]) for first, second in record["pairs"]],
        )

    def to_record(self) -> JsonObject:
        """JSON values in which each result is stored once."""
        return {
            "experts": self.experts,
            "k": self.k,
            "block": self.block,
            "arms": [result.to_json(self.vanilla) for result in self.by_name.values()],
            "groups": {label: [r.name for r in group] for label, group in self.groups.items()},
            "pairs": [[first.name, second.name] for first, second in self.pairs],
        }

    @property
    def vanilla(self) -> VariantResult:
        return next(iter(self.by_name.values()))

    @property
    def all(self) -> list[VariantResult]:
        """Vanilla, then the results of every group, each once."""
        grouped = (result for group in self.groups.values() for result in group)
        return list({result.name: result for result in (self.vanilla, *grouped)}.values())


def _share_to_json(share: Proportion) -> JsonObject:
    counts = {"right": share.successes, "n": share.n}
    return {"value": share.value, **counts, "interval": [*share.interval]}
