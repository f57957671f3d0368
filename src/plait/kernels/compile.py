"""Compiling a kernel, for whoever has a compiler: at first use (`build.py`), or when a wheel is made
(`packaging/hatch_build.py`, in an environment without torch). Imports the standard library and `core/isa.py` alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import subprocess
import tempfile
from pathlib import Path

from plait.core import isa

USES = ("generation", "training")  # a C++ file each
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi", "-fno-math-errno", "-ffp-contract=fast")
COMPILE_SECONDS = 120


def _run(command: list[str]) -> str:
    """Run a compiler; returns what went wrong, "" where nothing did. One that hangs is ended with what it started."""
    text = " ".join(command[: command.index(FLAGS[0])])
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as fault:
        return str(fault)
    try:
        _, error = process.communicate(timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()
        return f"{text} did not end within {COMPILE_SECONDS:g} seconds"
    return "" if process.returncode == 0 else error.strip() or f"{text} ended with code {process.returncode}"


def compile_kernel(source: Path, target: Path, command: list[str], flags: tuple[str, ...]) -> str:
    """Compile to `target`; returns what went wrong, "" where nothing did."""
    first = ""
    for parallel in (["-fopenmp"], []):  # Apple's clang has no OpenMP: then one thread
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            output = Path(folder) / target.name
            error = _run([*command, *FLAGS, *flags, *parallel, str(source), "-o", str(output)])
            if not error and output.is_file():
                output.chmod(0o700)
                output.replace(target)
                return ""
            first = first or error or f"{command[0]} made nothing"
            if "did not end" in error:
                break
    return first


def file_name(source: Path, level: isa.Level) -> str:
    """A file name that changes with the source, the compiler and the instructions, so that no binary serves others."""
    files = [source, *sorted(source.parent.glob("*.h"))]
    parts = [*(file.read_text() for file in files), *FLAGS, *level.flags, platform.system(), platform.machine()]
    return f"{source.stem}-{level.name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
