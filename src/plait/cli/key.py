"""The command that makes an API key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.serve import check_serve_extra
from plait.console import app, out


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="Where hashes of keys are kept.")],
    name: Annotated[str, typer.Option(help="Whose key it is.")] = "default",
    rate: Annotated[int | None, typer.Option(min=1, max=9_999_999, help="Requests a minute.")] = None,
) -> None:
    """Make an API key: it is shown once, and only its hash is kept.

    Example: plait key keys.txt --name alice
    """
    check_serve_extra()
    from plait.server.limits import new_key

    out.print(new_key(file, name, rate))
