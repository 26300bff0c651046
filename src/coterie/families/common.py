"""Reading the config keys that all families share, with consistency checks."""

from __future__ import annotations

from dataclasses import replace

from coterie.errors import ConfigError, CoterieError, quote
from coterie.families.config import ModelConfig
from coterie.families.family import FamilyDefaults
from coterie.families.rope import with_rope_parameters
from coterie.model.quant_methods import REMEDY, method_of_config
from coterie.model.spec import ModelSpec
from coterie.ops.packed_layout import LAYOUT_VERSION
from coterie.quantization import FORMATS, QuantFormat, parse_format
from coterie.values import RouterSpec

EXPERT_FORMAT_KEY = "coterie_experts"
DENSE_FORMAT_KEY = "coterie_dense"
"""The config key of quantised experts; ``quantization_config`` belongs to other tools."""

EXPERT_LAYOUT_KEY = "coterie_layout"
"""The config key of the layout of packed experts."""

PANEL_LAYOUT = "panels"
"""The name of the packed layout. Without ``EXPERT_LAYOUT_KEY``, experts are stored as matrices."""

MAX_TOTAL_EXPERTS = 1 << 17
"""Upper limit over all layers; a damaged config could require millions of tensors."""


def model_spec(
    config: ModelConfig,
    router: RouterSpec,
    *,
    moe: tuple[bool, ...],
    dense_width: str,
    expert_width: str,
    shared_width: int = 0,
    expert_bias: bool = False,
    has_head_dim_key: bool = True,
    rotary_fraction: float | None = 1.0,
) -> ModelSpec:
    """Reads the keys that every family has, then rejects unknown keys.

    ``dense_width`` and ``expert_width`` are config keys. ``rotary_fraction`` is the default share
    of a head that RoPE rotates (None: the config must have it). ``has_head_dim_key``: the family
    has the key ``head_dim``.
    """
    config = with_rope_parameters(config)
    _check_layer_types(config, len(moe))
    if not any(moe):
        raise ConfigError(f"{config.file}: no layer has experts")
    if sum(moe) * router.experts > MAX_TOTAL_EXPERTS:
        raise config.error("num_experts", f"is {router.experts} in {sum(moe)} layers, too many")
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_size = head_dim(config, hidden, heads, has_key=has_head_dim_key)
    form = stored_format(config, EXPERT_FORMAT_KEY)
    spec = ModelSpec(
        vocabulary=config.size("vocab_size"),
        hidden=hidden,
        layers=len(moe),
        heads=heads,
        kv_heads=kv_head_count(config, heads),
        head_dim=head_size,
        rotary_dim=rotary_dim(config, head_size, default=rotary_fraction),
        rope_theta=config.number("rope_theta"),
        norm_epsilon=config.number("rms_norm_eps"),
        dense_width=dense_layer_width(config, dense_width, required=not all(moe)),
        expert_width=config.size(expert_width),
        shared_width=shared_width,
        moe=moe,
        router=router,
        expert_bias=expert_bias,
        tie_embeddings=config.flag("tie_word_embeddings", False),
        max_length=config.size("max_position_embeddings"),
        expert_format=form,
        panels=has_packed_experts(config, form),
        dense_format=dense_format(config),
    )
    config.check_unknown_keys()
    return spec


def stored_format(config: ModelConfig, key: str) -> QuantFormat | None:
    """The format of quantised weights, from a value such as ``{"format": "int8", "group": 64}``."""
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"format", "group"}:
        raise config.error(key, f"is {quote(value)}, not a format and a group")
    name, group = value["format"], value["group"]
    if not isinstance(name, str) or type(group) is not int:
        raise config.error(key, f"is {quote(value)}, not a name and a whole number")
    try:
        return parse_format(name, group)
    except CoterieError as error:
        raise config.error(key, f"is {quote(value)}: {error}") from None


def dense_format(config: ModelConfig) -> QuantFormat | None:
    """The format of quantised dense matrices, of which the kernels know one."""
    form = stored_format(config, DENSE_FORMAT_KEY)
    if form not in (None, FORMATS["int8"]):
        raise config.error(DENSE_FORMAT_KEY, f"is {form}; known: {FORMATS['int8']}")
    return form


def has_packed_experts(config: ModelConfig, form: QuantFormat | None) -> bool:
    """Whether the experts are packed, as in ``{"name": "panels", "version": 1}``."""
    value = config.get(EXPERT_LAYOUT_KEY)
    if value is None:
        return False
    if not isinstance(value, dict) or set(value) != {"name", "version"}:
        raise config.error(EXPERT_LAYOUT_KEY, f"is {quote(value)}, not a name and a version")
    name, version = value["name"], value["version"]
    if name != PANEL_LAYOUT or type(version) is not int or version > LAYOUT_VERSION:
        raise config.error(
            EXPERT_LAYOUT_KEY,
            f"is {quote(value)}, which this version of Coterie does not know (it reads "
            f"{PANEL_LAYOUT!r} up to version {LAYOUT_VERSION}): use a newer version, or pack the "
            "original again with `coterie quantize`",
        )
    if version < LAYOUT_VERSION:
        raise config.error(
            EXPERT_LAYOUT_KEY,
            f"has version {version}, packed by an older Coterie; this one reads version "
            f"{LAYOUT_VERSION}: pack the original again with `coterie quantize`",
        )
    if form is not None and FORMATS[form.name] != form:
        raise config.error(
            EXPERT_LAYOUT_KEY, f"is {PANEL_LAYOUT!r}; packed panels do not hold experts in {form}"
        )
    return True


def check_supported(config: ModelConfig) -> None:
    """Rejects what no family supports, such as foreign quantisation and biases."""
    _check_quantization(config)
    _check_dtypes(config)
    config.allow_only("hidden_act", "silu", "swish")
    config.allow_only("attention_bias", False)
    config.allow_only("use_sliding_window", False)


def _check_layer_types(config: ModelConfig, layers: int) -> None:
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        problem = f'is {quote(kinds)}; supported: "full_attention" for each of {layers} layers'
        raise config.error("layer_types", problem)


def block_size(config: ModelConfig, default: int) -> int:
    """Tokens of a block, a power of two."""
    size = config.optional_size("block_size") or default
    if size & (size - 1):
        raise config.error("block_size", f"is {size}, no power of two")
    return size


def read_block_size(config: ModelConfig, defaults: FamilyDefaults) -> FamilyDefaults:
    """The defaults of a checkpoint that was trained with blocks of ``block_size`` tokens."""
    return replace(defaults, block=block_size(config, defaults.block))


def _check_quantization(config: ModelConfig) -> None:
    for key in ("quantization_config", "quantization", "compression_config"):
        if value := config.get(key):
            title = method_of_config(value) if isinstance(value, dict) else quote(value)
            raise config.error(key, f"says that {title} quantised the weights: {REMEDY}")


def _check_dtypes(config: ModelConfig) -> None:
    names = {
        key: value.removeprefix("torch.") if isinstance(value, str) else value
        for key in ("dtype", "torch_dtype")
        if (value := config.get(key)) is not None
    }
    for key, name in names.items():
        if name not in ("float32", "bfloat16", "float16"):
            problem = f"is {quote(name)}; supported: float32, bfloat16, float16"
            raise config.error(key, problem)
    if len({*names.values()}) > 1:
        pair = "is {dtype!r}, but torch_dtype is {torch_dtype!r}".format(**names)
        raise config.error("dtype", pair)


def dense_layer_width(config: ModelConfig, key: str, *, required: bool) -> int:
    """The width of dense layers, 0 without such layers."""
    width = config.optional_size(key)
    if width is None and required:
        raise config.error(key, "is missing, and some layers are dense")
    return width if width is not None and required else 0


def head_dim(config: ModelConfig, hidden: int, heads: int, *, has_key: bool) -> int:
    """Features per head: the config's ``head_dim``, else hidden / heads, which must be an integer.

    Without ``has_key``, the family always divides; a different ``head_dim`` is an error.
    """
    configured = config.optional_size("head_dim")
    if has_key and configured is not None:
        return configured
    if hidden % heads:
        raise config.error("num_attention_heads", f"is {heads}, no divisor of hidden_size {hidden}")
    if configured not in (None, hidden // heads):
        raise config.error("head_dim", f"is {configured}, but {hidden} / {heads} heads is not")
    return hidden // heads


def rotary_dim(config: ModelConfig, dim: int, *, default: float | None) -> int:
    """Rotated features per head; ``rotary_dim`` and ``partial_rotary_factor`` must agree."""
    configured = config.optional_size("rotary_dim")
    if configured is not None and config.get("partial_rotary_factor") is None:
        rotated = configured
    else:
        rotated = int(dim * config.number("partial_rotary_factor", default, maximum=1))
    if configured not in (None, rotated):
        factor = config.values["partial_rotary_factor"]
        raise config.error(
            "rotary_dim",
            f"is {configured}, but partial_rotary_factor {factor} of {dim} is {rotated}",
        )
    if not 0 < rotated <= dim or rotated % 2:
        name = "partial_rotary_factor" if configured is None else "rotary_dim"
        problem = f"rotates {rotated} of {dim} features; an even number from 2 to {dim} is possible"
        raise config.error(name, problem)
    return rotated


def kv_head_count(config: ModelConfig, heads: int) -> int:
    """Number of KV heads, by default that of query heads, which it must divide."""
    kv_heads = config.optional_size("num_key_value_heads") or heads
    if heads % kv_heads:
        raise config.error(
            "num_key_value_heads", f"is {kv_heads}, no divisor of num_attention_heads {heads}"
        )
    return kv_heads


def layer_count(config: ModelConfig) -> int:
    return config.size("num_hidden_layers", maximum=4096)


def expert_count(config: ModelConfig) -> int:
    """Routed experts per layer."""
    return config.size("num_experts", maximum=16384)


def experts_per_token(config: ModelConfig, experts: int, key: str = "num_experts_per_tok") -> int:
    """Experts per token, at most ``experts``."""
    k = config.size(key)
    if k > experts:
        raise config.error(key, f"is {k}, more than num_experts {experts}")
    return k
