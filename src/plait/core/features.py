"""Features: folders of this package that add to it, and that nothing below them knows by name.

A folder with a file `feature.py` is a feature. The file holds `FEATURE`, which says what the folder adds, as
"module:attribute". Those names are imported when they are first needed, so that `plait --help` loads no model code.

A lower layer that can be added to declares an `ExtensionPoint` with the interface that it expects, and asks it for what
there is: `DATA_KINDS.all()`. So imports run downward, and a feature is written, moved or deleted in one folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True)
class Feature:
    """What a folder adds.

    Attributes:
        name: The folder's name.
        commands: The module whose import registers commands with `plait.console.app`; None for none.
        panel: The heading of `plait --help` under which they stand.
        adds: Name of an extension point -> "module:attribute", which satisfies the point's interface.
    """

    name: str
    commands: str | None = None
    panel: str = ""
    adds: Mapping[str, str] = field(default_factory=dict)


@cache
def features() -> tuple[Feature, ...]:
    """All features of this installation, by name."""
    package = import_module("plait")
    folders = sorted(path.parent.name for place in package.__path__ for path in Path(place).glob("*/feature.py"))
    return tuple(import_module(f"plait.{name}.feature").FEATURE for name in folders)


class ExtensionPoint(Generic[T]):
    """A place where features add objects of one interface T.

    The interface is a Protocol or a Callable, declared in the module that owns the point.
    """

    declared: ClassVar[dict[str, ExtensionPoint[Any]]] = {}  # those whose modules were imported, by name

    def __init__(self, name: str) -> None:
        self.name = name
        self.declared[name] = self
        self._objects: dict[str, T] | None = None

    def by_feature(self) -> dict[str, T]:
        """Name of a feature -> what it adds here, imported at the first call."""
        if self._objects is None:
            entries = {feature.name: feature.adds[self.name] for feature in features() if self.name in feature.adds}
            self._objects = {name: _imported(entry) for name, entry in entries.items()}
        return self._objects

    def all(self) -> list[T]:
        """What all features add here, in the order of their names."""
        return list(self.by_feature().values())

    def one(self) -> T:
        """What the only feature adds here. Raises LookupError where there is not exactly one."""
        added = self.all()
        if len(added) != 1:
            raise LookupError(f"{len(added)} features add '{self.name}'; exactly one must.")
        return added[0]


def _imported(entry: str) -> Any:
    module, _, attribute = entry.partition(":")
    return cast(Any, getattr(import_module(module), attribute))
