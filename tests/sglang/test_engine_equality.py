"""SGLang gives the tokens of our engine: without the plug-in under vanilla, with it under all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from coterie.engine.events import Result

from .sglang_engine import needs_sglang, our_model, prompts, refused, run_sglang

pytestmark = [pytest.mark.peers, needs_sglang]

POLICIES = ("vanilla", "des-seq:k=2", "des-vote:beta=0.45", "priced-vote:price=0.3")
VOTE_EXPERTS = 7  # 0.45 of 16


@pytest.mark.parametrize("family", ["llada2", "sdar-moe"])
def test_sglang_alone_decodes_as_the_engine(family: str) -> None:
    answers = run_sglang(family, [("vanilla", prompts(family))])
    assert answers.tokens[0] == tokens(our_results(family, "vanilla"))


@pytest.mark.parametrize("family", ["llada2", "sdar-moe", "llada2.2"])
def test_the_plugin_decodes_and_counts_as_the_engine(family: str) -> None:
    steps = [(policy, prompts(family)) for policy in POLICIES]
    answers = run_sglang(family, steps, {"COTERIE_POLICY": "switched"})
    results = {policy: our_results(family, policy) for policy in POLICIES}
    for policy, answer in zip(POLICIES, answers.tokens, strict=True):
        assert answer == tokens(results[policy]), policy
    assert len({str(answer) for answer in answers.tokens}) == len(POLICIES)
    totals = [block_totals(layers) for layers in answers.layers]
    before = [0.0] * len(totals[0])
    for policy, after in zip(POLICIES, totals, strict=True):
        used = [new - old for new, old in zip(after, before, strict=True)]
        assert used == pytest.approx(engine_totals(results[policy])), policy
        before = after
    assert all(each.experts.max <= VOTE_EXPERTS for each in results["des-vote:beta=0.45"])


def test_two_processes_decode_as_one() -> None:
    """Tensor parallelism; prompts of any length, whose last tokens vote as in the engine."""
    policy, given = "des-vote:beta=0.45", prompts("llada2", whole_blocks=False)
    answers = run_sglang(
        "llada2",
        [("", given)],
        {"COTERIE_POLICY": policy, "COTERIE_PROMPT_VOTES": "yes"},
        tp_size=2,
        enable_metrics=True,
    )
    results = our_results("llada2", policy, given)
    assert answers.tokens[0] == tokens(results)
    assert block_totals(answers.layers[0]) == pytest.approx(engine_totals(results))
    assert f'coterie:experts{{layer="1"}} {answers.layers[0][0]["experts"]}' in answers.metrics


@pytest.mark.parametrize(
    ("variables", "options", "words"),
    [
        ({"COTERIE_POLICY": "des-vot"}, {}, "unknown policy 'des-vot'"),
        ({"COTERIE_POLICY": "vanilla", "COTERIE_BETA": "1"}, {}, "unknown variable COTERIE_BETA"),
        (
            {"COTERIE_POLICY": "vanilla", "COTERIE_COMMIT": "vanilla"},
            {"dllm_algorithm": "JointThreshold"},
            "COTERIE_COMMIT=vanilla: JointThreshold",
        ),
    ],
)
def test_a_server_that_cannot_obey_does_not_start(
    variables: dict[str, str], options: dict[str, object], words: str
) -> None:
    said = [line for line in refused("llada2", variables, **options).splitlines() if words in line]
    assert said
    assert all(line.startswith("coterie: ") for line in said)


def our_results(family: str, policy: str, given: Sequence[list[int]] | None = None) -> list[Result]:
    given = prompts(family) if given is None else given
    return our_model(family).generate(list(given), policy=policy, batch_size=4)


def tokens(results: Sequence[Result]) -> list[list[int]]:
    return [list(result.tokens) for result in results]


def block_totals(layers: Sequence[dict[str, float]]) -> list[float]:
    """The forwards of blocks, and the unique experts of each layer in all of them."""
    return [layers[0]["blocks"], *(layer["blocks"] * layer["experts"] for layer in layers)]


def engine_totals(results: Sequence[Result]) -> list[float]:
    """The same of our engine."""
    layers = range(len(results[0].experts.per_layer))
    return [
        sum(result.forwards for result in results),
        *(sum(r.forwards * r.experts.per_layer[layer] for r in results) for layer in layers),
    ]
