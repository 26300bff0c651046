"""Published generation loops as our options, from the parameters of a reference run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coterie.decoding.kv_schemes import (
    BaseKVScheme,
    BlockCausalCache,
    BlockCausalNoCache,
    DualCache,
    KVScheme,
    NoCache,
    PrefixCache,
    Unroll,
)
from coterie.decoding.refinements import Credit, Edit, Smooth, UnmaskStrategy
from coterie.decoding.sequence import EarlyStop
from coterie.decoding.unmask import (
    DynamicRule,
    EntropyRule,
    FixedRule,
    HierarchyRule,
    SequentialRule,
    StaticRule,
    ThresholdRule,
    UnmaskRule,
)
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CheckpointError
from coterie.lab.parity.recorded import ReferenceParameters


@dataclass(frozen=True)
class PublishedLoop:
    """The options that reproduce a published loop; equivalent ones where there are several."""

    configs: tuple[GenerationConfig, ...]
    stop_ids: tuple[int, ...] = ()
    fills_after_stop: bool = False  # with end-of-text


def make_loop(
    algorithm: str, parameters: ReferenceParameters, *, mask_id: int, eos_id: int
) -> PublishedLoop:
    """The loop of a reference run; parameters may override ``eos_id``, and repeat ``mask_id``.

    ``algorithm`` is the family, or for LLaDA-MoE the source that the run names.
    """
    known = [name for name in LOOP_BUILDERS if name in algorithm]
    if len(known) != 1:
        raise CheckpointError(
            f"{parameters.location}: unknown loop {algorithm!r}; known: {', '.join(LOOP_BUILDERS)}"
        )
    parameters.allow_only("mask_id", mask_id)
    loop = LOOP_BUILDERS[known[0]](algorithm, parameters, eos_id)
    if known[0] != "SDAR":
        parameters.allow_only("remasking", "low_confidence")
    for name in ("cfg_scale", "factor"):
        parameters.allow_only(name, None, 0)
    parameters.check_unknown_names()
    return loop


def _generation(
    parameters: ReferenceParameters, scheme: KVScheme, unmask: UnmaskStrategy, early_stop: EarlyStop
) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=parameters.integer("gen_length"),
        block=parameters.integer("block_length"),
        kv_cache=str(scheme),
        unmask=str(unmask),
        temperature=parameters.number("temperature", 0.0),
        top_k=parameters.integer("top_k", 0),
        top_p=parameters.number("top_p", 1.0),
        early_stop=early_stop,
    )


def _llada(algorithm: str, parameters: ReferenceParameters, eos_id: int) -> PublishedLoop:
    """No cache; every block takes all of its steps, even after it is filled."""
    rule = _fixed_rule(parameters)
    scheme = KVScheme(NoCache(), Unroll(most=1, least=rule.steps))
    for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
        parameters.allow_only(name, False)
    config = _generation(parameters, scheme, UnmaskStrategy(rule), "off")
    return PublishedLoop((config,))


def _fast_dllm(algorithm: str, parameters: ReferenceParameters, eos_id: int) -> PublishedLoop:
    """With a cache, every block takes at least two forwards: without, then with the cache."""
    schemes = {
        "with_prefix_cache": KVScheme(PrefixCache(), Unroll(1, 1)),
        "with_dual_cache": KVScheme(DualCache(), Unroll(1, 1)),
    }
    scheme = next((s for name, s in schemes.items() if name in algorithm), KVScheme(NoCache()))
    rule: UnmaskRule
    if parameters.has("threshold"):
        parameters.has("steps")  # has no effect with a threshold
        rule = ThresholdRule(parameters.threshold("threshold"), slack=0.0)
    else:
        rule = _fixed_rule(parameters)
    config = _generation(parameters, scheme, UnmaskStrategy(rule), "off")
    return PublishedLoop((config,))


def _fixed_rule(parameters: ReferenceParameters) -> FixedRule:
    """``steps`` is the total over all blocks."""
    length, width = parameters.integer("gen_length"), max(1, parameters.integer("block_length"))
    steps, blocks = parameters.integer("steps"), max(1, length // width)
    if steps < blocks or steps % blocks or length % width:
        raise CheckpointError(
            f"{parameters.location}: {steps} steps and {length} ids do not divide evenly "
            f"into blocks of {width}"
        )
    return FixedRule(steps // blocks)


def _dinfer(algorithm: str, parameters: ReferenceParameters, eos_id: int) -> PublishedLoop:
    """Every run has all parameters of the benchmark; each runner uses some of them."""
    schemes, smooth = _runner(parameters), _smooth(parameters)
    runner = parameters.choice("runner", schemes)
    max_unroll = parameters.integer("maximum_unroll", 4)
    expected_tokens = parameters.integer("expected_tpf", 8)
    p = parameters.threshold("threshold")
    rules: dict[str, UnmaskRule] = {
        "threshold": ThresholdRule(p),
        "credit": ThresholdRule(p),
        "hierarchy": HierarchyRule(p, parameters.threshold("low_threshold", 0.4)),
    }
    decoder = parameters.choice("decoder", rules)
    credit = _credit(parameters.section("credit"))
    unmask = UnmaskStrategy(
        rules[decoder],
        credit=credit if decoder == "credit" else None,
        smooth=smooth if runner.startswith("itersmooth") else None,
    )
    scheme = KVScheme(schemes[runner], Unroll(max(1, max_unroll), expected_tokens))
    fills_after_stop = parameters.flag("early_stop", True)  # false also ends the sequence
    config = _generation(parameters, scheme, unmask, "block")
    return PublishedLoop((config,), (parameters.integer("eos_id", eos_id),), fills_after_stop)


def _runner(parameters: ReferenceParameters) -> dict[str, BaseKVScheme]:
    aligned = parameters.flag("start_block_align", False)
    windowed_dual = DualCache(
        parameters.integer("prefix_look", 0),
        parameters.integer("after_look", 0),
        parameters.integer("warmup_steps", 0),
        aligned,
    )
    unsmoothed: dict[str, BaseKVScheme] = {
        "nocache": NoCache(aligned),
        "prefix": PrefixCache(aligned),
        "dual": DualCache(aligned=aligned),
        "vicinity": windowed_dual,
    }
    smoothed = {f"itersmooth_{name}": scheme for name, scheme in unsmoothed.items()}
    return {**unsmoothed, **smoothed, "itersmooth": unsmoothed["nocache"]}


def _smooth(parameters: ReferenceParameters) -> Smooth:
    return Smooth(
        parameters.number("cont_weight", 0.3),
        parameters.number("cont_weight_init", 0.15),
        parameters.number("cont_weight_growth", 0.02),
        parameters.number("threshold_decay", 0.02),
    )


def _credit(parameters: ReferenceParameters) -> Credit:
    credit = Credit(
        parameters.number("alpha", 0.7),
        parameters.number("gamma", 0.2),
        parameters.number("beta", 0.8),
    )
    parameters.check_unknown_names()
    return credit


def _llada20(algorithm: str, parameters: ReferenceParameters, eos_id: int) -> PublishedLoop:
    max_steps = parameters.integer("gen_length") // parameters.integer("minimal_topk", 1)
    steps = max(1, min(parameters.integer("steps", 32), max_steps))
    rule = DynamicRule(parameters.threshold("threshold", 0.95), steps)
    stop: EarlyStop = "token" if parameters.flag("eos_early_stop", False) else "block"
    return _block_causal(parameters, UnmaskStrategy(rule), stop, eos_id)


def _llada21(algorithm: str, parameters: ReferenceParameters, eos_id: int) -> PublishedLoop:
    parameters.integer("steps", 32)  # has no effect: every block runs until it converges
    parameters.integer("minimal_topk", 1)
    min_tokens = parameters.integer("num_to_transfer", 1)
    rule = DynamicRule(parameters.threshold("threshold", 0.95), least=min_tokens)
    max_post_steps = parameters.integer("max_post_steps", 16)
    edit = Edit(parameters.threshold("editing_threshold", 0.9), max_post_steps)
    stop: EarlyStop = "block" if parameters.flag("eos_early_stop", False) else "off"
    return _block_causal(parameters, UnmaskStrategy(rule, edit), stop, eos_id)


def _block_causal(
    parameters: ReferenceParameters,
    unmask: UnmaskStrategy,
    stop: EarlyStop,
    eos_id: int,
) -> PublishedLoop:
    """The published loop has no cache; a cache must give the same result."""
    configs = tuple(
        _generation(parameters, KVScheme(scheme), unmask, stop)
        for scheme in (BlockCausalCache(), BlockCausalNoCache())
    )
    return PublishedLoop(configs, (parameters.integer("eos_id", eos_id),))


def _sdar(algorithm: str, parameters: ReferenceParameters, eos_id: int) -> PublishedLoop:
    steps, p = parameters.integer("denoising_steps"), parameters.threshold("threshold", 1.0)
    width = parameters.integer("block_length")
    if not 1 <= steps <= width:
        raise CheckpointError(
            f"{parameters.location}: {steps} denoising_steps in a block of {width}"
        )
    rules: dict[str, UnmaskRule] = {
        "low_confidence": DynamicRule(p, steps) if p < 1 else StaticRule(steps),
        "low_confidence_dynamic": DynamicRule(p, steps),
        "low_confidence_static": StaticRule(steps),
        "sequential": SequentialRule(steps),
        "entropy_bounded": EntropyRule(parameters.number("eb_threshold", 0.35)),
    }
    name = "remasking_strategy" if parameters.has("remasking_strategy") else "remasking"
    rule = rules[parameters.choice(name, rules, "low_confidence")]
    stops = parameters.ids("stopping_criteria_idx")
    stop: EarlyStop = "block" if stops else "off"
    config = _generation(parameters, KVScheme(BlockCausalCache()), UnmaskStrategy(rule), stop)
    return PublishedLoop((config,), stops)


LOOP_BUILDERS: dict[str, Callable[[str, ReferenceParameters, int], PublishedLoop]] = {
    "ML-GSAI/LLaDA": _llada,
    "NVlabs/Fast-dLLM": _fast_dllm,
    "inclusionAI/dInfer": _dinfer,
    "LLaDA2.0": _llada20,
    "LLaDA2.1": _llada21,
    "SDAR": _sdar,
}
