"""What this machine can do at most, in the same run: matrix products and reads of memory."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import LEVEL, Contender, timed

from plait.core.device import choose_device

PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, FLOP/s


def peak(device: str, limits: dict[str, float]) -> float:
    """FLOP/s that shares are taken of: bf16 on the card's data sheet, 0 where not known; the most that a processor was
    measured to do, which is in fp32 where it has no bf16 units."""
    if device == "cpu":
        return max(value for name, value in limits.items() if name.endswith("GFLOP/s")) * 1e9
    name = torch.cuda.get_device_name()
    return next((value for key, value in PEAKS.items() if key in name), 0.0)


def limits(device: str, quick: bool) -> dict[str, float]:
    """Medians of 5: GFLOP/s of square products, GB/s of a sum over and a copy of memory far larger than caches."""
    side = 512 if quick else 8192 if device != "cpu" else 2048
    count = 2**24 if quick else 2**30 if device != "cpu" else 2**27
    found = {}
    products = [("fp32 GFLOP/s", torch.float32, "highest"), ("fp32 'medium' GFLOP/s", torch.float32, "medium")]
    if choose_device(device, training=True).dtype is torch.bfloat16:  # else a product takes a minute, and nobody asks
        products.append(("bf16 GFLOP/s", torch.bfloat16, "highest"))
    for name, dtype, matmul in products:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b) -> float:
            torch.mm(a, b)
            return 2 * side**3 / 1e9

        found[name] = _rate(Contender(name, multiply, matmul=matmul), device)
    x = torch.ones(count, device=device)
    y = torch.empty_like(x)

    def read() -> float:
        x.sum()
        return x.nbytes / 1e9

    def copy() -> float:
        y.copy_(x)
        return 2 * x.nbytes / 1e9

    found["read GB/s"] = _rate(Contender("read", read), device)
    found["copy GB/s"] = _rate(Contender("copy", copy), device)
    return found


def _rate(contender: Contender, device: str) -> float:
    contender.work()
    return median(timed(contender, 3, device) for _ in range(5))


def facts(device: str) -> dict[str, Any]:
    """What a reader needs to judge the figures: hardware, threads, versions, what the machine was doing besides."""
    chip = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        chip = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), chip)
    packages = {}
    for name in ("torch", "transformers", "llama-cpp-python", "open_clip_torch", "numpy", "pillow", "plait"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "processor": chip,
        "instructions": LEVEL,
        "processors": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if device != "cpu" else "none",
        "threads": torch.get_num_threads(),
        "load before": os.getloadavg()[0],
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "OMP_", "PLAIT_"))},
        "versions": packages,
    }
