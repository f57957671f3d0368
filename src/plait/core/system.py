"""What differs between Linux, macOS and Windows: processors, memory, processes, links.

The rest of the package asks here (and `core/signals.py`, `core/files.py`) and never which system it runs on.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

CGROUP = Path("/sys/fs/cgroup")


def processors() -> int:
    """The processors that this process may use: fewer than the machine's where it was pinned to some."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # Linux and Windows
        with contextlib.suppress(psutil.Error, OSError):
            return len(process.cpu_affinity()) or 1
    return os.cpu_count() or 1


def total_memory() -> int:
    """Bytes of the machine's memory, or the limit of the container that this process runs in."""
    limit = _cgroup("memory.max")
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def available_memory() -> int:
    """Bytes that this process could still take without swapping, within its container."""
    free = int(psutil.virtual_memory().available)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return max(free, 0)


def limit_memory(size: int) -> bool:
    """Bound the address space of this process to `size` bytes; False where the system has no such limit."""
    try:
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):  # Windows has no such module, and macOS refuses the limit
        return False
    return True


def end_with_parent() -> None:
    """End this process at once, as a kill would, when the process that started it is gone: seen within a second."""
    parent = psutil.Process(os.getppid())

    def watch() -> None:
        while os.getppid() == parent.pid and parent.is_running():  # on Windows the number stays, of a dead process too
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def is_running(process: int) -> bool:
    """Whether another process has this number. In a restarted container, one's own is often that of the dead."""
    return process != os.getpid() and psutil.pid_exists(process)


# Ctrl-C is for the process that people see: what is started with these options does not hear it.
OUT_OF_HEARING: dict[str, Any] = (
    {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    if os.name == "nt"
    else {"start_new_session": True}
)


def read_line(process: subprocess.Popen[bytes], expired: Callable[[], bool], every: float) -> bytes | None:
    """The next line of a process's stdout, empty where it ended; None where it was killed because `expired`, asked
    every so many seconds while there is no line, said so. (Pipes cannot be waited for with a limit on Windows.)"""
    assert process.stdout is not None
    done, killed = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(every):
            if expired():
                killed.set()
                process.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    line = process.stdout.readline()
    done.set()
    watcher.join()
    return None if killed.is_set() else line


def _cgroup(name: str) -> int | None:
    """A number of this container's control group; None outside of one, or where there is no limit."""
    try:
        text = (CGROUP / name).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdecimal() else None
