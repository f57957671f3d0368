"""Commands that say why a model answers as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.console import DeviceOption, ModelArgument, SeedOption, app, err, out, plain, write


@app.command()
def explain(
    model: ModelArgument,
    inputs: Annotated[list[str], typer.Argument(help="An image, a recording or a text; several are read together.")],
    answer: Annotated[
        str | None,
        typer.Option("--for", help="The answer to explain, or a file with --to; the model's own if left out."),
    ] = None,
    method: Annotated[str, typer.Option(help="occlusion, integrated-gradients or logit-lens.")] = "occlusion",
    to: Annotated[str, typer.Option(help="text, or what is made of a prompt: image, audio, or a column.")] = "text",
    column: Annotated[str | None, typer.Option(help="Answer in this column.")] = None,
    labels: Annotated[str | None, typer.Option(help="The answers to choose between, with commas.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, help="Of integrated gradients; as many as it takes if left out.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where to write: a file that ends in .html or .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the explanation as JSON.")] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Show how much each part of an input moved the answer, and whether that can be believed.

    Example: plait explain runs/demo runs/demo/files/images/0003.png --for three -o why.html
    """
    from plait.core.errors import PlaitError
    from plait.explain.report import STRONGEST, as_html, as_json_of, as_png
    from plait.inference.model import load
    from plait.modalities.inputs import media_or_text

    if target is not None and target.suffix.lower() not in (".html", ".png"):
        raise PlaitError(f"{target}: an explanation is written as .html or .png. Choose such a name with -o.")
    values = [media_or_text(value) for value in inputs]
    explanation = load(model, device).explain(
        values[0] if len(values) == 1 else values,
        media_or_text(answer) if answer and to != "text" else answer,
        to=to, column=column, labels=[label.strip() for label in labels.split(",")] if labels else None,
        method=method, steps=steps, seed=seed,
    )  # fmt: skip
    if target is not None:
        write(target, as_html(explanation).encode() if target.suffix.lower() == ".html" else as_png(explanation))
    shown = as_json_of(explanation)
    if as_json:
        out.print_json(data=shown)
        return
    for warning in explanation.warnings:
        err.print(f"[yellow]Note:[/yellow] {plain(warning)}")
    out.print(
        plain(
            f"{explanation.answer}: {explanation.measure} {explanation.score:.3f}, probability {explanation.chance:.3f}"
        )
    )
    for part in shown["parts"]:
        strongest = ", ".join(f"{unit['where']} ({unit['weight']:+.3f})" for unit in part["strongest"][:STRONGEST])
        out.print(plain(f"{part['kind']}: {strongest or 'no unit speaks for the answer'}"))
    for name, lost in explanation.lost.items():
        out.print(plain(f"without {name}: {lost:+.3f} lost"))
    for layer in explanation.layers:
        text, chance = layer["likeliest"][0]
        own = f"{layer['chance']:.4f}, rank {layer['rank']}"
        out.print(plain(f"layer {layer['layer']}: the answer {own}; likeliest {text!r} {chance:.3f}"))
    if explanation.areas is not None:
        out.print(
            f"deletion {explanation.areas.deletion:.3f}, insertion {explanation.areas.insertion:.3f}; better than "
            f"{explanation.areas.random_maps_beaten} of {len(explanation.areas.random_deletion)} random maps"
        )
    if explanation.gap is not None:
        out.print(f"completeness gap {explanation.gap:.2%} at {explanation.steps} steps")
    if target is not None:
        out.print(f"Written: {target}")
