"""The command that shows the table of sizes."""

from __future__ import annotations

from rich.table import Table

from plait.console import app, out


@app.command()
def sizes() -> None:
    """Show what each --size stands for.

    Example: plait sizes
    """
    from plait.training.build import size_table

    rows = size_table()
    table = Table("size", *rows, box=None, header_style="bold")
    for name in next(iter(rows.values())):
        table.add_row(name, *(values[name] for values in rows.values()))
    out.print(table)
