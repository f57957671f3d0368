"""Three examples to begin with, made on the spot: digits, questions with answers, films."""

from __future__ import annotations

from plait.core.errors import PlaitError
from plait.data.examples import write_example
from plait.studio.workspace import Project, Workspace

EXAMPLES = {"digits": "digits", "questions": "replies", "films": "histories"}  # of the start page -> of `plait example`


def make(workspace: Workspace, name: str) -> Project:
    """A new project with an example's files. Raises PlaitError for a name that is none."""
    if name not in EXAMPLES:
        raise PlaitError(f"There is no example '{name}'. There are {', '.join(EXAMPLES)}.")
    project = workspace.create(workspace.free_name(name))
    write_example(EXAMPLES[name], project.uploads)
    return project
