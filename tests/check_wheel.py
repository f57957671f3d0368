"""Run by cibuildwheel in the environment of a wheel that was just built: its kernels load, and compute.

python tests/check_wheel.py
"""

from __future__ import annotations

import os
import sys

os.environ["PATH"] = ""  # no compiler: what loads came with the wheel

from plait.core import isa
from plait.kernels import build
from plait.kernels.compile import USES


def main() -> int:
    """Exit code 1 where this processor could use a kernel and the wheel has none."""
    if isa.level() is None:
        sys.stdout.write("This processor has no AVX2; nothing to check.\n")
        return 0
    missing = 0
    for use in USES:
        kernel = build.kernel(use)
        sys.stdout.write(f"{use}: {kernel.name or kernel.reason}\n")
        missing += kernel.library is None
    return min(missing, 1)


if __name__ == "__main__":
    sys.exit(main())
