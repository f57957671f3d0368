"""The command `plait studio`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from plait.console import app, out


@app.command()
def studio(
    folder: Annotated[Path, typer.Argument(help="The workspace: a folder of projects.")] = Path("studio"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
    open_browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Train and use models in a browser: files in, a verdict out, no further command.

    Example: plait studio my-projects
    """
    from plait.core.dist import check_extra

    for module in ("fastapi", "uvicorn", "jinja2"):
        check_extra(module, "studio", "plait studio")
    from plait.studio.app import serve

    def tell(address: str) -> None:
        place = folder.expanduser().absolute()
        out.print(f"The studio is at {address}")
        out.print(f"Its files are in {place}. Ctrl-C stops it; a training goes on.")
        if open_browser:
            webbrowser.open(address)

    serve(folder, port, tell)
