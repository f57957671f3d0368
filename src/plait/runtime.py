"""What every room stands on: errors for people, device and precision, counter-based randomness, atomic files."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
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


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt, nobody's `except Exception` may swallow it; exit code 143."""


# --- device and precision ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Where a model runs. `dtype` is the precision of matrix products; parameters stay in fp32."""

    name: str
    dtype: torch.dtype

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision as this device does it, or nothing where fp32 is the choice."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.kind, dtype=self.dtype)


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
        torch.set_float32_matmul_precision(product_precision())
    return Device(name, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision])


def product_precision() -> str:
    """What torch calls the precision of fp32 products on this processor. With bf16 units of AVX-512, oneDNN splits them
    at "medium", and the error stays that of fp32; with AMX's it would round to bf16 (errors of 3e-3)."""
    return "highest" if _has("_is_amx_tile_supported") else "medium"


def _cpu_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware."""
    return _has("_is_avx512_bf16_supported") or _has("_is_amx_tile_supported")


def _has(check: str) -> bool:
    found = getattr(torch.cpu, check, None)
    return found is not None and found()


def threads() -> int:
    """Threads that torch may use: OMP_NUM_THREADS, or the processors this process is allowed on."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(int(os.environ["OMP_NUM_THREADS"]), 1)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def keep_memory() -> None:
    """Have glibc keep what is freed: by itself it hands large tensors back to the kernel, which clears each page anew,
    and a training step takes 1.1 to 1.3 times as long (docs/bench.md). Other C libraries are left alone."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a processor, None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


def cache_folder(name: str) -> Path:
    """The user's folder for what can be made again, ~/.cache/plait/NAME (or below XDG_CACHE_HOME); nobody else may
    write there. Raises OSError where it cannot be made."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "plait" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


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


def json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json_text(value))


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A dictionary with the sha256 of its JSON text under "seal", so that a changed byte shows; see `read_sealed`."""
    return {**value, "seal": hashlib.sha256(json_text(value).encode()).hexdigest()}


def intact(value: dict[str, Any]) -> bool:
    """Whether a dictionary that `sealed` made still holds what it held."""
    return value == sealed({name: part for name, part in value.items() if name != "seal"})


def read_json(path: Path) -> Any:
    """The JSON in a file. Raises PlaitError naming the file where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlaitError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PlaitError(f"{path} cannot be read as JSON: {error}.") from error


def read_sealed(path: Path) -> dict[str, Any]:
    """The dictionary in a file that `sealed` made. Raises PlaitError naming the file where any byte is another."""
    value = read_json(path)
    if not isinstance(value, dict) or not intact(value) or path.read_bytes() != json_text(value).encode():
        raise PlaitError(f"{path} was altered or cut: it does not match its own seal.")
    return value


@contextlib.contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of `path`: written aside, fsynced, renamed.

    A kill leaves the old folder or the new one; between the two renames the old one lies beside, under a name of its
    own, and the next publication puts it back or clears it away. Raises PlaitError where nothing can be written.
    """
    path = Path(path)
    clear_leftovers(path)
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


def clear_leftovers(path: Path) -> None:
    """Put back or remove what a killed process left while it published this folder; the caller is its one writer."""
    for left in sorted(path.parent.glob(f".{path.name}.*")):
        process, _, kind = left.name.removeprefix(f".{path.name}.").partition(".")
        if kind not in ("tmp", "old") or not process.isdecimal() or _alive(int(process)):
            continue
        if kind == "old" and not path.exists():
            left.rename(path)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def point(link: Path, target: str) -> None:
    """Make `link` a relative symbolic link to `target`, whatever stood there; a reader sees the old or the new one."""
    aside = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    try:
        if link.is_symlink() and str(link.readlink()) == target:
            return
        clear_leftovers(link)
        if link.is_dir() and not link.is_symlink():  # a copy that followed links
            link.rename(aside)
            shutil.rmtree(aside)
        aside.symlink_to(target)
        aside.replace(link)
        fsync_folder(link.parent)
    except OSError as error:
        raise PlaitError(f"Cannot write {link}: {error.strerror}. Free space or choose another folder.") from error


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill leaves it whole or gone; `clear_leftovers` takes what is left."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether another process has this number: in a restarted container, one's own is often that of the dead."""
    if process == os.getpid():
        return False
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


# --- signals ----------------------------------------------------------------------------------------------------

GRACE = 20  # seconds after SIGTERM in which a step, a validation or a save may come to its end


class Signals:
    """Ctrl-C and SIGTERM while a run trains. Outside of `held` they act at once; inside they are noted, and obeyed
    where `check` is called. A second Ctrl-C, or the end of the grace, acts at once again."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._held = False

    def check(self) -> None:
        """Raise KeyboardInterrupt or Terminated where a signal came."""
        if self.received is not None:
            raise KeyboardInterrupt if self.received == signal.SIGINT else Terminated

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For what must not be cut in the middle."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _receive(self, number: int, frame: object) -> None:
        again = self.received is not None
        self.received = signal.SIGTERM if number == signal.SIGALRM else number
        if not self._held or (again and number != signal.SIGTERM):
            self.check()
        elif number == signal.SIGTERM:
            signal.alarm(signal.alarm(0) or GRACE)


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Listen to Ctrl-C and SIGTERM; only the main thread can, elsewhere nothing is received."""
    listening = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield listening
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.signal(number, listening._receive) for number in numbers]
    try:
        yield listening
    finally:
        signal.alarm(0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
