"""The command that offers models to assistants, over the Model Context Protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import plait
from plait.console import DeviceOption, PrecisionOption, app
from plait.core.errors import PlaitError


@app.command()
def mcp(
    models: Annotated[list[str], typer.Argument(help="Runs, Hugging Face names or indexes; NAME=MODEL renames.")],
    folder: Annotated[
        list[Path] | None, typer.Option(help="A folder whose files may be read; none are read elsewhere.")
    ] = None,
    http: Annotated[bool, typer.Option("--http", help="Over HTTP, at /mcp; else over standard input.")] = False,
    host: Annotated[str, typer.Option(help="The address; one off loopback needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8001,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys that `plait key` made; every request needs one.")
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name that this server answers for.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A web page's origin that may call.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Offer models and indexes to assistants as tools: classify, decide, search, transcribe, caption, generate.

    Example: plait mcp runs/demo photos.index --folder photos
    """
    from plait.cli.serve import check_serve_extra
    from plait.core.dist import check_extra

    check_extra("mcp", "mcp", "The Model Context Protocol")
    if http:
        check_serve_extra()
    from plait.server.mcp import Toolbox, build_server

    for one in folder or []:
        if not one.expanduser().is_dir():
            raise PlaitError(f"--folder {one} is no folder.")
    loaded: dict[str, Any] = {}
    indexes: dict[str, Any] = {}
    for option in models:
        name, _, path = option.rpartition("=") if "=" in option and not Path(option).exists() else ("", "", option)
        name = name or Path(path).name
        if name in loaded or name in indexes:
            raise PlaitError(f"Two have the name '{name}'. Give one another: other={path}")
        if _is_index(path):
            from plait.search.index import Index

            indexes[name] = Index(path, device=device)
            _ = indexes[name].model  # so that a missing one is told now
        else:
            loaded[name] = plait.load(path, device, precision)
    toolbox = Toolbox(loaded, indexes, list(folder or []))
    try:
        server = build_server(toolbox)
        if http:
            from plait.server.app import serve_mcp

            serve_mcp(server, host, port, api_key_file, allow_host or [], allow_origin or [], _tell)
        else:
            server.run("stdio")
    finally:
        toolbox.close()


def _tell(url: str) -> None:
    from plait.console import out

    out.print(f"Serving at {url}/mcp (Ctrl-C stops)")


def _is_index(path: str) -> bool:
    """Whether a folder is an index of `plait index`."""
    folder = Path(path).expanduser()
    return folder.is_dir() and any(entry.name.endswith(".lance") for entry in folder.iterdir())
