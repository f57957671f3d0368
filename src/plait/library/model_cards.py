"""The card of a run: its data and splits, how it was trained, its figures, its limits, and licences. It lies in the
run's `README.md`, written anew by training and by an evaluation on test, and goes along with every export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError
from plait.core.files import read_json, write_atomic
from plait.data.dataset import Manifest
from plait.data.stores import read_place
from plait.evaluation.keys import Metrics
from plait.reports.metric_labels import headline_keys
from plait.training.parts import describe_parts

CARD = "README.md"
MOST_LABELS = 30  # that are listed with their counts


def write_card(run: Path, metrics: Metrics | None = None) -> None:
    """Write the card of a run; `metrics` are of its own test records, None where they were not asked about yet."""
    metadata = read_json(run / "run.json")
    manifest = _manifest(run, metadata)
    sections = [
        f"# {run.resolve().name}: a model made by Plait",
        "Made by `plait train` from its owner's files. Written anew by `plait train` and `plait evaluate`.",
        *_data(manifest),
        *_training(metadata),
        *_figures(run, metrics),
        *_limits(manifest),
        *_licences(metadata),
    ]
    write_atomic(run / CARD, "---\nlibrary_name: plait\n---\n" + "\n\n".join(sections) + "\n")


def read_card(folder: Path | None) -> str:
    """The card of the run that a checkpoint's folder lies in, without its heading of keys; "" where there is none."""
    places = [folder, *folder.resolve().parents][:4] if folder else []
    run = next((place for place in places if (place / "run.json").is_file() and (place / CARD).is_file()), None)
    if run is None:
        return ""
    return (run / CARD).read_text(encoding="utf-8").removeprefix("---\nlibrary_name: plait\n---\n")


def _manifest(run: Path, metadata: Mapping[str, Any]) -> Manifest | None:
    """What the run's dataset holds; None where it is not there any more."""
    place = read_place(metadata["dataset"], run) if "dataset" in metadata else None
    if not isinstance(place, Path) or not (place / "manifest.json").is_file():
        return None
    try:
        return Manifest.model_validate(read_json(place / "manifest.json"))
    except (PlaitError, ValueError):
        return None


def _data(manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return ["## Data", "The dataset was not at hand when this was written."]
    counts = ", ".join(f"{split} {count:,}" for split, count in manifest.counts.items())
    columns = ", ".join(f"`{name}` ({kind})" for name, kind in manifest.columns.items())
    facts = [
        f"* From `{manifest.source.rstrip('/').rpartition('/')[2]}`: {sum(manifest.counts.values()):,} {manifest.unit} "
        f"with the columns {columns}.",
        f"* Splits: {counts}.",
    ]
    facts += [f"* {note[:1].upper()}{note[1:]}." for note in manifest.split_notes]
    if manifest.groups:
        facts.append(f"* Groups by {manifest.group_by}, each in one split: {manifest.groups_told}.")
    for name, lengths in manifest.statistics.items():
        if lengths.classes:
            shown = ", ".join(f"{label} {count:,}" for label, count in list(lengths.classes.items())[:MOST_LABELS])
            more = len(lengths.classes) - MOST_LABELS
            facts.append(f"* Labels of `{name}`: {shown}{f', and {more} more' if more > 0 else ''}.")
    if manifest.rejected:
        facts.append(f"* {manifest.rejected:,} files or rows could not be used.")
    near = sum(manifest.near_duplicates.values()) + sum(manifest.overlap.values())
    if near:
        facts.append(f"* {near:,} records are equal or nearly so to others, across splits or within them.")
    return ["## Data", "\n".join(facts)]


def _training(metadata: Mapping[str, Any]) -> list[str]:
    training = metadata["recipe"]["training"]
    facts = [f"* Task: {training['task']}; size {metadata.get('size')}; seed {metadata.get('seed')}."]
    if "steps" in metadata:
        last = (metadata.get("revisions") or [metadata])[-1]["steps"]
        parts = describe_parts(metadata)
        facts.append(f"* {last:,} steps" + (f" ({parts}, a schedule each)." if parts else "."))
    where = f"* On {metadata.get('device')} with {metadata.get('threads')} threads"
    computing = metadata.get("computing") or {}
    facts.append(where + (f", instructions {computing['instructions']}." if "instructions" in computing else "."))
    return ["## Training", "\n".join(facts)]


def _figures(run: Path, metrics: Metrics | None) -> list[str]:
    lines = []
    file = run / "checkpoints" / "best" / "classifiers.json"
    if file.is_file():
        for entry in read_json(file)["classifiers"]:
            mixed = entry["measured"].get("mixed")
            if mixed is not None and entry["records"]:
                lines.append(
                    f"On {entry['records']:,} validation records, by which it was also chosen and calibrated (rather "
                    f"too high: believe what was measured, below): {entry['target']} from {entry['source']} "
                    f"{mixed:.1%} right (always the most frequent label: {entry['guess']:.1%})."
                )
    keys = headline_keys(metrics) if metrics else []
    if metrics and keys:
        rows = ["| measured | value | 95 % | chance | simple | n |", "| --- | ---: | --- | ---: | ---: | ---: |"]
        for key in keys:
            one = metrics[key]
            low, high = one.get("low"), one.get("high")
            interval = f"{low:.3g} to {high:.3g}" if low is not None and high is not None else ""
            cells = [_number(one.get(name)) for name in ("value", "chance", "baseline")]
            rows.append(f"| {key} | {cells[0]} | {interval} | {cells[1]} | {cells[2]} | {one.get('n') or ''} |")
        lines.append("\n".join(rows))
    else:
        lines.append("Test records were not asked about yet: `plait evaluate`.")
    return ["## Figures", "\n\n".join(lines)]


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3g}"


def _limits(manifest: Manifest | None) -> list[str]:
    limits = [
        "It knows what its data held and nothing more; inputs of another kind (another camera, other voices, another "
        "language) will be answered less well than the figures say.",
        "A probability is calibrated on val, which is like train. Where `none_of_these` is true, nothing is named.",
        "Images, audio clips and texts that it makes are machine-made.",
    ]
    if manifest is not None and not manifest.groups and not manifest.own_splits and manifest.kind == "records":
        limits.append(
            "Splits are at random: where several records are of one person or place, figures are of known ones."
        )
    return ["## Limits", "\n".join(f"* {limit}" for limit in limits)]


def _licences(metadata: Mapping[str, Any]) -> list[str]:
    lines = ["* Data: those of their owner; what may be done with the model depends on them."]
    model = metadata["recipe"]["model"]
    bases = [model.get("init_from"), *((model.get(kind) or {}).get("encoder") for kind in ("image", "audio", "video"))]
    for base in filter(None, bases):
        licence = _licence(base) or "its licence applies; its files here name none"
        lines.append(f"* `{_shown_name(base)}`, from which it began: {licence}.")
    if not any(bases):
        lines.append("* Nothing else went into it: it began from nothing.")
    return ["## Licences", "\n".join(lines)]


def _shown_name(base: str) -> str:
    """A base's name; of a path the last part alone, since folders are the owner's business."""
    place = Path(base).expanduser()
    return place.name if place.exists() else base.removeprefix("hf:")


def _licence(base: str) -> str:
    """The licence that the card of a base on this machine names, else ""."""
    from plait.hf.catalogue import licence_of

    return licence_of(Path(base.removeprefix("hf:")).expanduser())
