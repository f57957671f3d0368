"""The command that serves models over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.console import DeviceOption, PrecisionOption, app, found_models, out


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Argument(callback=found_models, help="Runs, checkpoints or Hugging Face names; NAME=MODEL renames."),
    ],
    host: Annotated[str, typer.Option(help="The address; one off loopback needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys that `plait key` made; every request needs one.")
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name that this server answers for.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A web page's origin that may call.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Samples written at once, a model.")] = 64,
    queue: Annotated[int, typer.Option(min=0, help="Samples that may wait for a place in a model's batch.")] = 64,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="The longest that a request may take.")] = 120.0,
    read_seconds: Annotated[float, typer.Option(min=0.5, help="The longest that a client may stand still.")] = 10.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="What open requests have left at SIGTERM.")] = 10.0,
    precision: PrecisionOption = "auto",
    index: Annotated[
        list[str] | None, typer.Option(help="An index to search in, made by one of the models; NAME=INDEX renames.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(help="NAME=MODEL: a further name of a model.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: the first model with an adapter (PEFT's, or of a LoRA run), in the same batch."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse fields that have no effect.")] = False,
    ui: Annotated[bool, typer.Option("--ui", help="A page to try the models in, at /.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Serve models over HTTP, in the shapes of OpenAI's API.

    Example: plait serve runs/demo --port 8000
    """
    from plait.core.dist import check_extra

    check_serve_extra()
    if ui:
        check_extra("jinja2", "studio", "--ui")
    if index:
        check_extra("lancedb", "search", "--index")
    from plait.core.device import choose_device
    from plait.kernels.generation import backend_name
    from plait.server.app import Limits
    from plait.server.app import serve as run

    page: Any = None
    if ui:
        from plait.studio.served import ServedPage

        page = ServedPage
    limits = Limits(
        batch=batch,
        queue=queue,
        request_seconds=request_seconds,
        read_seconds=read_seconds,
        drain_seconds=drain_seconds,
    )
    run(
        models, host, port, key_file=api_key_file, allow_hosts=allow_host, allow_origins=allow_origin, device=device,
        precision=precision, resources={"search": index} if index else {}, page=page, aliases=alias, strict=strict,
        adapters=adapter,
        limits=limits,
        announce=lambda url: out.print(
            f"Serving at {url}/v1 {f'with a page at {url} ' if ui else ''}(Ctrl-C stops)\n"
            f"A step of generation: {backend_name(choose_device(device, precision))}"
        ),
    )  # fmt: skip


def check_serve_extra() -> None:
    """Raise PlaitError with the line to type where a package of the extra is missing."""
    from plait.core.dist import check_extra

    for module in ("fastapi", "uvicorn", "httptools", "multipart", "prometheus_client"):
        check_extra(module, "serve", "The server")
