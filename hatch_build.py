"""Compiles the kernels for CPUs when the package is built; without a compiler it goes without."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/coterie/ops/cpu")


class Kernels(BuildHookInterface):
    """The library lies beside its sources, for an editable install and for the wheel alike."""

    def initialize(self, version: str, build_data: dict) -> None:
        script = runpy.run_path(str(Path(self.root) / FOLDER / "build.py"))
        library = script["LIBRARY_PATH"]
        try:
            if script["is_stale"]():
                script["build"]()
        except script["NoCompilerError"] as reason:
            library.unlink(missing_ok=True)
            self.app.display_warning(f"Coterie will run on PyTorch alone: {reason}")
            return
        build_data["artifacts"].append(f"/{FOLDER / library.name}")
        if version != "editable":
            # It needs no Python of one version, only this machine's kind.
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
