"""Names of the quantisation methods of other tools, for the messages that refuse their files."""

from __future__ import annotations

from collections.abc import Collection, Mapping

REMEDY = (
    "use the original bf16 or fp16 weights, from which `coterie quantize` makes int8 or int4 "
    "experts"
)

TITLES = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mlx": "MLX",
    "mxfp4": "MXFP4",
}
"""The title of each ``quant_method``; others are named as they stand in the config."""

CONFIG_METHODS = (
    ({"bits", "sym"}, "gptq"),
    ({"bits", "group_size", "zero_point"}, "awq"),
    ({"w_bit", "q_group_size"}, "awq"),
    ({"bits", "group_size"}, "mlx"),
    ({"load_in_4bit"}, "bitsandbytes"),
    ({"load_in_8bit"}, "bitsandbytes"),
    ({"config_groups"}, "compressed-tensors"),
    ({"fmt", "activation_scheme"}, "fp8"),
    ({"nbits"}, "hqq"),
)
"""Fields of a config that names no method, and the method that has them, in order."""

TENSOR_METHODS = {
    "weight_packed": "compressed-tensors",
    "g_idx": "gptq",
    "qzeros": "awq",  # GPTQ has g_idx too
    "weight_scale_inv": "fp8",
    "absmax": "bitsandbytes",
    "biases": "mlx",
}
"""The last part of a tensor's name that only this method has, in order of precedence."""


def method_of_config(quantization: Mapping[str, object]) -> str:
    """The title of the method that a config's ``quantization_config`` names."""
    method = quantization.get("quant_method", quantization.get("quant_algo"))
    if method is None:
        methods = (name for fields, name in CONFIG_METHODS if fields <= set(quantization))
        method = next(methods, "an unnamed method")
    return TITLES.get(str(method).lower(), str(method))


def method_of_tensors(names: Collection[str]) -> str | None:
    """The title of the method that wrote tensors with these names; None without a sign of one."""
    endings = {name.rpartition(".")[2] for name in names}
    method = next((method for part, method in TENSOR_METHODS.items() if part in endings), None)
    return None if method is None else TITLES[method]


def method_of_dtype(dtype: str) -> str | None:
    """The title of the method that stores weights in this dtype of safetensors."""
    if dtype.startswith("F8_"):
        return "FP8"
    return {"F4": "FP4", "U32": "MLX"}.get(dtype)
