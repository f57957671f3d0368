"""Compiled C++ for processors, one file for each use: `generation.cpp` (called by `kernels/generation.py`) and
`training.cpp` (by `kernels/training.py`). A file is compiled at first use and kept in the user's cache. PyTorch stays
the reference, and is what runs where there is no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from plait.core.device import compiler
from plait.core.files import cache_folder

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi")
PRODUCTS = ("vectors", "AVX512-BF16", "AMX")  # what bf16 products use, as `plait_products` numbers it

log = logging.getLogger(__name__)


def _processor() -> str:
    """What decides which instructions the compiler uses."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in info.splitlines() if line.startswith(("flags", "Features"))), platform.machine())


def _compile(source: Path, target: Path, command: str) -> str:
    """Compile to `target`; returns what went wrong, "" where nothing did."""
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    error = ""
    for parallel in (["-fopenmp"], []):  # Apple's clang has no OpenMP: then one thread
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            try:
                done = subprocess.run(
                    [command, *FLAGS, tune, *parallel, str(source), "-o", str(made)],
                    capture_output=True, text=True, timeout=120,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as fault:
                return str(fault)
            if done.returncode == 0:
                made.replace(target)
                return ""
            error = error or done.stderr.strip()
    return error


@functools.cache
def library(use: str) -> ctypes.CDLL | None:
    """The compiled file of a use, None where it cannot be had; PLAIT_NATIVE=0 asks for none."""
    command = compiler()
    if os.environ.get("PLAIT_NATIVE") == "0" or command is None:
        return None
    source = Path(__file__).with_name(f"{use}.cpp")
    text = [source.read_text(), command, *FLAGS, _processor()]
    name = f"{use}-{hashlib.sha256(chr(0).join(text).encode()).hexdigest()[:16]}.so"
    try:
        path = cache_folder("native") / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists() and (error := _compile(source, path, command)):
            log.warning("The native step of %s could not be compiled; PyTorch's is used. %s", use, error[-500:])
            return None
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("The native step of %s could not be loaded; PyTorch's is used. %s", use, error)
        return None


def described(products: int) -> str:
    """What computes, in words, from what `plait_products` gave."""
    return f"native ({PRODUCTS[products]})"


NOT_NATIVE = "PyTorch (no native step: no C++ compiler, or PLAIT_NATIVE=0)"
