"""Commands that find: indexes of images, audio clips and texts, and search in them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from plait.console import DeviceOption, app, err, out, plain, write
from plait.core.progress import ProgressBar

index_app = typer.Typer(
    no_args_is_help=True,
    help="Make and keep indexes of images, audio clips and texts.\n\n"
    "Example: plait index add photos.index photos/ --model runs/photos",
)
app.add_typer(index_app, name="index", rich_help_panel="Use a model")
IndexArgument = Annotated[str, typer.Argument(help="The index: a folder, or the URL of an object store.")]
ModelOption = Annotated[str | None, typer.Option(help="A run, a checkpoint or a Hugging Face name.")]
WhereOption = Annotated[str | None, typer.Option(help="An SQL condition on columns, as \"kind = 'image'\".")]


@index_app.command()
def add(
    index: IndexArgument,
    sources: Annotated[list[str], typer.Argument(help="Prepared datasets, files, folders, tables or archives.")],
    model: Annotated[
        str | None, typer.Option(help="A run, a checkpoint or a Hugging Face name; an index knows its own.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Take these columns, with commas; else all media, or texts where there are none.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: the workers of a Ray cluster embed.")] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Of a Ray cluster; as many as it has processors.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Add files or datasets to an index; what is there already and has not changed is passed over.

    Stopped or killed at any moment, the same command goes on from there; at most the last 15 seconds, or 1,024
    entries, are embedded again.

    Example: plait index add photos.index photos/ --model runs/photos
    """
    from plait.search.index import Index

    opened = Index(index, model, device)
    column_names = [name.strip() for name in columns.split(",")] if columns else None
    with ProgressBar(True) as bar:
        added = opened.add(sources, column_names, bar, engine, workers)
    out.print(f"{added.new} added, {added.changed} changed, {added.same} as before; {len(opened)} in {plain(index)}.")
    for one in added.rejected[:20]:
        place = f"{one.file}:{one.line}" if one.line is not None else one.file
        err.print(f"[yellow]Not added:[/yellow] {plain(place)}: {plain(one.reason)}")
    if len(added.rejected) > 20:
        err.print(f"... and {len(added.rejected) - 20} more.")
    if "://" not in index and added.rejected:
        lines = [json.dumps(one.row, ensure_ascii=False) + "\n" for one in added.rejected]
        write(Path(index) / "rejects.jsonl", "".join(lines).encode())
        err.print(f"What was not added, and why: {plain(index)}/rejects.jsonl")


@index_app.command()
def delete(
    index: IndexArgument,
    where: Annotated[str, typer.Option(help="An SQL condition on columns, as \"source LIKE 'old/%'\".")],
) -> None:
    """Delete entries of an index. The files that they were made from are not touched.

    Example: plait index delete photos.index --where "source LIKE 'old/%'"
    """
    from plait.search.index import Index

    opened = Index(index)
    out.print(f"{opened.delete(where)} deleted; {len(opened)} in {plain(index)}.")


@index_app.command()
def compact(index: IndexArgument) -> None:
    """Join an index's small files, index its words and vectors anew, and free what was deleted.

    Example: plait index compact photos.index
    """
    from plait.search.index import Index

    opened = Index(index)
    with ProgressBar(True) as bar:
        opened.compact(bar)
    out.print(f"{len(opened)} in {plain(index)}.")


@index_app.command()
def verify(index: IndexArgument) -> None:
    """Compare every file and entry of an index with its checksum; exit code 1 where one is damaged.

    Example: plait index verify photos.index
    """
    from plait.search.index import Index

    opened = Index(index)
    wrong = opened.verify()
    for line in wrong:
        out.print(f"[red]{plain(line)}[/red]")
    if wrong:
        sys.exit(1)
    out.print(f"{len(opened)} entries, all whole, made by {plain(str(opened.metadata['model']))}.")


@app.command()
def search(
    index: IndexArgument,
    query: Annotated[str, typer.Argument(help="Words, or an image or audio file.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Results.")] = 10,
    where: WhereOption = None,
    by: Annotated[
        str,
        typer.Option(help="vector, words (full text), hybrid (both), or auto: hybrid for words where there are texts."),
    ] = "auto",
    least: Annotated[
        str | None,
        typer.Option(help="Leave out what is less similar: a number, or auto for what is as near as the unrelated."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The index's model, where it has been moved.")] = None,
    out_file: Annotated[
        Path | None, typer.Option("-o", "--out", help="The results as an image (.png) or a page (.html).")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the results in the browser.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Find images, audio clips and texts by words, by an image or by an audio clip.

    Example: plait search photos.index "a red boat" -k 12 --open
    """
    from plait.core.errors import PlaitError
    from plait.search.contact_sheet import results_page, results_sheet
    from plait.search.index import Index

    if out_file is not None and out_file.suffix.lower() not in (".png", ".html"):
        raise PlaitError(f"Results are written as .png or .html, not as {out_file.name}.")
    try:
        cut = "auto" if least == "auto" else None if least is None else float(least)
    except ValueError:
        raise PlaitError(f"--least is a number or auto, not '{least}'.") from None
    hits = Index(index, model, device).search(query, k, where, by, cut)  # type: ignore[arg-type]
    if not hits:
        out.print("Nothing was found." + (" Widen --where." if where else " Lower --least." if least else ""))
    table = Table("", "similarity", "kind", "what", "from", box=None, header_style="bold")
    table.columns[-1].overflow = "fold"
    for rank, hit in enumerate(hits, 1):
        near = "" if hit.similarity != hit.similarity else f"{hit.similarity:.3f}"
        text = " ".join((hit.text or "").split())
        time = "" if hit.start is None or hit.stop is None else f" at {hit.start:.1f} to {hit.stop:.1f} s"
        table.add_row(
            str(rank), near, hit.kind, plain(text[:60] + ("…" if len(text) > 60 else "")), plain(hit.source + time)
        )
    if hits:
        out.print(table)
    if open_ and out_file is None:
        out_file = Path("search.html")
    if out_file is not None:
        html = out_file.suffix.lower() == ".html"
        write(out_file, results_page(query, index, hits).encode() if html else results_sheet(hits))
        out.print(f"Written: {out_file}")
    if open_ and out_file is not None:
        typer.launch(str(out_file.resolve()))
