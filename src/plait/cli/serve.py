"""Commands of the server: serve, key."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from plait.cli.common import DeviceOption, app, out


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(help="Runs, checkpoints or Hugging Face names; NAME=MODEL renames.")],
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
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    index: Annotated[
        list[str] | None, typer.Option(help="An index to search in, made by one of the models; NAME=INDEX renames.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(help="NAME=MODEL: a further name of a model.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse fields that have no effect.")] = False,
    ui: Annotated[bool, typer.Option("--ui", help="A page to try the models in, at /.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Serve models over HTTP, in the shapes of OpenAI's API.

    Example: plait serve runs/demo --port 8000
    """
    try:
        from plait.server.app import Limits
        from plait.server.app import serve as run
    except ModuleNotFoundError as error:
        from plait.core.errors import PlaitError

        raise PlaitError(f"Serving needs {error.name}. Run: pip install 'plait[serve]'.") from None
    from plait.core.device import choose_device
    from plait.kernels.generation import backend_name

    if ui and importlib.util.find_spec("gradio") is None:
        from plait.core.errors import PlaitError

        raise PlaitError("The page needs gradio. Run: pip install 'plait[ui]', or leave --ui out.")

    limits = Limits(
        batch=batch,
        queue=queue,
        request_seconds=request_seconds,
        read_seconds=read_seconds,
        drain_seconds=drain_seconds,
    )
    run(
        models, host, port, key_file=api_key_file, allow_hosts=allow_host, allow_origins=allow_origin, device=device,
        precision=precision, indexes=index, ui=ui, aliases=alias, strict=strict, limits=limits,
        tell=lambda url: out.print(
            f"Serving at {url}/v1 {f'with a page at {url} ' if ui else ''}(Ctrl-C stops)\n"
            f"A step of generation: {backend_name(choose_device(device, precision))}"
        ),
    )  # fmt: skip


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="Where hashes of keys are kept.")],
    name: Annotated[str, typer.Option(help="Whose key it is.")] = "default",
    rate: Annotated[int | None, typer.Option(min=1, max=9_999_999, help="Requests a minute.")] = None,
) -> None:
    """Make an API key: it is shown once, and only its hash is kept.

    Example: plait key keys.txt --name alice
    """
    from plait.server.limits import new_key

    out.print(new_key(file, name, rate))
