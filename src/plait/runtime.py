"""What every room stands on: errors for people, device and precision, counter-based randomness, atomic files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


class PlaitError(Exception):
    """A fault that the user can mend. The message says what was wrong, where, and what to do; never a traceback."""


class DivergedError(PlaitError):
    """A loss that is not finite, or that exploded: these settings do not train."""


# --- device and precision ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Where a model runs. `dtype` is the precision of matrix products; parameters stay in fp32."""

    name: str
    dtype: torch.dtype

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision as this device does it, or nothing where fp32 is the choice."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.name.split(":")[0], dtype=self.dtype)


def choose_device(name: str = "auto", precision: str = "auto", training: bool = False) -> Device:
    """The device asked for, or the best one here: CUDA, then MPS, then CPU.

    `precision` is "auto", "bf16" or "fp32"; "auto" is bf16 on CUDA with bf16 units and, in training, on processors
    that have them, and fp32 elsewhere.
    Raises PlaitError where the device does not exist.
    """
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
    if kind == "cpu":
        # On processors with bf16 units oneDNN then splits fp32 products; the error stays that of fp32.
        torch.set_float32_matmul_precision("medium")
    return Device(name, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision])


def _cpu_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def threads() -> int:
    """Threads that torch may use: OMP_NUM_THREADS, or the processors this process is allowed on."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(int(os.environ["OMP_NUM_THREADS"]), 1)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


# --- randomness as a function -----------------------------------------------------------------------------------

_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) that are a function of the keys alone: integers or integer arrays that broadcast.

    `uniform(seed, epoch, ids, np.arange(4)[:, None])` draws 4 numbers a record, the same whatever batch they are in.
    """
    with np.errstate(over="ignore"):
        state = np.zeros((), np.uint64)
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.int64).view(np.uint64)) + _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def key_of(text: str) -> int:
    """A stable 63-bit integer for a string, to be used as a key of `uniform` or to split by hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# --- files ------------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old or the new content, also after power is lost."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise PlaitError(
            f"Cannot write {path}: {error.strerror or error}. Free space or choose another folder."
        ) from error


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in a file. Raises PlaitError naming the file where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlaitError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PlaitError(f"{path} cannot be read as JSON: {error}.") from error


@contextlib.contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of `path`: written aside, fsynced, renamed.

    A kill leaves the old folder or the new one; between the two renames the old one lies beside, under a name of its
    own, and the next publication puts it back or clears it away. Raises PlaitError where nothing can be written.
    """
    path = Path(path)
    _clear_leftovers(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        for file in sorted(aside.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            else:
                fsync_folder(file)
        fsync_folder(aside)
        if path.exists():
            path.rename(old)
        aside.rename(path)
        fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise PlaitError(
            f"Cannot write {path}: {error.strerror or error}. Free space or choose another folder."
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _clear_leftovers(path: Path) -> None:
    """Put back or remove what a killed process left while it published this folder."""
    for left in sorted(path.parent.glob(f".{path.name}.*")):
        process, _, kind = left.name.removeprefix(f".{path.name}.").partition(".")
        if kind not in ("tmp", "old") or not process.isdecimal() or _alive(int(process)):
            continue
        if kind == "old" and not path.exists():
            left.rename(path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a second writer is refused with the process id of the first."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise PlaitError(f"Cannot write to {folder}: {error.strerror}. Choose another folder with -o.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise PlaitError(
                f"{folder} is being written by process {lock.read().strip() or '?'}. "
                "Wait for it, or choose another folder."
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield
