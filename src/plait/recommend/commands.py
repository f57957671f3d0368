"""Commands of a model of histories: recommend, similar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from plait.console import DeviceOption, ModelArgument, app, err, out, plain

if TYPE_CHECKING:
    from plait.recommend.model import Recommendation, RecommendationModel

WhereOption = Annotated[
    str | None, typer.Option(help="A condition as in SQL: \"year >= 1990 and categories like '%War%'\".")
]
AddOption = Annotated[
    Path | None, typer.Option(help="A table of new items, which join without training, placed by what they are.")
]
CountOption = Annotated[int, typer.Option("-k", min=1, help="Items to show.")]


def _model(name: str, device: str, add: Path | None) -> RecommendationModel:
    from plait.core.dist import docs_page
    from plait.core.errors import PlaitError
    from plait.inference.model import load

    loaded = load(name, device)
    if "recommend" not in loaded.verbs:
        page = docs_page("how-to/recommending")
        raise PlaitError(f"{name} knows no items: recommending needs a run of histories: {page}")
    model = cast("RecommendationModel", loaded)
    if add is not None:
        before = len(model.catalogue)
        for row in model.add_items(add)[:10]:
            place = f"{row.file}, line {row.line}" if row.line else row.file
            err.print(f"[yellow]Note:[/yellow] {plain(f'{place}: {row.reason}')}")
        err.print(f"{len(model.catalogue) - before:,} items joined, placed by what they are.")
    return model


def show_recommendations(recommendations: list[Recommendation], measure: str, as_json: bool) -> None:
    """Print items, a row each; without titles where none is known."""
    if as_json:
        from dataclasses import asdict

        out.print_json(data=[asdict(one) for one in recommendations])
        return
    titled = any(one.title != one.id for one in recommendations)  # without titles, ids stand in their place
    rows: list[list[Any]] = [
        [str(n), one.id, one.title if titled else "", f"{one.probability:.4f}", ", ".join(one.categories),
         "; ".join(f"{title} (+{lost:.2f})" for title, lost in one.why)]
        for n, one in enumerate(recommendations, 1)
    ]  # fmt: skip
    heads = ["", "id", "title", measure, "categories", "because of"]
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    table = Table(*(heads[i] for i in kept), box=None, header_style="bold")
    for row in rows:
        table.add_row(*(plain(row[i]) for i in kept))
    out.print(table)


def _tell_quality(model: RecommendationModel) -> None:
    from plait.recommend.known_quality import describe_quality

    if quality := describe_quality(model.folder):
        err.print(plain(quality))


@app.command()
def recommend(
    model: ModelArgument,
    history: Annotated[
        str | None, typer.Option(help="Titles or ids with commas, oldest first. A title may have commas of its own.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="A user of the run's data, instead of a history.")] = None,
    k: CountOption = 10,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen/--include-seen", help="Leave out what the history has.")
    ] = True,
    where: WhereOption = None,
    diversity: Annotated[
        float, typer.Option(min=0, max=1, help="How much likelihood to give up for items unlike one another.")
    ] = 0.0,
    why: Annotated[bool, typer.Option("--why", help="Name the items of the history that moved each most.")] = False,
    add_items: AddOption = None,
    save: Annotated[
        Path | None, typer.Option(help="With --add-items: keep the grown catalogue, as a new folder to use as the run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Say what comes next after a history.

    Example: plait recommend runs/movielens --history "Toy Story (1995),Heat (1995)" --why
    """
    from plait.core.errors import PlaitError

    if save is not None and add_items is None:
        raise PlaitError("--save keeps a catalogue that grew: name the new items with --add-items.")
    keeps = save is not None and history is None and user is None  # and nothing else is asked for
    if (history is None) == (user is None) and not keeps:
        raise PlaitError('Name a history (--history "Title,Title") or a user of the data (--user 17), one of the two.')
    if save is not None and save.exists():
        raise PlaitError(f"{save} exists already. Name a new folder for the grown model.")
    loaded = _model(model, device, add_items)
    if save is not None:
        loaded.save_catalogue(save)
        err.print(f"Kept in {plain(str(save))}, which every command takes in the run's place.")
    if keeps:
        return
    if loaded.all_new(loaded.history(history, user)):
        err.print("[yellow]Note:[/yellow] All items of this history are new: what they are alone counts.")
    recommendations = loaded.recommend(
        history, user=user, k=k, exclude_seen=exclude_seen, where=where, diversity=diversity, why=why
    )
    show_recommendations(recommendations, "probability", as_json)
    _tell_quality(loaded)


@app.command()
def similar(
    model: ModelArgument,
    item: Annotated[str, typer.Argument(help="A title or an id.")],
    k: CountOption = 10,
    where: WhereOption = None,
    add_items: AddOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Find the items that are like one.

    Example: plait similar runs/movielens "Toy Story (1995)"
    """
    loaded = _model(model, device, add_items)
    show_recommendations(loaded.similar(item, k, where), "cosine", as_json)
    _tell_quality(loaded)
