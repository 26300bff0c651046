"""The loop of all benchmarks: every policy is measured once in each repeat, in random order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from coterie.lab.journal import Journal

Sample: TypeAlias = dict[str, Any]  # JSON values by name, such as seconds by kernel
Repeat: TypeAlias = dict[str, Sample]  # by policy
MeasurePolicy: TypeAlias = Callable[[str, int, Sequence[Repeat]], Sample]
"""Gets a policy, the repeat's number and the repeats so far; a warm-up has a negative number."""

ProgressCallback: TypeAlias = Callable[[float, str], None]  # completed fraction, activity


def run_repeats(
    policies: Sequence[str],
    measure: MeasurePolicy,
    *,
    repeats: int,
    warmups: int = 0,
    journal: Journal | None = None,
    name: str = "repeat",
    on_progress: ProgressCallback = lambda share, doing: None,
) -> list[Repeat]:
    """The samples of each repeat. A slow period of the machine slows all policies.

    Repeats in ``journal`` are not measured again. Warm-ups come first and are dropped.
    """
    journal = journal or Journal(None, {})
    names = [f"{name} {number}" for number in range(repeats)]
    done: list[Repeat] = []
    rng, order = random.Random(0), list(policies)
    first = 0 if all(each in journal.steps for each in names) else -warmups
    for number in range(first, repeats):
        rng.shuffle(order)
        if number < 0 or names[number] not in journal.steps:
            samples: Repeat = {}
            for policy in order:
                completed = number - first + len(samples) / len(order)
                on_progress(completed / (repeats - first), f"timing {policy}")
                samples[policy] = measure(policy, number, done)
            if number >= 0:
                journal.add(names[number], samples)
        if number >= 0:
            done.append(journal.steps[names[number]])
    on_progress(1.0, "")
    return done
