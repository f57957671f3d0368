"""What the commands share: the application, consoles, kinds of options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint

if TYPE_CHECKING:
    from plait.data.dataset import Manifest
    from plait.inference.base import Model


app = typer.Typer(
    name="plait",
    help="One model that reads and writes text, images and audio from your own files.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# On a pipe, lines are as long as they are.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)
err = Console(stderr=True, highlight=False, soft_wrap=True)


# Where a model's files are that is no local path: a feature adds it, and it imports no torch.
MODEL_FINDERS: ExtensionPoint[Callable[[str], Path]] = ExtensionPoint("model_finder")


def found_model(name: str | None) -> str | None:
    """The name of a model that is there. Raises PlaitError, before torch is imported, where neither a path, the Hugging
    Face cache nor the hub has it."""
    if name is not None and not Path(name).expanduser().exists():
        if Path(name).parts[:1] == ("runs",):  # as the docs call their folders
            raise PlaitError(f"{name} does not exist. Check the path; `plait train` writes runs.")
        MODEL_FINDERS.one()(name)
    return name


def found_models(names: list[str] | None) -> list[str] | None:
    """As `found_model`, for the models that a server is given: MODEL or NAME=MODEL."""
    for name in names or ():
        found_model(name if Path(name).expanduser().exists() else name.partition("=")[2] or name)
    return names


ModelArgument = Annotated[
    str, typer.Argument(callback=found_model, help="A run, a checkpoint, or a Hugging Face name or folder.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
PrecisionOption = Annotated[
    str,
    typer.Option(help="auto, fp32, bf16; on a processor also fp16, int8, int5, int4: weights kept so, in less memory."),
]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]
RunArgument = Annotated[Path, typer.Argument(help="A run's folder.")]


def plain(text: str) -> str:
    """Text that rich shows as it is."""
    return text.replace("[", "\\[")


def show_manifest(manifest: Manifest, folder: str | Path) -> None:
    """Print what a dataset holds: its columns, counts, warnings and where it lies."""
    table = Table("column", "what", "records", "length", box=None, header_style="bold")
    for name, kind in manifest.columns.items():
        lengths = manifest.statistics.get(name)
        if lengths is not None:
            span = f"{lengths.min:.4g} to {lengths.max:.4g} {lengths.unit}"
            table.add_row(name, kind, str(lengths.records), span)
    out.print(table)
    counts = ", ".join(f"{split} {count}" for split, count in manifest.counts.items())
    if manifest.kind != "records":
        out.print(f"{manifest.unit.capitalize()}: {counts}. Rejected: {manifest.rejected}.")
        for note in (*manifest.split_notes, *manifest.notes):
            out.print(f"  {plain(note)}")
    else:
        overlap = "".join(f"; {pair} overlap {count}" for pair, count in manifest.overlap.items() if count)
        near = "".join(f"; {pair} near-duplicates {count}" for pair, count in manifest.near_duplicates.items())
        doubles = f"Exact duplicates: {manifest.duplicates}{overlap}{near}."
        out.print(f"Records: {counts}. Rejected: {manifest.rejected}. {doubles}")
    if manifest.groups:
        out.print(plain(f"Groups by {manifest.group_by}, each in one split: {manifest.groups_told}."))
    for warning in manifest.warnings:
        out.print(f"[yellow]Note:[/yellow] {plain(warning)}")
    if manifest.rejected:
        out.print(f"What was rejected, and why: {folder}/rejects.jsonl")
    out.print(f"Report: {folder}/report.html")


def existing(path: Path) -> Path:
    """The path of a file. Raises PlaitError where there is none."""
    if not path.is_file():
        from plait.core.errors import PlaitError

        raise PlaitError(f"{path} does not exist.")
    return path


def note_windows(model: Model, value: str | Path) -> None:
    """Say so where an audio clip is longer than the model reads at once."""
    if isinstance(value, Path) and (count := model.window_count(value)) > 1:
        text = f"{value} is longer than this model reads at once; it is read in {count} windows that overlap by half."
        err.print(f"[yellow]Note:[/yellow] {plain(text)}")


def write(path: Path, data: bytes) -> None:
    """Write a file that a command was asked for. Raises PlaitError where that fails."""
    from plait.core.errors import PlaitError

    try:
        path.write_bytes(data)
    except OSError as error:
        raise PlaitError(f"Cannot write {path}: {error.strerror}. Choose another file with -o.") from error


def show_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Print figures, by the names that `metrics.json` has, with their 95 % intervals, chance and baseline."""
    rows = []
    for name, metric in metrics.items():
        value, low, high, chance, baseline = (
            _shown(metric.get(key)) for key in ("value", "low", "high", "chance", "baseline")
        )
        count = "" if metric["n"] is None else f"{metric['n']:,}"
        rows.append((name, value, f"{low} to {high}" if low else "", chance, baseline, count))
    print_table(("figure", "value", "95 %", "chance", "baseline", "n"), rows)


def print_table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of cells under a heading, each column as wide as its longest cell."""
    table = Table(*heading, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(plain, row))
    for place, column in enumerate(table.columns):
        column.no_wrap, column.min_width = True, max((len(row[place]) for row in rows), default=0)
    out.print(table)


def _shown(value: float | None) -> str:
    return "" if value is None or value != value else f"{round(value, 9):.3g}"
