"""Three examples to begin with, made on the spot: digits, questions with answers, films."""

from __future__ import annotations

from plait.core.errors import PlaitError
from plait.data.examples import examples, write_example
from plait.studio.workspace import Project, Workspace


def offered() -> dict[str, str]:
    """Name on the first page -> name of `plait example`."""
    return {example.offered: example.name for example in examples().values() if example.offered is not None}


def make(workspace: Workspace, name: str) -> Project:
    """A new project with an example's files. Raises PlaitError for a name that is none."""
    listed = offered()
    if name not in listed:
        raise PlaitError(f"There is no example '{name}'. There are {', '.join(listed)}.")
    project = workspace.create(workspace.free_name(name))
    write_example(listed[name], project.uploads)
    return project
