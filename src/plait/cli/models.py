"""The command that lists the pretrained models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import plait
from plait.console import app, out, plain


@app.command()
def models(
    folders: Annotated[
        list[Path] | None, typer.Option("--models", help="A model, or a folder of models, to list too.")
    ] = None,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Look in the Hugging Face cache.")] = True,
) -> None:
    """List the pretrained models on this machine: size, memory, licence, and what can be done with each. Nothing is
    downloaded.

    Example: plait models --models ~/models
    """
    local_models = plait.models(folders or [], cache)
    if not local_models:
        out.print(
            "No model lies here. Name a folder of models (plait models --models DIR), or fetch one, then name it:\n"
            "  texts            hf download sentence-transformers/all-MiniLM-L6-v2\n"
            "  images           hf download openai/clip-vit-base-patch32\n"
            "  speech           hf download openai/whisper-base\n"
            "  chat, captions   hf download Qwen/Qwen3-0.6B"
        )
        return
    table = Table("model", "type", "on disk", "16 bit", "int8", "licence", "for")
    for one in local_models:
        sizes = (f"{size / 1e9:.2f} GB" for size in (one.bytes, one.memory(16), one.memory(8.5)))
        table.add_row(
            plain(one.name),
            one.model_type,
            *sizes,
            plain(one.licence or "not said"),
            ", ".join(one.verbs) or "nothing here",
        )
    out.print(table)
