"""Compiles the kernels. Uses only the standard library, as it runs before installation.

``python src/coterie/ops/cpu/build.py`` rebuilds the library in place.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SOURCE_DIR = Path(__file__).parent
LIBRARY_PATH = SOURCE_DIR / "libcoterie.so"
COMPILERS = ("c++", "g++", "clang++")
# -O3 compiles far slower and is no faster: pragmas already unroll the loops that matter.
FLAGS = (
    "-O2 -std=c++17 -fPIC -fvisibility=hidden -fno-exceptions -ffp-contract=fast "
    "-Wall -Wextra -Wno-psabi"
)
AVX512_FLAGS = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
LINUX_LINK_FLAGS = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
ISA_FLAGS: Mapping[str, str] = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    # Single flags instead of -march: compilers may be older than the CPU.
    ISA_FLAGS = {
        "portable": "",
        "avx2": "-mavx2 -mfma",
        "avx512": AVX512_FLAGS,
        "avx512bf16": f"{AVX512_FLAGS} -mavx512vnni -mavx512bf16",
    }


class NoCompilerError(RuntimeError):
    """No compiler exists, or compilation failed; the message names the command."""


def build(
    output: Path = LIBRARY_PATH, *, program: Path | None = None, extra_flags: Sequence[str] = ()
) -> Path:
    """Builds the library with the first available compiler: $CXX, else c++, g++, clang++.

    With ``program``, a source file, builds that program with the kernels instead.
    """
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        try:
            binary = _compile(compiler, Path(folder), program, [*extra_flags, "-fopenmp"])
        except NoCompilerError:
            # Apple's clang has no OpenMP: build for one thread.
            binary = _compile(
                compiler, Path(folder), program, [*extra_flags, "-Wno-unknown-pragmas"]
            )
        # Written next to the target, then renamed: processes keep the old file that they mapped.
        temporary = output.with_suffix(f".{os.getpid()}")
        shutil.copy(binary, temporary)
        temporary.replace(output)
    return output


def is_stale() -> bool:
    """Whether the library is missing, or older than a source file."""
    sources = (*SOURCE_DIR.glob("*.[ch]pp"), Path(__file__))
    newest = max(path.stat().st_mtime for path in sources)
    return not LIBRARY_PATH.is_file() or LIBRARY_PATH.stat().st_mtime < newest


def find_compiler() -> list[str]:
    """The command of a C++ compiler."""
    if command := os.environ.get("CXX", "").split():
        return command
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise NoCompilerError(f"no C++ compiler: neither $CXX nor {', '.join(COMPILERS)}")


def sources(program: Path | None = None) -> dict[str, list[str]]:
    """The objects by name: source file and specific flags."""
    objects = {
        isa: [str(SOURCE_DIR / "isa.cpp"), f"-DCOTERIE_ISA={isa}", *flags.split()]
        for isa, flags in ISA_FLAGS.items()
    }
    objects |= {name: [str(SOURCE_DIR / f"{name}.cpp")] for name in ("main", "pack", "checksum")}
    return objects if program is None else objects | {"program": [str(program), f"-I{SOURCE_DIR}"]}


def _compile(
    compiler: list[str], folder: Path, program: Path | None, extra_flags: list[str]
) -> Path:
    objects = {name: str(folder / f"{name}.o") for name in sources(program)}
    _run_all(
        [*compiler, *FLAGS.split(), *extra_flags, *source_args, "-c", "-o", objects[name]]
        for name, source_args in sources(program).items()
    )
    binary = folder / "kernels"
    shared = [] if program else ["-shared"]
    # The target machine may have no C++ runtime other than the one that torch ships.
    static = LINUX_LINK_FLAGS if sys.platform == "linux" and not program else ()
    _run_all([[*compiler, *extra_flags, *shared, *static, *objects.values(), "-o", str(binary)]])
    return binary


def _run_all(commands: Iterable[list[str]]) -> None:
    """Runs all commands in parallel."""
    commands = list(commands)
    try:
        processes = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
    except OSError as error:
        raise NoCompilerError(f"{commands[0][0]} cannot be run ({error.strerror})") from None
    outputs = [process.communicate()[1] for process in processes]
    for command, process, output in zip(commands, processes, outputs, strict=True):
        if process.returncode:
            raise NoCompilerError(f"{' '.join(command)}\n{output}")


if __name__ == "__main__":
    print(build())
