"""The compiled kernels and their argument structs, which mirror ``api.hpp`` field by field."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from functools import cache

from coterie.errors import ConfigError
from coterie.ops.cpu.build import LIBRARY_PATH
from coterie.ops.packed_layout import LAYOUT_VERSION

ABI_VERSION = 10
FORMAT_IDS: Mapping[str, int] = {"bf16": 0, "int8": 1, "int4": 2, "fp32": 3}
ACTIVATIONS = ("silu", "gelu-tanh")  # in the order of their ids
ISA_VARIABLE = "COTERIE_ISA"
ERROR_MESSAGES = {
    1: "the CPU does not support this instruction set",
    2: "out of memory",
    3: "the routing names an expert or a slot that does not exist",
    6: "too many operations for one call",
    7: "a position or a row lies outside the KV cache, or a query sees no key",
}
"""By status code."""


def _fields(**names: str) -> tuple[tuple[str, type], ...]:
    """Fields by type, in the order of ``api.hpp``: the names of each type, split at spaces."""
    return tuple((name, TYPES[kind]) for kind, group in names.items() for name in group.split())


TYPES: Mapping[str, type] = {
    "pointers": c_void_p,
    "sizes": c_size_t,
    "doubles": c_double,
    "floats": c_float,
    "ints": c_int32,
}


# The argument structs: each has the fields of the struct of the same name in ``api.hpp``.
class ExpertsArgs(Structure):
    _fields_ = _fields(
        pointers="x ids slot_of weights out panels",
        sizes="stride",
        ints="tokens k experts slots hidden width threads format x_is_bf16 activation",
    )


class ReadArgs(Structure):
    _fields_ = _fields(pointers="panels slots", sizes="stride bytes", ints="count threads")


class PackArgs(Structure):
    _fields_ = _fields(
        pointers="gate_up down gate_up_scales down_scales panels",
        sizes="stride",
        ints="experts hidden width threads format",
    )


class PackMatrixArgs(Structure):
    _fields_ = _fields(pointers="rows scales panels", ints="count k threads format")


class MatmulArgs(Structure):
    _fields_ = _fields(
        pointers="x panels residual out", ints="tokens k rows format x_is_bf16 out_is_bf16"
    )

    def multiplications(self) -> int:
        return self.tokens * self.k * self.rows


class RouteArgs(Structure):
    _fields_ = _fields(
        pointers="logits p bias vote_weight resident starts ids vanilla_ids weights used ballots "
        "sums previous_coresets reuse_vote_weight coresets reused vote_loss",
        doubles="mass resident_bonus max_vote_loss reuse_tolerance",
        floats="scale epsilon",
        ints="stride sequences tokens experts k groups kept_groups renormalise biased "
        "vote union_size count min_experts protect max_experts capacity block",
    )


class AttentionArgs(Structure):
    _fields_ = _fields(
        pointers="qkv query_norm key_norm cos sin positions cache_rows limits keys values out",
        sizes="row_stride head_stride",
        floats="epsilon scale",
        ints="rows width heads kv_heads dim rotary_half kv_length cache_size capacity",
    )

    def multiplications(self) -> int:
        return 2 * self.rows * self.width * self.heads * self.kv_length * self.dim


class RmsNormArgs(Structure):
    _fields_ = _fields(pointers="x residual weight sum out", floats="epsilon", ints="rows width")

    def multiplications(self) -> int:
        return 4 * self.rows * self.width


class SiluMulArgs(Structure):
    _fields_ = _fields(pointers="gate_up out", ints="rows width")

    def multiplications(self) -> int:
        return 8 * self.rows * self.width


class Op(Structure):
    _fields_ = _fields(pointers="args", ints="kind")


class OpList(Structure):
    _fields_ = _fields(pointers="ops", ints="count threads")


class LogitsSummaryArgs(Structure):
    _fields_ = _fields(pointers="logits best unmasked logsumexp", ints="rows width mask_id threads")


SIGNATURES: Mapping[str, tuple] = {
    "isa_name": (c_char_p, c_int32),
    "isa_supported": (c_int32, c_int32),
    "group_size": (c_int32, c_int32),
    "expert_bytes": (c_size_t, c_int32, c_int32, c_int32),
    "matrix_bytes": (c_size_t, c_int32, c_int32, c_int32),
    "pack": (None, POINTER(PackArgs)),
    "pack_matrix": (None, POINTER(PackMatrixArgs)),
    "read_experts": (c_uint64, POINTER(ReadArgs)),
    "run_experts": (c_int32, c_int32, POINTER(ExpertsArgs)),
    "run_ops": (c_int32, c_int32, POINTER(OpList)),
    "route": (c_int32, c_int32, POINTER(RouteArgs)),
    "summarize_logits": (c_int32, c_int32, POINTER(LogitsSummaryArgs)),
    "crc32": (c_int32, c_void_p, c_size_t, POINTER(c_uint32)),
}
"""By function: the type of its result, and those of its arguments."""


@dataclass(frozen=True)
class KernelLibrary:
    """The loaded library and the supported instruction sets: name -> id, slowest first."""

    handle: ctypes.CDLL
    isas: Mapping[str, int]

    def isa(self) -> int:
        """The id of the fastest instruction set, or of the one in $COTERIE_ISA."""
        isa_name = os.environ.get(ISA_VARIABLE)
        if not isa_name:
            return max(self.isas.values())
        if isa_name not in self.isas:
            known = ", ".join(self.isas)
            raise ConfigError(f"{ISA_VARIABLE}={isa_name}: not supported here; known: {known}")
        return self.isas[isa_name]

    def call(self, name: str, args: Structure) -> None:
        """Run the function of this name; raises RuntimeError if it fails."""
        if status := getattr(self.handle, f"coterie_{name}")(self.isa(), ctypes.byref(args)):
            raise RuntimeError(f"{name} failed: {ERROR_MESSAGES[status]}")

    def is_widest_isa(self) -> bool:
        """Whether the selected instruction set has 512-bit registers, if any supported one has."""
        return self.isa() >= self.isas.get("avx512", len(self.isas))


@cache
def load_library() -> KernelLibrary | None:
    """The kernels, or None if they cannot be used; the reason is logged once."""
    opened = open_library()
    return _warn_unavailable(opened) if isinstance(opened, str) else opened


def open_library() -> KernelLibrary | str:
    """The kernels, or why they cannot be used."""
    try:
        handle = ctypes.CDLL(str(LIBRARY_PATH))
        handle.coterie_abi_version.argtypes = handle.coterie_layout_version.argtypes = ()
        versions = handle.coterie_abi_version(), handle.coterie_layout_version()
    except (OSError, AttributeError) as error:
        if LIBRARY_PATH.exists():
            return f"the library does not load ({error})"
        return "no compiler was available at installation"
    if versions != (ABI_VERSION, LAYOUT_VERSION):
        return "the library is of another version; reinstall"
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(handle, f"coterie_{name}")
        function.restype, function.argtypes = result, arguments
    return KernelLibrary(handle, _isas(handle))


def is_available() -> bool:
    """Whether the kernels can be used; if not, the reason is logged once."""
    return load_library() is not None


def require_library() -> KernelLibrary:
    """The kernels; raises ConfigError if they are not available."""
    kernels = load_library()
    if kernels is None:
        raise ConfigError("the CPU kernels are not built; install a C++ compiler and reinstall")
    return kernels


def available_isas() -> tuple[str, ...]:
    """The supported instruction sets, slowest first."""
    return tuple(require_library().isas)


def _isas(handle: ctypes.CDLL) -> dict[str, int]:
    isas, index = {}, 0
    while (name := handle.coterie_isa_name(index)) is not None:
        if handle.coterie_isa_supported(index):
            isas[name.decode()] = index
        index += 1
    return isas


def _warn_unavailable(reason: str) -> None:
    logging.getLogger("coterie").warning(
        "The CPU kernels are not available, PyTorch is used instead, which is slower: %s", reason
    )
