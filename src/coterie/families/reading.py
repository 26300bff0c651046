"""What the configs of all families say alike, checked against itself."""

from __future__ import annotations

from coterie.families.config import Config
from coterie.model.spec import ModelSpec
from coterie.naming import CoterieError
from coterie.ops.panels import LAYOUT
from coterie.quant import FORMATS, Format, parse_format
from coterie.values import RouterSpec

EXPERT_FORMAT = "coterie_experts"
"""The key under which a quantised checkpoint says so; ``quantization_config`` is others' word."""

EXPERT_LAYOUT = "coterie_layout"
"""The key under which a packed checkpoint says that it is, and in which layout."""

PANELS = "panels"
"""The only layout that has a name: without one, experts are stored as matrices."""

MOST_EXPERTS = 1 << 17
"""Of all layers together; each has tensors to look for, and a damaged config asks for millions."""


def model_spec(
    config: Config,
    router: RouterSpec,
    *,
    moe: tuple[bool, ...],
    dense_width: str,
    expert_width: str,
    shared_width: int = 0,
    expert_bias: bool = False,
    own_head_dim: bool = True,
    turning: float | None = 1.0,
    capacity: int = 0,
) -> ModelSpec:
    """Read what is left of a config: the keys that every family has; none may be unknown then.

    ``dense_width`` and ``expert_width`` are keys; ``turning`` is the part of a head that turns with
    position where the config does not say (None: it must). ``own_head_dim``: the family has the
    key ``head_dim``.
    """
    if not any(moe):
        raise CoterieError(f"{config.file}: no layer has experts")
    if sum(moe) * router.experts > MOST_EXPERTS:
        raise config.error("num_experts", f"is {router.experts} in {sum(moe)} layers, too many")
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    dim = head_dim(config, hidden, heads, own=own_head_dim)
    form = expert_format(config)
    spec = ModelSpec(
        vocabulary=config.size("vocab_size"),
        hidden=hidden,
        layers=len(moe),
        heads=heads,
        kv_heads=key_value_heads(config, heads),
        head_dim=dim,
        rotary_dim=rotary_dim(config, dim, default=turning),
        rope_theta=config.number("rope_theta"),
        norm_epsilon=config.number("rms_norm_eps"),
        dense_width=needed_width(config, dense_width, needed=not all(moe)),
        expert_width=config.size(expert_width),
        shared_width=shared_width,
        moe=moe,
        router=router,
        expert_bias=expert_bias,
        tied=config.flag("tie_word_embeddings", False),
        max_length=config.size("max_position_embeddings"),
        capacity=capacity,
        expert_format=form,
        panels=packed(config, form),
    )
    config.finish()
    return spec


def expert_format(config: Config) -> Format | None:
    """Of the experts in the checkpoint, such as ``{"format": "int8", "group": 64}``."""
    stated = config.get(EXPERT_FORMAT)
    if stated is None:
        return None
    if not isinstance(stated, dict) or set(stated) != {"format", "group"}:
        raise config.error(EXPERT_FORMAT, f"is {stated!r}, not a format and a group")
    name, group = stated["format"], stated["group"]
    if not isinstance(name, str) or type(group) is not int:
        raise config.error(EXPERT_FORMAT, f"is {stated!r}, not a name and a whole number")
    try:
        return parse_format(name, group)
    except CoterieError as error:
        raise config.error(EXPERT_FORMAT, f"is {stated!r}: {error}") from None


def packed(config: Config, form: Format | None) -> bool:
    """Whether the checkpoint's experts are packed: ``{"name": "panels", "version": 1}``."""
    stated = config.get(EXPERT_LAYOUT)
    if stated is None:
        return False
    if not isinstance(stated, dict) or set(stated) != {"name", "version"}:
        raise config.error(EXPERT_LAYOUT, f"is {stated!r}, not a name and a version")
    name, version = stated["name"], stated["version"]
    if name != PANELS or type(version) is not int or version > LAYOUT:
        raise config.error(
            EXPERT_LAYOUT,
            f"is {stated!r}, which this version of Coterie does not know (it reads {PANELS!r} up "
            f"to version {LAYOUT}): a newer one reads it, or pack the original again with "
            "`coterie quantize`",
        )
    if version < LAYOUT:
        raise config.error(
            EXPERT_LAYOUT,
            f"has version {version}, packed by an older Coterie; this one reads version {LAYOUT}: "
            "pack the original again with `coterie quantize`",
        )
    if form is not None and FORMATS[form.name] != form:
        raise config.error(EXPERT_LAYOUT, f"is {PANELS!r}, which do not hold experts in {form}")
    return True


def refuse_other_models(config: Config) -> None:
    """What no family here does: other activations, stretched positions, biases, local attention."""
    stored = [config.values.get(key) for key in ("dtype", "torch_dtype")]
    if None not in stored and stored[0] != stored[1]:
        raise config.error("dtype", f"is {stored[0]!r}, but torch_dtype is {stored[1]!r}")
    for key in ("dtype", "torch_dtype"):
        config.only(key, "float32", "bfloat16", "float16", None)
    config.only("hidden_act", "silu")
    config.only("rope_scaling", None)
    config.only("attention_bias", False)
    config.only("use_sliding_window", False)


def needed_width(config: Config, key: str, *, needed: bool) -> int:
    """The width of dense layers, 0 where there are none."""
    stated = config.optional_size(key)
    if stated is None and needed:
        raise config.error(key, "is missing, and some layers are dense")
    return stated if stated is not None and needed else 0


def head_dim(config: Config, hidden: int, heads: int, *, own: bool) -> int:
    """The config's own, else hidden / heads, which must come out even.

    Not ``own``: the family's code always divides, and a config that says otherwise contradicts it.
    """
    stated = config.optional_size("head_dim")
    if own and stated is not None:
        return stated
    if hidden % heads:
        raise config.error("num_attention_heads", f"is {heads}, no divisor of hidden_size {hidden}")
    if stated not in (None, hidden // heads):
        raise config.error("head_dim", f"is {stated}, but {hidden} in {heads} heads is not")
    return hidden // heads


def rotary_dim(config: Config, dim: int, *, default: float | None) -> int:
    """Features of a head that turn: ``rotary_dim`` and ``partial_rotary_factor`` must agree."""
    stated = config.optional_size("rotary_dim")
    if stated is not None and config.get("partial_rotary_factor") is None:
        turning = stated
    else:
        turning = int(dim * config.number("partial_rotary_factor", default))
    if stated not in (None, turning):
        factor = config.values["partial_rotary_factor"]
        raise config.error(
            "rotary_dim", f"is {stated}, but partial_rotary_factor {factor} of {dim} is {turning}"
        )
    if not 0 < turning <= dim or turning % 2:
        name = "partial_rotary_factor" if stated is None else "rotary_dim"
        raise config.error(name, f"turns {turning} of {dim} features; an even part is needed")
    return turning


def key_value_heads(config: Config, heads: int) -> int:
    """As many as query heads where not stated; query heads share them evenly."""
    shared = config.optional_size("num_key_value_heads") or heads
    if heads % shared:
        raise config.error(
            "num_key_value_heads", f"is {shared}, no divisor of num_attention_heads {heads}"
        )
    return shared


def layer_count(config: Config) -> int:
    return config.size("num_hidden_layers", most=4096)


def expert_count(config: Config) -> int:
    """Routed experts of a layer."""
    return config.size("num_experts", most=16384)


def chosen_experts(config: Config, experts: int) -> int:
    """Experts per token, no more than there are."""
    k = config.size("num_experts_per_tok")
    if k > experts:
        raise config.error("num_experts_per_tok", f"is {k}, more than num_experts {experts}")
    return k
