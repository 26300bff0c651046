"""Published generation loops, told as ours: from the parameters of a reference run to options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coterie.decoding.plans import (
    BlockCausal,
    BlockCausalUncached,
    Dual,
    Gaze,
    Plan,
    Prefix,
    Uncached,
    Unroll,
)
from coterie.decoding.refine import Credit, Edit, Smooth, Unmask
from coterie.decoding.row import EarlyStop
from coterie.decoding.unmask import (
    Dynamic,
    Entropy,
    Fixed,
    Hierarchy,
    Rule,
    Sequential,
    Static,
    Threshold,
)
from coterie.engine.config import Generation
from coterie.naming import CoterieError
from coterie.parity.parameters import Parameters


@dataclass(frozen=True)
class Loop:
    """How to run what a published loop runs. Some can be run in more than one way."""

    generations: tuple[Generation, ...]
    mask: int
    stops: tuple[int, ...]
    fills: bool = False  # what follows a stop is filled with end-of-text


def tell(algorithm: str, parameters: Parameters, *, mask: int, end: int) -> Loop:
    """The loop of a reference run; ``mask`` and ``end`` are ids that parameters may overrule.

    ``algorithm`` is the family, or for LLaDA-MoE what the run says of its source.
    """
    known = [name for name in LOOPS if name in algorithm]
    if len(known) != 1:
        raise CoterieError(
            f"{parameters.where}: {algorithm!r} is no loop known here; known: {', '.join(LOOPS)}"
        )
    loop = LOOPS[known[0]](algorithm, parameters, mask, end)
    if known[0] != "SDAR":
        parameters.only("remasking", "low_confidence")
    for name in ("cfg_scale", "factor"):
        parameters.only(name, None, 0)
    parameters.finish()
    return loop


def _generation(
    parameters: Parameters, plan: Plan, unmask: Unmask, early_stop: EarlyStop
) -> Generation:
    return Generation(
        max_new_tokens=parameters.whole("gen_length"),
        block=parameters.whole("block_length"),
        plan=str(plan),
        unmask=str(unmask),
        temperature=parameters.number("temperature", 0.0),
        top_k=parameters.whole("top_k", 0),
        top_p=parameters.number("top_p", 1.0),
        early_stop=early_stop,
    )


def _llada(algorithm: str, parameters: Parameters, mask: int, end: int) -> Loop:
    """Whole row; every block takes all its steps, even where nothing is left to do."""
    rule = _fixed(parameters)
    plan = Plan(Uncached(), Unroll(most=1, least=rule.steps))
    for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
        parameters.only(name, False)
    generation = _generation(parameters, plan, Unmask(rule), "off")
    return Loop((generation,), parameters.whole("mask_id", mask), ())


def _fast_dllm(algorithm: str, parameters: Parameters, mask: int, end: int) -> Loop:
    """With a cache, every block is looked at twice at least: whole, then through the cache."""
    plans = {
        "with_prefix_cache": Plan(Prefix(), Unroll(1, 1)),
        "with_dual_cache": Plan(Dual(), Unroll(1, 1)),
    }
    plan = next((plan for name, plan in plans.items() if name in algorithm), Plan(Uncached()))
    rule: Rule
    if parameters.has("threshold"):
        parameters.has("steps")  # without effect beside a threshold
        rule = Threshold(parameters.bar("threshold"), slack=0.0)
    else:
        rule = _fixed(parameters)
    generation = _generation(parameters, plan, Unmask(rule), "off")
    return Loop((generation,), parameters.whole("mask_id", mask), ())


def _fixed(parameters: Parameters) -> Fixed:
    """``steps`` are those of all blocks together."""
    length, width = parameters.whole("gen_length"), max(1, parameters.whole("block_length"))
    steps, blocks = parameters.whole("steps"), max(1, length // width)
    if steps < blocks or steps % blocks or length % width:
        raise CoterieError(
            f"{parameters.where}: {steps} steps, {length} ids, blocks of {width}: no even shares"
        )
    return Fixed(steps // blocks)


def _dinfer(algorithm: str, parameters: Parameters, mask: int, end: int) -> Loop:
    """Every run states all parameters of the benchmark; a runner uses those that concern it."""
    gazes, smooth = _runner(parameters), _smooth(parameters)
    runner = parameters.word("runner", gazes)
    most, tokens = parameters.whole("maximum_unroll", 4), parameters.whole("expected_tpf", 8)
    p = parameters.bar("threshold")
    rules: dict[str, Rule] = {
        "threshold": Threshold(p),
        "credit": Threshold(p),
        "hierarchy": Hierarchy(p, parameters.bar("low_threshold", 0.4)),
    }
    decoder = parameters.word("decoder", rules)
    credit = _credit(parameters.part("credit"))
    unmask = Unmask(
        rules[decoder],
        credit=credit if decoder == "credit" else None,
        smooth=smooth if runner.startswith("itersmooth") else None,
    )
    plan = Plan(gazes[runner], Unroll(max(1, most), tokens))
    fills = parameters.flag("early_stop", True)  # without it the row ends there too
    generation = _generation(parameters, plan, unmask, "block")
    mask = parameters.whole("mask_id", mask)
    return Loop((generation,), mask, (parameters.whole("eos_id", end),), fills)


def _runner(parameters: Parameters) -> dict[str, Gaze]:
    aligned = parameters.flag("start_block_align", False)
    vicinity = Dual(
        parameters.whole("prefix_look", 0),
        parameters.whole("after_look", 0),
        parameters.whole("warmup_steps", 0),
        aligned,
    )
    plain: dict[str, Gaze] = {
        "nocache": Uncached(aligned),
        "prefix": Prefix(aligned),
        "dual": Dual(aligned=aligned),
        "vicinity": vicinity,
    }
    smoothed = {f"itersmooth_{name}": gaze for name, gaze in plain.items()}
    return {**plain, **smoothed, "itersmooth": plain["nocache"]}


def _smooth(parameters: Parameters) -> Smooth:
    return Smooth(
        parameters.number("cont_weight", 0.3),
        parameters.number("cont_weight_init", 0.15),
        parameters.number("cont_weight_growth", 0.02),
        parameters.number("threshold_decay", 0.02),
    )


def _credit(parameters: Parameters) -> Credit:
    credit = Credit(
        parameters.number("alpha", 0.7),
        parameters.number("gamma", 0.2),
        parameters.number("beta", 0.8),
    )
    parameters.finish()
    return credit


def _llada20(algorithm: str, parameters: Parameters, mask: int, end: int) -> Loop:
    most = parameters.whole("gen_length") // parameters.whole("minimal_topk", 1)
    steps = max(1, min(parameters.whole("steps", 32), most))
    rule = Dynamic(parameters.bar("threshold", 0.95), steps)
    stop: EarlyStop = "token" if parameters.flag("eos_early_stop", False) else "block"
    return _block_causal(parameters, Unmask(rule), stop, mask, end)


def _llada21(algorithm: str, parameters: Parameters, mask: int, end: int) -> Loop:
    parameters.whole("steps", 32)  # without effect: every block runs until it settles
    parameters.whole("minimal_topk", 1)
    least = parameters.whole("num_to_transfer", 1)
    rule = Dynamic(parameters.bar("threshold", 0.95), least=least)
    post = parameters.whole("max_post_steps", 16)
    edit = Edit(parameters.bar("editing_threshold", 0.9), post)
    stop: EarlyStop = "block" if parameters.flag("eos_early_stop", False) else "off"
    return _block_causal(parameters, Unmask(rule, edit), stop, mask, end)


def _block_causal(
    parameters: Parameters, unmask: Unmask, stop: EarlyStop, mask: int, end: int
) -> Loop:
    """Published without a cache; with one it must come out the same."""
    generations = tuple(
        _generation(parameters, Plan(gaze), unmask, stop)
        for gaze in (BlockCausal(), BlockCausalUncached())
    )
    mask = parameters.whole("mask_id", mask)
    return Loop(generations, mask, (parameters.whole("eos_id", end),))


def _sdar(algorithm: str, parameters: Parameters, mask: int, end: int) -> Loop:
    steps, p = parameters.whole("denoising_steps"), parameters.bar("threshold", 1.0)
    width = parameters.whole("block_length")
    if not 1 <= steps <= width:
        raise CoterieError(f"{parameters.where}: {steps} denoising_steps in a block of {width}")
    rules: dict[str, Rule] = {
        "low_confidence": Dynamic(p, steps) if p < 1 else Static(steps),
        "low_confidence_dynamic": Dynamic(p, steps),
        "low_confidence_static": Static(steps),
        "sequential": Sequential(steps),
        "entropy_bounded": Entropy(parameters.number("eb_threshold", 0.35)),
    }
    name = "remasking_strategy" if parameters.has("remasking_strategy") else "remasking"
    rule = rules[parameters.word(name, rules, "low_confidence")]
    stops = parameters.ids("stopping_criteria_idx")
    stop: EarlyStop = "block" if stops else "off"
    generation = _generation(parameters, Plan(BlockCausal()), Unmask(rule), stop)
    return Loop((generation,), parameters.whole("mask_id", mask), stops)


LOOPS: dict[str, Callable[[str, Parameters, int, int], Loop]] = {
    "ML-GSAI/LLaDA": _llada,
    "NVlabs/Fast-dLLM": _fast_dllm,
    "inclusionAI/dInfer": _dinfer,
    "LLaDA2.0": _llada20,
    "LLaDA2.1": _llada21,
    "SDAR": _sdar,
}
