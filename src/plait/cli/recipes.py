"""The command recipes: what comes with Plait, by name."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from plait.console import app, out, plain


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe's YAML, to start one of your own.")] = None,
) -> None:
    """List the recipes that `--recipe NAME` knows, or print one.

    Example: plait recipes chat > mine.yaml
    """
    from plait.core.recipes import describe_recipe, find_recipe, packaged_recipes

    if name is not None:
        typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    table = Table("recipe", "for", box=None, header_style="bold")
    for known in packaged_recipes():
        table.add_row(known, plain(describe_recipe(known)))
    out.print(table)
    out.print("Use one: plait train FOLDER -o RUN --recipe NAME")
