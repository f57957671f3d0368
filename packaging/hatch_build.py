"""Hatchling's build hook: a wheel carries the kernels compiled, for each set of instructions of this kind of machine.

Which one runs is chosen when Plait starts (core/isa.py). Where there is no compiler, or it fails, the wheel is a pure
one, and the kernels are compiled at first use if there is a compiler then. PLAIT_NATIVE=0 asks for a pure wheel.
"""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


class KernelHook(BuildHookInterface):
    """Compiles into a folder of its own, and has the wheel take the files from there."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable" or os.environ.get("PLAIT_NATIVE") == "0":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        compiling = importlib.import_module("plait.kernels.compile")
        isa = importlib.import_module("plait.core.isa")
        command = self._compiler()
        if command is None:
            self.app.display_warning("No C++ compiler: the wheel is made without kernels.")
            return
        kind = "arm" if platform.machine().lower() in ("arm64", "aarch64") else "x86"
        self.folder = Path(tempfile.mkdtemp(prefix="plait-kernels-"))
        made = {}
        for use in compiling.USES:
            source = Path(self.root) / "src" / "plait" / "kernels" / f"{use}.cpp"
            for level in (level for level in isa.LEVELS if level.machine == kind):
                name = f"{compiling.file_name(source, level)}.so"
                error = compiling.compile_kernel(source, self.folder / name, command, level.flags)
                if error:
                    self.app.display_warning(f"{use} for {level.name} was not compiled: {error[-500:]}")
                    continue
                (self.folder / name).chmod(0o755)
                made[str(self.folder / name)] = f"plait/kernels/built/{name}"
        if made:
            build_data["force_include"].update(made)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _compiler() -> list[str] | None:
        for text in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
            command = shlex.split(text)
            if command and shutil.which(command[0]):
                return command
        return None
