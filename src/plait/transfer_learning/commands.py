"""The command that says where it pays to go on from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.console import Bar, DeviceOption, app, out, plain


@app.command()
def transfer(
    source: Annotated[str, typer.Argument(help="A trained run to go on from.")],
    dataset: Annotated[str, typer.Argument(help="A prepared dataset with a column of labels.")],
    study: Annotated[Path, typer.Option("-o", "--out", help="The study's folder.")],
    labels: Annotated[str, typer.Option(help="Training records a label, with commas; all for all.")] = "1,10,100,all",
    ways: Annotated[str, typer.Option(help="What is compared, with commas.")] = "scratch,frozen,lora,full",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="The time of each run.")] = None,
    steps: Annotated[int | None, typer.Option(help="The steps of each run, instead of minutes.")] = None,
    read: Annotated[str | None, typer.Option(help="The column that is read; the first medium if left out.")] = None,
    column: Annotated[str | None, typer.Option(help="The column of labels; the one with fewest if left out.")] = None,
    old: Annotated[str | None, typer.Option(help="The source's own data, by which forgetting is measured.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A YAML file or a name of `plait recipes`; else the source's.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Test records, at most.")] = 1000,
    device: DeviceOption = "auto",
) -> None:
    """Compare beginning from nothing with going on from a trained model: frozen, low-rank, or all of it.

    The same command goes on where a study stopped.

    Example: plait transfer runs/fashion data/mnist -o runs/transfer --labels 1,10 --steps 200
    """
    from plait.core.config import load_recipe, parse_recipe
    from plait.core.files import read_json
    from plait.data.dataset import Dataset
    from plait.transfer_learning.study import News, Plan
    from plait.transfer_learning.study import transfer as compare

    facts = Path(source) / "run.json"
    budget = {"training": {"minutes": minutes, "steps": steps}}
    if recipe is None and facts.is_file():
        known = read_json(facts)["recipe"]
        known["model"]["init_from"] = None
        known["training"] |= {"minutes": minutes, "steps": steps, "replay": {}, "freeze": [], "lora": None}
        settings = parse_recipe(known, str(facts))
    else:
        settings = load_recipe(recipe, budget)
    plan = Plan(
        settings, tuple(part.strip() for part in labels.split(",")), seeds,
        tuple(part.strip() for part in ways.split(",")), column, read, limit, old, device,
    )  # fmt: skip
    with Bar() as bar:

        def tell(news: News) -> None:
            bar(news.stage, news.done, news.total, news.note)
            if news.line:
                out.print(plain(news.line))

        found = compare(source, Dataset.open(dataset), study, plan, tell)
    if found.get("as_it_is") is not None:
        out.print(f"The source as it is, without any of these records: {found['as_it_is']:.3f}")
    words = {True: "pays", False: "costs", None: "not told apart from scratch"}
    for verdict in found["verdicts"]:
        error = "" if verdict["standard_error"] is None else f" ± {verdict['standard_error'] * 100:.1f}"
        gain = f"{verdict['gain'] * 100:+.1f}{error} points"
        out.print(f"{verdict['labels']} a label, {verdict['way']}: {gain}, {words[verdict['pays']]}")
    out.print(f"All figures: {study / 'study.json'}\nReport: {study / 'report.html'}")
