"""Compiled C++ for processors, one file for each use: `generation.cpp` (called by `kernels/generation.py`) and
`training.cpp` (by `kernels/training.py`). A file is compiled at first use, for the instructions that `core/isa.py`
allows, and kept in the user's cache. PyTorch stays the reference, and is what runs where there is no kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from plait.core import isa
from plait.core.device import compiler
from plait.core.files import cache_folder
from plait.kernels.compile import compile_kernel, file_name

BUILT = Path(__file__).with_name("built")  # what a wheel brings, compiled
PRODUCTS = ("vectors", "AVX512-BF16", "AMX")  # what bf16 products use, as `plait_products` numbers it
INSTALL = {  # the command that brings a compiler, by the ID or ID_LIKE of /etc/os-release
    "debian": "apt install g++",
    "fedora": "dnf install gcc-c++",
    "rhel": "dnf install gcc-c++",
    "suse": "zypper install gcc-c++",
    "arch": "pacman -S gcc",
    "alpine": "apk add g++",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """A compiled file; without a library, `reason` says why and what to do, and `wanted` that somebody should."""

    library: ctypes.CDLL | None = None
    name: str = ""
    level: isa.Level | None = None
    reason: str = ""
    wanted: bool = True


def install_hint() -> str:
    """The command that installs a C++ compiler here."""
    if platform.system() == "Darwin":
        return "xcode-select --install"
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        return "install g++ or clang++"
    for name in [system.get("ID", ""), *system.get("ID_LIKE", "").split()]:
        if name == "ubuntu":
            name = "debian"
        if name in INSTALL:
            return INSTALL[name]
    return "install g++ or clang++"


# --- where binaries lie -----------------------------------------------------------------------------------------


def _own(path: Path) -> bool:
    """Whether nobody but this user (or root) can have written a file or folder."""
    if not hasattr(os, "geteuid"):
        return True
    facts = path.lstat()
    theirs = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return not stat.S_ISLNK(facts.st_mode) and facts.st_uid in (os.geteuid(), 0) and not theirs


def _candidates() -> list[Path]:
    """Folders that binaries may lie in, the best first: the cache, or one in the temporary folder where there is no
    home, or the cache is read-only or somebody else's."""
    folders = []
    with contextlib.suppress(RuntimeError):  # no home
        folders.append(cache_folder("native"))
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    folders.append(Path(tempfile.gettempdir()) / f"plait-native-{user}")
    return folders


def _usable(folder: Path) -> bool:
    """Whether a folder of one's own is there, made where it can be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _own(folder)
    except OSError:
        return False


def _kept(name: str) -> Path | None:
    """The file of that name: the package's own, or in one of the folders, None where there is none of one's own."""
    if (BUILT / name).is_file():  # as much to be trusted as this file
        return BUILT / name
    for folder in _candidates():
        path = folder / name
        try:
            if _own(folder) and _own(path):
                return path
        except OSError:
            continue
    return None


# --- compiling --------------------------------------------------------------------------------------------------


def _identity(command: list[str]) -> str:
    """Which compiler this is, as far as its files tell: a failure is remembered of this one only."""
    facts = [" ".join(command)]
    for word in command:
        if path := shutil.which(word):
            status = Path(path).resolve().stat()
            facts += [path, str(status.st_size), str(status.st_mtime_ns)]
    return hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:16]


def _build(use: str, level: isa.Level) -> Kernel:
    source = Path(__file__).with_name(f"{use}.cpp")
    command = compiler()
    name = file_name(source, level)
    path = _kept(f"{name}.so")
    if path is None:
        if command is None:
            return Kernel(reason=f"no C++ compiler: {install_hint()}")
        folder = next(filter(_usable, _candidates()), None)
        if folder is None:
            return Kernel(reason="no folder of one's own to compile in: set XDG_CACHE_HOME to one that is writable")
        path, failed = folder / f"{name}.so", folder / f"{name}-{_identity(command)}.failed"
        if failed.is_file() and _own(failed):
            error = failed.read_text(errors="replace")
            return Kernel(reason=f"the C++ compiler failed before (remove {failed} to try again): {error}")
        if error := compile_kernel(source, path, command, level.flags):
            error = error[-2000:]
            failed.write_text(error)
            log.warning("The kernel of %s could not be compiled; PyTorch's code is used. %s", use, error[-500:])
            return Kernel(reason=f"the C++ compiler failed: {error}")
    try:
        return Kernel(ctypes.CDLL(str(path)), name, level)
    except OSError as error:
        log.warning("The kernel of %s could not be loaded; PyTorch's code is used. %s", use, error)
        return Kernel(reason=f"{path} cannot be loaded (remove it to have it made anew): {error}")


@functools.cache
def kernel(use: str, level: isa.Level | None = None) -> Kernel:
    """The compiled file of a use, for the best instructions allowed or those given; PLAIT_NATIVE=0 asks for none."""
    if os.environ.get("PLAIT_NATIVE") == "0":
        return Kernel(reason="PLAIT_NATIVE=0", wanted=False)
    level = level or isa.level()
    if level is None:
        return Kernel(reason="this processor has no AVX2", wanted=False)
    try:
        return _build(use, level)
    except OSError as error:
        log.warning("The kernel of %s could not be made; PyTorch's code is used. %s", use, error)
        return Kernel(reason=str(error))


def library(use: str) -> ctypes.CDLL | None:
    """The compiled file of a use, None where it cannot be had."""
    return kernel(use).library


def described(use: str, products: int) -> str:
    """What computes, in words; `products` is what `plait_products` gave, 0 for fp32."""
    level = kernel(use).level
    units = f", {PRODUCTS[products]}" if products else ""
    return f"native ({level.name if level else 'none'}{units})"


def not_native(use: str) -> str:
    """Why PyTorch computes, in words."""
    return f"PyTorch (no kernel: {kernel(use).reason.splitlines()[0]})"
