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

ABI_VERSION = 6
FORMAT_IDS: Mapping[str, int] = {"bf16": 0, "int8": 1, "int4": 2}
ISA_VARIABLE = "COTERIE_ISA"
ERROR_MESSAGES = {
    1: "the CPU does not support this instruction set",
    2: "out of memory",
    3: "the routing names an expert or a slot that does not exist",
    6: "too many operations for one call",
    7: "a position or a row lies outside the KV cache, or a query sees no key",
}
"""By status code."""


class ExpertsArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "ids", "slot_of", "weights", "out", "panels")),
        ("stride", c_size_t),
        *((name, c_int32) for name in ("tokens", "k", "experts", "slots", "hidden", "width")),
        *((name, c_int32) for name in ("threads", "format", "x_is_bf16")),
    )


class ReadArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("panels", "slots")),
        *((name, c_size_t) for name in ("stride", "bytes")),
        *((name, c_int32) for name in ("count", "threads")),
    )


class PackArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("gate_up", "down")),
        *((name, c_void_p) for name in ("gate_up_scales", "down_scales", "panels")),
        ("stride", c_size_t),
        *((name, c_int32) for name in ("experts", "hidden", "width", "threads", "format")),
    )


class PackMatrixArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("rows", "panels")),
        *((name, c_int32) for name in ("count", "k", "threads", "format")),
    )


class MatmulArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "panels", "residual", "out")),
        *((name, c_int32) for name in ("tokens", "k", "rows", "format")),
        *((name, c_int32) for name in ("x_is_bf16", "out_is_bf16")),
    )

    def multiplications(self) -> int:
        return self.tokens * self.k * self.rows


class RouteArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "p", "bias", "vote_weight", "resident")),
        *((name, c_void_p) for name in ("ids", "vanilla_ids", "weights", "used")),
        *((name, c_void_p) for name in ("ballots", "sums", "previous_coresets")),
        *((name, c_void_p) for name in ("reuse_vote_weight", "coresets", "reused", "vote_loss")),
        *((name, c_double) for name in ("mass", "resident_bonus", "max_vote_loss")),
        ("reuse_tolerance", c_double),
        *((name, c_float) for name in ("scale", "epsilon")),
        *((name, c_int32) for name in ("stride", "sequences", "tokens", "experts", "k")),
        *((name, c_int32) for name in ("groups", "kept_groups", "renormalise", "biased")),
        *((name, c_int32) for name in ("vote", "union_size", "count", "min_experts")),
        *((name, c_int32) for name in ("protect", "max_experts")),
    )


class AttentionArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "query_norm", "key_norm", "cos", "sin")),
        *((name, c_void_p) for name in ("positions", "cache_rows", "limits")),
        *((name, c_void_p) for name in ("keys", "values", "out")),
        *((name, c_size_t) for name in ("row_stride", "head_stride")),
        *((name, c_float) for name in ("epsilon", "scale")),
        *((name, c_int32) for name in ("rows", "width", "heads", "kv_heads", "dim")),
        *((name, c_int32) for name in ("rotary_half", "kv_length", "cache_size", "capacity")),
    )

    def multiplications(self) -> int:
        return 2 * self.rows * self.width * self.heads * self.kv_length * self.dim


class RmsNormArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "residual", "weight", "sum", "out")),
        ("epsilon", c_float),
        *((name, c_int32) for name in ("rows", "width")),
    )

    def multiplications(self) -> int:
        return 4 * self.rows * self.width


class SiluMulArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("gate_up", "out")),
        *((name, c_int32) for name in ("rows", "width")),
    )

    def multiplications(self) -> int:
        return 8 * self.rows * self.width


class Op(Structure):
    """See ``api.hpp``."""

    _fields_ = (("args", c_void_p), ("kind", c_int32))


class OpList(Structure):
    """See ``api.hpp``."""

    _fields_ = (("ops", c_void_p), ("count", c_int32), ("threads", c_int32))


class LogitsSummaryArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "best", "unmasked", "logsumexp")),
        *((name, c_int32) for name in ("rows", "width", "mask_id", "threads")),
    )


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

    def is_widest_isa(self) -> bool:
        """Whether the selected instruction set has 512-bit registers, if any supported one has."""
        return self.isa() >= self.isas.get("avx512", len(self.isas))


@cache
def load_library() -> KernelLibrary | None:
    """The kernels, or None if they cannot be used; the reason is logged once."""
    try:
        handle = ctypes.CDLL(str(LIBRARY_PATH))
        handle.coterie_abi_version.argtypes = handle.coterie_layout_version.argtypes = ()
        versions = handle.coterie_abi_version(), handle.coterie_layout_version()
    except (OSError, AttributeError) as error:
        if LIBRARY_PATH.exists():
            return _warn_unavailable(f"the library does not load ({error})")
        return _warn_unavailable("no compiler was available at installation")
    if versions != (ABI_VERSION, LAYOUT_VERSION):
        return _warn_unavailable("the library is of another version; reinstall")
    handle.coterie_isa_name.argtypes = (c_int32,)
    handle.coterie_isa_name.restype = c_char_p
    handle.coterie_isa_supported.argtypes = (c_int32,)
    handle.coterie_group_size.argtypes = (c_int32,)
    handle.coterie_pack.argtypes = (POINTER(PackArgs),)
    handle.coterie_pack.restype = None
    handle.coterie_read_experts.argtypes = (POINTER(ReadArgs),)
    handle.coterie_read_experts.restype = c_uint64
    handle.coterie_run_experts.argtypes = (c_int32, POINTER(ExpertsArgs))
    handle.coterie_matrix_bytes.argtypes = (c_int32, c_int32, c_int32)
    handle.coterie_matrix_bytes.restype = c_size_t
    handle.coterie_pack_matrix.argtypes = (POINTER(PackMatrixArgs),)
    handle.coterie_pack_matrix.restype = None
    handle.coterie_run_ops.argtypes = (c_int32, POINTER(OpList))
    handle.coterie_route.argtypes = (c_int32, POINTER(RouteArgs))
    handle.coterie_summarize_logits.argtypes = (c_int32, POINTER(LogitsSummaryArgs))
    handle.coterie_crc32.argtypes = (c_void_p, c_size_t, POINTER(c_uint32))
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
