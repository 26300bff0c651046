"""Compile the kernels: the standard library only, for it runs before the package is installed.

``python src/coterie/ops/cpu/build.py`` builds the library again in place.
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

HERE = Path(__file__).parent
LIBRARY = HERE / "libcoterie.so"
COMPILERS = ("c++", "g++", "clang++")
# -O3 takes many times as long and is no faster: the loops that count are written out by pragmas.
FLAGS = (
    "-O2 -std=c++17 -fPIC -fvisibility=hidden -fno-exceptions -ffp-contract=fast "
    "-Wall -Wextra -Wno-psabi"
)
AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
LINUX = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
ISAS: Mapping[str, str] = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    # Flag by flag, for compilers older than the processors.
    ISAS = {
        "portable": "",
        "avx2": "-mavx2 -mfma",
        "avx512": AVX512,
        "avx512bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
    }


class NoCompilerError(RuntimeError):
    """There is no compiler, or it does not compile this; the message says which."""


def build(to: Path = LIBRARY, *, program: Path | None = None, extra: Sequence[str] = ()) -> Path:
    """The library, built with the first compiler found ($CXX, else c++, g++, clang++).

    With ``program``, the source of one, that program around the kernels instead.
    """
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = _compile(compiler, Path(folder), program, [*extra, "-fopenmp"])
        except NoCompilerError:
            # Apple's clang has no OpenMP: one thread then.
            made = _compile(compiler, Path(folder), program, [*extra, "-Wno-unknown-pragmas"])
        # Beside its place first: a process that has the old one mapped keeps it.
        beside = to.with_suffix(f".{os.getpid()}")
        shutil.copy(made, beside)
        beside.replace(to)
    return to


def find_compiler() -> list[str]:
    """The command of a C++ compiler."""
    if chosen := os.environ.get("CXX", "").split():
        return chosen
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise NoCompilerError(f"no C++ compiler: neither $CXX nor {', '.join(COMPILERS)}")


def sources(program: Path | None = None) -> dict[str, list[str]]:
    """Every object by name: its source and the flags of its own."""
    found = {
        isa: [str(HERE / "isa.cpp"), f"-DCOTERIE_ISA={isa}", *flags.split()]
        for isa, flags in ISAS.items()
    }
    found |= {name: [str(HERE / f"{name}.cpp")] for name in ("main", "pack", "checksum")}
    return found if program is None else found | {"program": [str(program), f"-I{HERE}"]}


def _compile(compiler: list[str], folder: Path, program: Path | None, extra: list[str]) -> Path:
    objects = {name: str(folder / f"{name}.o") for name in sources(program)}
    _run(
        [*compiler, *FLAGS.split(), *extra, *own, "-c", "-o", objects[name]]
        for name, own in sources(program).items()
    )
    made = folder / "made"
    shared = [] if program else ["-shared"]
    # A machine that only runs it may have no C++ runtime beside the one that torch brings.
    static = LINUX if sys.platform == "linux" and not program else ()
    _run([[*compiler, *extra, *shared, *static, *objects.values(), "-o", str(made)]])
    return made


def _run(commands: Iterable[list[str]]) -> None:
    """All of them at once: there are few."""
    commands = list(commands)
    try:
        started = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
    except OSError as error:
        raise NoCompilerError(f"{commands[0][0]} cannot be run ({error.strerror})") from None
    said = [process.communicate()[1] for process in started]
    for command, process, words in zip(commands, started, said, strict=True):
        if process.returncode:
            raise NoCompilerError(f"{' '.join(command)}\n{words}")


if __name__ == "__main__":
    print(build())
