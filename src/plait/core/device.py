"""Which device and precision a model runs with. The one module of this package that imports torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from plait.core import isa
from plait.core.errors import PlaitError
from plait.core.system import processors

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int5", "int4")
WEIGHT_ONLY = ("fp16", "int8", "int5", "int4")  # of weights alone


@dataclass(frozen=True)
class Device:
    """Where a model runs. `dtype` is the precision of activations and, in training, of matrix products, where
    parameters stay in fp32; `storage` is how generation on a processor keeps weights, one of PRECISIONS."""

    name: str
    dtype: torch.dtype
    weights: str | None = None  # None: in `dtype`

    @property
    def storage(self) -> str:
        return self.weights or {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    @property
    def torch(self) -> torch.device:
        """As PyTorch names it."""
        return torch.device(self.name)

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Mixed precision as this device does it, for a forward pass; in fp32 the products that are fastest here."""
        with matmul_precision(self):
            if self.dtype is torch.float32:
                yield
            else:
                with torch.autocast(self.kind, dtype=self.dtype):
                    yield


class _Unfilled(TorchFunctionMode):
    """Nothing is drawn or filled in; the small tensors that constants are computed from are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_):
            return args[0]
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (torch.randn, torch.ones, torch.zeros):
            func = torch.empty
        elif func in (torch.arange, torch.tensor):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within, networks are made without memory for their parameters. PyTorch's "meta" device alone would do, but loads
    PyTorch's compiler to fill them with nothing: a second and 40 MB."""
    with torch.device("meta"), _Unfilled():
        yield


def choose_device(name: str = "auto", precision: str = "auto", training: bool = False) -> Device:
    """The device asked for, or the best one here: CUDA, then MPS, then CPU.

    `precision` is "auto", "bf16" or "fp32", and in use on a processor "fp16", "int8", "int5" or "int4", which are kept
    so in memory and compute with activations in fp32. "auto" is bf16 on CUDA with bf16 units and, in training, on
    processors that have them, and fp32 elsewhere. In use, a processor without bf16 units keeps bf16 weights and
    computes in fp32.
    Raises PlaitError where the device does not exist, or PLAIT_ISA cannot hold.
    """
    isa.cap()
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise PlaitError(f"Unknown device '{name}'. Use auto, cpu, cuda or mps.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise PlaitError("No CUDA device was found. Use --device cpu, or leave --device out.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise PlaitError("No MPS device was found. Use --device cpu, or leave --device out.")
    if precision == "auto":
        units = torch.cuda.is_bf16_supported() if kind == "cuda" else training and kind == "cpu" and _cpu_bf16()
        precision = "bf16" if units else "fp32"
    if precision not in PRECISIONS:
        raise PlaitError(f"Unknown precision '{precision}'. Use auto, {', '.join(PRECISIONS)}.")
    if precision in WEIGHT_ONLY and (training or kind != "cpu"):
        where = "training" if training else f"{kind}"
        raise PlaitError(f"Precision {precision} is for use on a processor, not for {where}. Use bf16 or fp32.")
    widened = precision in WEIGHT_ONLY or (precision == "bf16" and kind == "cpu" and not training and not _cpu_bf16())
    if widened:
        return Device(name, torch.float32, precision)
    return Device(name, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision])


@functools.cache
def product_precision() -> str:
    """What torch calls the precision of fp32 products on this processor. With bf16 units of AVX-512, oneDNN splits them
    at "medium", and the error stays that of fp32; with AMX's it would round to bf16 (errors of 3e-3)."""
    return "highest" if _allows("amx", "_is_amx_tile_supported") else "medium"


class _MatmulPrecision:
    """torch's precision of fp32 products, which belongs to the process, lent to scopes: the newest open one has its
    way, and once all are closed it is what it was. Threads may open and close scopes in any order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.scopes: list[tuple[object, str]] = []
        self.outside = ""

    @contextlib.contextmanager
    def scope(self, precision: str) -> Iterator[None]:
        scope = object(), precision
        with self.lock:
            if not self.scopes:
                self.outside = torch.get_float32_matmul_precision()
            self.scopes.append(scope)
            torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            with self.lock:
                self.scopes.remove(scope)
                torch.set_float32_matmul_precision(self.scopes[-1][1] if self.scopes else self.outside)


_PRECISION = _MatmulPrecision()


def matmul_precision(device: Device) -> contextlib.AbstractContextManager[None]:
    """Within, fp32 products are as fast as they can be on a processor at the error of fp32; see `product_precision`."""
    return _PRECISION.scope(product_precision()) if device.kind == "cpu" else contextlib.nullcontext()


def exact_products(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """fp32 products as they are on a processor: split into bf16 ones, those of one row take ten times as long."""
    return _PRECISION.scope("highest") if device.type == "cpu" else contextlib.nullcontext()


def _cpu_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware."""
    return _allows("avx512bf16", "_is_avx512_bf16_supported") or _allows("amx", "_is_amx_tile_supported")


def _allows(level: str, check: str) -> bool:
    """Whether torch finds a level of instructions, and PLAIT_ISA does not cap it away."""
    present, cap = getattr(torch.cpu, check, None), isa.cap()
    return present is not None and present() and (cap is None or isa.NAMES.index(cap.name) >= isa.NAMES.index(level))


def threads() -> int:
    """Threads that torch may use: OMP_NUM_THREADS, or the processors this process is allowed on."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(int(os.environ["OMP_NUM_THREADS"]), 1)
    return processors()


def keep_memory() -> None:
    """Have glibc keep what is freed: by itself it hands large tensors back to the kernel, which clears each page anew,
    and a training step takes 1.1 to 1.3 times as long (docs/benchmarks/speed.md). Other C libraries are left alone."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


def release_memory() -> None:
    """Have glibc hand back to the system what is free in its heap, in the middle too. Others do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def compiler() -> list[str] | None:
    """The command of the C++ compiler: what CXX says ("ccache g++" too), else g++, c++ or clang++; None without one."""
    for command in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None
