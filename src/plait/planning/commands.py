"""The command that tells what training costs before it begins."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from plait.console import SeedOption, app, err, out, plain


@app.command()
def plan(
    source: Annotated[
        str | None, typer.Argument(help="A recipe, a run, a folder with a config.json, or a GGUF file.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A network known by name: tiny, gpt3-175b, llama3-405b, ...")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="here, or a GPU that `plait plan` knows: h100, a100, ...")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="So many of them.")] = 1,
    price: Annotated[float | None, typer.Option(min=0, help="Of a device and hour, in your money.")] = None,
    data_tokens: Annotated[float | None, typer.Option(min=1, help="Tokens to train on.")] = None,
    utilisation: Annotated[
        float | None, typer.Option(min=0, help="Model FLOPs, as a share of the peak; else .4.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0, help="Instead: TFLOP/s that a device reaches, recomputation counted.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences a device holds at a time.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens a sequence; else the context.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="Only this one: one, ddp, fsdp, tensor, sequence, sequence+fsdp.")
    ] = None,
    activation_checkpointing: Annotated[str, typer.Option(help="none, selective (attention scores) or full.")] = "none",
    lora: Annotated[
        int | None, typer.Option(min=1, help="Train low-rank updates of this rank alone; else what the recipe says.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="For the best size: FLOPs (1e22), days (10d), money ($50000).")
    ] = None,
    failures: Annotated[bool, typer.Option("--failures", help="Simulate the run on machines that fail.")] = False,
    mtbf: Annotated[float | None, typer.Option(min=0, help="Hours between the failures of one machine.")] = None,
    machines: Annotated[int | None, typer.Option(min=1, help="Machines; else one for 8 devices.")] = None,
    interruptions: Annotated[
        float | None, typer.Option(min=0, help="Instead of --mtbf: of the whole system ...")
    ] = None,
    in_days: Annotated[float | None, typer.Option(min=0, help="... in so many days.")] = None,
    save_seconds: Annotated[float, typer.Option(min=0.001, help="That a checkpoint stops the work.")] = 30.0,
    restart_minutes: Annotated[float, typer.Option(min=0, help="From a failure until work goes on.")] = 10.0,
    every: Annotated[float | None, typer.Option(min=0.001, help="Minutes between checkpoints; else the best.")] = None,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Foresee what a model weighs, where it fits, and what training it costs.

    Example: plait plan --preset gpt3-175b --gpus 1024 --gpu h100 --price 3
    """
    from plait.planning.api import plan as make_plan

    planned = make_plan(
        source, preset=preset, gpu=gpu, gpus=gpus, price=price, data_tokens=data_tokens, utilisation=utilisation,
        tflops=tflops, batch=batch, length=length, layout=layout, activation_checkpointing=activation_checkpointing,
        lora=lora, budget=budget, failures=failures, mtbf=mtbf, machines=machines, interruptions=interruptions,
        in_days=in_days, save_seconds=save_seconds, restart_minutes=restart_minutes, every=every, seed=seed,
    )  # fmt: skip
    if as_json:
        out.print_json(data=planned.to_dict())
        return
    for warning in planned.warnings:
        err.print(f"[yellow]Note:[/yellow] {plain(warning)}")
    for sheet in planned.sheets():
        out.print(f"\n[bold]{plain(sheet.title)}[/bold]")
        table = Table(*sheet.heads, box=None, show_header=bool(sheet.heads), header_style="bold")
        for row in sheet.rows:
            table.add_row(*map(plain, row))
        out.print(table)
