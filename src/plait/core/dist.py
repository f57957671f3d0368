"""The distribution: its name on the package index, its version, and what to type where an extra is missing."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from plait.core.errors import PlaitError

# The name `plait` belongs to another project on the package index. The import and the command stay `plait`.
DISTRIBUTION = "plait-ml"
VERSION = "0.1.0"  # pyproject.toml reads it from here
DOCUMENTATION = "https://plait-ml.github.io/plait"


def install_command(extra: str = "") -> str:
    """The line that installs an extra, or the package alone; double quotes work in every shell, cmd.exe included."""
    return f'pip install "{DISTRIBUTION}[{extra}]"' if extra else f"pip install {DISTRIBUTION}"


def docs_page(page: str) -> str:
    """The address of a page of the documentation: `docs_page("how-to/plan")` is docs/how-to/plan.md."""
    return f"{DOCUMENTATION}/{page}/"


def check_extra(module: str, extra: str, what: str) -> None:
    """Raise PlaitError where `module`, which `extra` installs, is not there. Nothing is imported.

    Called before long work begins. `what` opens the message, as in "Export to ONNX".
    """
    package = module.partition(".")[0]
    try:
        there = importlib.util.find_spec(package) is not None
    except ValueError:  # a module that something has put in its place
        there = False
    if not there:
        raise PlaitError(f"{what} needs {package}. Run: {install_command(extra)}")


def import_extra(module: str, extra: str, what: str) -> Any:
    """The module that `extra` installs. Raises PlaitError where it is missing or does not import."""
    check_extra(module, extra, what)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise PlaitError(
            f"{what} needs {package}, which does not import ({error}). Install it again: {install_command(extra)}"
        ) from error
