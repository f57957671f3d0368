"""Which vector instructions of the processor may be used, and `PLAIT_ISA`, which caps them.

A cap holds for everything that computes: the kernels of this package, and torch's own code, MKL and oneDNN beneath it.
These read the environment when torch loads, so `import plait` sets it first.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from plait.core.errors import PlaitError

VARIABLE = "PLAIT_ISA"


@dataclass(frozen=True)
class Level:
    """A set of instructions that includes all those before it on the same machine."""

    name: str
    machine: str  # "x86" or "arm"
    lanes: int  # floats in a vector
    flags: tuple[str, ...]  # of the compiler
    features: frozenset[str]  # as /proc/cpuinfo names them
    libraries: tuple[tuple[str, str], ...] = ()  # the environment that caps torch, MKL and oneDNN


_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (
    *_AVX2,
    *("-mavx512f", "-mavx512cd", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
)


def _caps(aten: str, mkl: str, onednn: str) -> tuple[tuple[str, str], ...]:
    return (("ATEN_CPU_CAPABILITY", aten), ("MKL_ENABLE_INSTRUCTIONS", mkl), ("ONEDNN_MAX_CPU_ISA", onednn))


LEVELS = (
    Level("neon", "arm", 4, (), frozenset()),
    Level("avx2", "x86", 8, _AVX2, frozenset({"avx2", "fma", "f16c", "bmi2"}), _caps("avx2", "AVX2", "AVX2")),
    Level(
        "avx512", "x86", 16, _AVX512, frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}),
        _caps("avx512", "AVX512", "AVX512_CORE"),
    ),
    Level(
        "avx512bf16", "x86", 16, (*_AVX512, "-mavx512vnni", "-mavx512bf16"), frozenset({"avx512_vnni", "avx512_bf16"}),
        _caps("avx512", "AVX512_E3", "AVX512_CORE_BF16"),
    ),
    Level(
        "amx", "x86", 16, (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        frozenset({"amx_tile", "amx_bf16"}),
        _caps("avx512", "AVX512_E4", "AVX512_CORE_AMX"),
    ),
)  # fmt: skip
NAMES = tuple(level.name for level in LEVELS)


def by_name(name: str) -> Level:
    """The level of a name in `NAMES`. Raises ValueError for another."""
    return LEVELS[NAMES.index(name)]


@functools.cache
def supported() -> tuple[Level, ...]:
    """What this processor has, the least first; none where it has not even AVX2."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return tuple(level for level in LEVELS if level.machine == "arm")
    features, levels = _features(), []
    for level in LEVELS:
        if level.machine == "x86" and not level.features <= features:
            break
        if level.machine == "x86":
            levels.append(level)
    return tuple(levels)


def _features() -> frozenset[str]:
    """The processor's features by the names of /proc/cpuinfo; elsewhere than on Linux, those that NumPy tells of."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    try:
        known = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__
    except (ImportError, AttributeError):
        return frozenset()
    names = {name.lower() for name, present in known.items() if present}
    if {"avx2", "fma3"} <= names:
        names |= {"fma", "bmi2"}  # every processor with AVX2 and FMA3 has BMI2
    return frozenset(names)


def cap() -> Level | None:
    """The level that PLAIT_ISA asks for, None where it asks for none.

    Raises PlaitError where there is no such level, the processor lacks it, or torch was loaded before the cap.
    """
    name = os.environ.get(VARIABLE, "").strip().lower()
    if not name:
        return None
    here = [level.name for level in supported()]
    if name not in NAMES:
        raise PlaitError(f"{VARIABLE}={name} is not known. Use {', '.join(NAMES)}; this processor has {_listed(here)}.")
    if name not in here:
        raise PlaitError(f"{VARIABLE}={name}: this processor has {_listed(here)}. Take one of these, or leave it out.")
    level = by_name(name)
    if _TOO_LATE or any(os.environ.get(variable) != value for variable, value in level.libraries):
        raise PlaitError(
            f"{VARIABLE}={name} came too late: torch had been imported, and chose its instructions then. Set it before "
            "Python starts, or import plait before torch."
        )
    return level


def level() -> Level | None:
    """The highest level that may be used here; None where no kernel serves this processor. Raises as `cap`."""
    highest = supported()[-1] if supported() else None
    return cap() or highest


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none of them"


def cap_libraries() -> bool:
    """Put PLAIT_ISA into the environment that torch, MKL and oneDNN read when they load; whether it was too late."""
    name = os.environ.get(VARIABLE, "").strip().lower()
    if name not in [level.name for level in supported()]:
        return False
    libraries = by_name(name).libraries
    late = "torch" in sys.modules and any(os.environ.get(variable) != value for variable, value in libraries)
    if not late:
        os.environ.update(libraries)
    return late


_TOO_LATE = cap_libraries()
