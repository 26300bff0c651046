"""What one arm came to, small enough for a record and whole enough to be compared again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypedDict, cast

from coterie.engine.config import Generation
from coterie.evals.run import Sheet
from coterie.evals.stats import Paired, Share, paired
from coterie.keys import Key, by_key, from_json, names_of, to_json

Document = dict[str, object]


@dataclass(frozen=True)
class Tally:
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
    def of_sheet(sheet: Sheet) -> Tally:
        tasks = dict.fromkeys(answer.task for answer in sheet.answers)
        return Tally(
            name=sheet.policy,
            policy=sheet.arm.policy,
            generation=by_key(Generation, sheet.arm.generation),
            right={task: "".join(str(int(r)) for r in sheet.right(task)) for task in tasks},
            experts=sheet.experts,
            expert_bytes=sheet.expert_bytes,
            vote_mass_kept=sheet.vote_mass_kept,
            forwards_per_block=sheet.forwards_per_block,
            new_tokens=sheet.new_tokens,
            tokens_per_second=sheet.tokens_per_second,
            failed=sheet.failed,
        )

    @staticmethod
    def of(document: Mapping[str, object]) -> Tally:
        """Back from a record."""
        return from_json(Tally, {name: document[name] for name in names_of(Tally)})

    def document(self, first: Tally) -> Document:
        """As JSON values, with what follows from them; ``first`` is what changes are against."""
        known: Document = to_json(self)
        change = self.against(first)
        return {
            **known,
            "accuracy": _share(self.share()),
            "by_task": {task: _share(self.share(task)) for task in self.right},
            "change": {
                "value": change.difference,
                "gained": change.gained,
                "lost": change.lost,
                "interval": list(change.interval),
                "p": change.p,
            },
            "relative_accuracy": self.share().value / first.share().value
            if first.share().right
            else None,
        }

    def bits(self, task: str | None = None) -> list[bool]:
        """Right or wrong, of one task or of all in their order."""
        told = self.right.values() if task is None else [self.right[task]]
        return [digit == "1" for digits in told for digit in digits]

    def share(self, task: str | None = None) -> Share:
        bits = self.bits(task)
        return Share(sum(bits), len(bits))

    @property
    def accuracy(self) -> float:
        return self.share().value

    def against(self, first: Tally) -> Paired:
        """This minus ``first``, on the same items."""
        return paired(first.bits(), self.bits())


class ArmsFacts(TypedDict):
    """Arms compared on one model: vanilla first, each once, and which belong together."""

    experts: int
    k: int
    block: int
    arms: list[Document]
    groups: dict[str, list[str]]  # what a line is called -> names of its arms, in order
    pairs: list[list[str]]  # two names each, at nearly equal experts


@dataclass(frozen=True)
class Arms:
    """The same, read back."""

    experts: int
    k: int
    block: int
    tallies: Mapping[str, Tally]
    groups: Mapping[str, list[Tally]]
    pairs: Sequence[tuple[Tally, Tally]]

    @staticmethod
    def of(facts: Mapping[str, object]) -> Arms:
        found = cast("ArmsFacts", facts)
        tallies = {str(arm["name"]): Tally.of(arm) for arm in found["arms"]}
        return Arms(
            experts=found["experts"],
            k=found["k"],
            block=found["block"],
            tallies=tallies,
            groups={label: [tallies[n] for n in names] for label, names in found["groups"].items()},
            pairs=[(tallies[one], tallies[other]) for one, other in found["pairs"]],
        )

    @property
    def vanilla(self) -> Tally:
        return next(iter(self.tallies.values()))


def _share(share: Share) -> Document:
    return {"value": share.value, "right": share.right, "n": share.n, "interval": [*share.interval]}
