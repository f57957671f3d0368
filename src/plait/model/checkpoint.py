"""A checkpoint is a folder in the Hugging Face layout with a manifest of sha256, written last. No pickle anywhere.

A run keeps its checkpoints side by side, `checkpoints/step-000200`; `best` and `last` are links to two of them.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.classifiers.classifier import ARRAYS, FILE, Classifier, load_classifiers, save_classifiers
from plait.classifiers.predictors import PREDICTOR_FILES, Predictor, load_predictors, save_predictors
from plait.classifiers.space import SPACE, SpaceQuality, load_space
from plait.core.config import GenerationConfig
from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.core.files import (
    fsync_folder,
    json_text,
    publish_folder,
    read_json,
    read_sealed,
    sealed,
    sha256_file,
    write_atomic,
)
from plait.modalities.text import Text
from plait.model.multimodal import ModelConfig, Multimodal

if TYPE_CHECKING:
    from plait.model.adapted import Base

VERSION = 1  # of config.json
MANIFEST = 2  # since manifests are sealed


@dataclass(frozen=True)
class PartFile:
    """How a feature keeps what its models know in a checkpoint: in one file beside the weights."""

    name: str  # of the file
    read: Callable[[Path], Any]
    write: Callable[[Any, Path], None]


class CheckpointSource(Protocol):
    """Checkpoints of other programs as ours; a feature adds it."""

    def __call__(self, name_or_folder: str | Path, *, compact: bool = False) -> Checkpoint:
        """With `compact`, matrices stay in the 16 bit that their file has them in, to be frozen."""
        ...


CHECKPOINT_SOURCES: ExtensionPoint[CheckpointSource] = ExtensionPoint("checkpoint_source")
CHECKPOINT_PARTS: ExtensionPoint[PartFile] = ExtensionPoint("checkpoint_part")  # what every checkpoint has
FITTED_PARTS: ExtensionPoint[PartFile] = ExtensionPoint("fitted_part")  # what is fitted once training has ended


@dataclass
class Checkpoint:
    """A model with what is needed to use it."""

    model: Multimodal
    text: Text
    labels: dict[str, list[str]] = field(default_factory=dict)  # text column -> its few distinct values
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    training: dict[str, Any] = field(default_factory=dict)  # how it came to be: data, step, validation, seed
    parts: dict[str, Any] = field(default_factory=dict)  # name of a feature -> what it keeps with the model
    classifiers: list[Classifier] = field(default_factory=list)  # fitted once training has ended
    space: SpaceQuality | None = None  # measured once training has ended
    predictors: list[Predictor] = field(default_factory=list)  # of several labels and of numbers; fitted likewise
    fitted: dict[str, Any] = field(default_factory=dict)  # name of a feature -> what it fitted likewise
    origin: Path | None = None  # the folder or file that the weights were read from
    base: Base | None = None  # what the model stands on, where only what was trained is kept


def save(
    checkpoint: Checkpoint,
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write the folder, taking the place of an older one. Raises PlaitError where it cannot be written.

    `tensors` are the weights, those of the model where left out; `more` writes what else belongs into the folder
    that it is given, before the manifest is made. With a base its tokenizer is left out.
    """
    config = checkpoint.model.config.model_dump()
    settings = config.pop("modalities")
    facts = {"labels": checkpoint.labels, "training": checkpoint.training}
    with publish_folder(folder) as temporary:
        write_json(temporary / "config.json", {"model_type": "plait", "version": VERSION, **config, **facts})
        write_json(temporary / "preprocessor_config.json", settings)
        write_json(temporary / "generation_config.json", checkpoint.generation.model_dump())
        if checkpoint.base is not None:
            write_json(temporary / "base.json", checkpoint.base.model_dump())
        else:
            text = checkpoint.text.tokenizer.to_str(pretty=True)
            (temporary / "tokenizer.json").write_text(text, encoding="utf-8", newline="\n")
        if checkpoint.text.settings:
            write_json(temporary / "tokenizer_config.json", checkpoint.text.settings)
        write_tensors(temporary / "model.safetensors", checkpoint.model.state_dict() if tensors is None else tensors)
        for point, parts in ((CHECKPOINT_PARTS, checkpoint.parts), (FITTED_PARTS, checkpoint.fitted)):
            for feature, part in parts.items():
                kept = point.by_feature()[feature]
                kept.write(part, temporary / kept.name)
        if checkpoint.classifiers:
            save_classifiers(checkpoint.classifiers, temporary)
        if checkpoint.predictors:
            save_predictors(checkpoint.predictors, temporary)
        if checkpoint.space is not None:
            checkpoint.space.save(temporary)
        (temporary / "README.md").write_text(model_card(checkpoint), encoding="utf-8", newline="\n")
        if more is not None:
            more(temporary)
        write_manifest(temporary)


def add_classifiers(
    folder: Path, classifiers: list[Classifier], space: SpaceQuality | None = None, predictors: Iterable[Predictor] = ()
) -> None:
    """Add classifiers and predictors, and what the space is worth, to a checkpoint's folder, in place of those that it
    has."""
    added = list(predictors)

    def write(aside: Path) -> None:
        save_classifiers(classifiers, aside)
        if space is not None:
            space.save(aside)
        if added:
            save_predictors(added, aside)

    _replace_files(folder, (FILE, ARRAYS, SPACE, *PREDICTOR_FILES), write)


def add_fitted(folder: Path, feature: str, part: Any) -> None:
    """Add what a feature fitted to a checkpoint's folder, in place of what it has of it."""
    kept = FITTED_PARTS.by_feature()[feature]
    _replace_files(folder, (kept.name,), lambda aside: kept.write(part, aside / kept.name))


def _replace_files(folder: Path, names: tuple[str, ...], write: Callable[[Path], None]) -> None:
    """Put files that `write` makes in the place of those with some names in a checkpoint's folder. Killed at any
    moment, what is left is the checkpoint without them, or with them."""
    manifest = folder / "manifest.json"
    value = read_sealed(manifest)
    sums = {name: digest for name, digest in value["sha256"].items() if name not in names}

    def publish() -> None:
        write_atomic(manifest, json_text(sealed({"version": value["version"], "sha256": sums})))

    publish()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        write(Path(temporary))
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, folder / file.name)  # noqa: PTH105
            sums[file.name] = sha256_file(folder / file.name)
    fsync_folder(folder)
    publish()


def write_manifest(folder: Path) -> None:
    """The sha256 of every file in a folder that is still aside, sealed; it is written last."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    sums = {f.relative_to(folder).as_posix(): sha256_file(f) for f in files}
    write_json(folder / "manifest.json", sealed({"version": MANIFEST, "sha256": sums}))


def write_json(path: Path, value: object) -> None:
    """Into a folder that is still aside: whoever publishes it makes it last."""
    path.write_text(json_text(value), encoding="utf-8", newline="\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, into a folder that is still aside. Raises OSError where it cannot be written."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error


def series(folder: Path) -> dict[int, Path]:
    """Step -> the folder of its checkpoint, the newest first, of a run's `checkpoints` folder. The names alone order
    them: a clock may jump, and a copy loses its times."""
    steps = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and path.is_dir():
            steps[int(match[1])] = path
    return dict(sorted(steps.items(), reverse=True))


def newest_whole(folder: Path) -> tuple[int, list[str]]:
    """The newest step of a run's `checkpoints` folder whose checkpoint is whole, 0 where there is none, and what is
    wrong with the newer ones."""
    wrong: list[str] = []
    for step, path in series(folder).items():
        problems = verify(path)
        if not problems:
            return step, wrong
        wrong += problems
    return 0, wrong


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint folder, a line a file; empty where it is whole."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return [f"{manifest} is missing: the checkpoint was not finished"]
    try:
        value = read_json(manifest)
        if "seal" in value or value["version"] != 1:
            value = read_sealed(manifest)
        if value["version"] > MANIFEST:
            return [f"{manifest} is of version {value['version']}; this Plait reads up to {MANIFEST}"]
        sums = value["sha256"].items()
    except PlaitError as error:
        return [str(error).rstrip(".")]
    except (KeyError, TypeError, AttributeError) as error:
        return [f"{manifest} is damaged: {error!r}"]
    wrong = []
    for name, expected in sums:
        file = folder / name
        try:
            if not file.is_file():
                wrong.append(f"{file} is missing")
            elif sha256_file(file) != expected:
                wrong.append(f"{file} was altered or cut: its sha256 differs from the manifest's")
        except OSError as error:
            wrong.append(f"{file} cannot be read: {error.strerror}")
    return wrong


def load_weights(model: Multimodal, tensors: dict[str, Tensor]) -> None:
    """Put weights into a model. Those of codecs of media that it never writes may be missing, as `plait export --to
    folder` leaves them out. Raises RuntimeError where others are missing or do not fit."""
    unused = tuple(f"modalities.{name}.codec." for name in model.config.read_only)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.startswith(unused)] if unused else missing
    if missing or unexpected:
        raise RuntimeError(
            f"missing {', '.join(missing) or 'nothing'}; unexpected {', '.join(unexpected) or 'nothing'}"
        )


def load(folder: Path, device: torch.device | None = None) -> Checkpoint:
    """Read and verify a checkpoint folder. Raises PlaitError naming the file that is missing or damaged."""
    folder = Path(folder)
    if wrong := verify(folder):
        raise PlaitError("; ".join(wrong) + ". Use another checkpoint of the run, or train again.")
    if (folder / "base.json").is_file():
        from plait.model.adapted import load_adapted

        adapted = load_adapted(folder, device)
        adapted.classifiers, adapted.space = load_classifiers(folder), load_space(folder)
        adapted.predictors = load_predictors(folder)
        adapted.parts, adapted.fitted = _parts(folder, CHECKPOINT_PARTS), _parts(folder, FITTED_PARTS)
        return adapted
    config, labels, training = settings_of(folder)
    try:
        model = Multimodal(config)
        tensors = load_file(folder / "model.safetensors")
        load_weights(model, tensors)
        generation = GenerationConfig.model_validate(read_json(folder / "generation_config.json"))
    except (ValidationError, SafetensorError, RuntimeError) as error:
        raise PlaitError(f"{folder} does not hold a whole model: {error}") from error
    model.eval()
    if device is not None:
        model.to(device)
    text = Text.load(folder / "tokenizer.json")
    return Checkpoint(
        model, text, labels, generation, training, _parts(folder, CHECKPOINT_PARTS), load_classifiers(folder),
        load_space(folder), load_predictors(folder), _parts(folder, FITTED_PARTS),
        origin=folder,
    )  # fmt: skip


def _parts(folder: Path, point: ExtensionPoint[PartFile]) -> dict[str, Any]:
    """What features keep in a checkpoint's folder."""
    return {
        feature: kept.read(folder / kept.name)
        for feature, kept in point.by_feature().items()
        if (folder / kept.name).is_file()
    }


def settings_of(folder: Path) -> tuple[ModelConfig, dict[str, list[str]], dict[str, Any]]:
    """The network of a checkpoint's folder, its labels, and how it came to be. Raises PlaitError where they are of
    another program or version."""
    config = read_json(folder / "config.json")
    if config.pop("model_type", None) != "plait" or config.pop("version", None) != VERSION:
        raise PlaitError(f"{folder / 'config.json'} is not of a Plait model of version {VERSION}.")
    labels, training = config.pop("labels"), config.pop("training")
    try:
        settings = read_json(folder / "preprocessor_config.json")
        return ModelConfig.model_validate({**config, "modalities": settings}), labels, training
    except ValidationError as error:
        raise PlaitError(f"{folder} does not hold a whole model: {error}") from error


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint folder that a path stands for; None where the path may be a name of the Hugging Face hub."""
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if (folder / "checkpoints").is_dir() or (folder / "run.json").is_file():
        for name in ("best", "last"):
            if (folder / "checkpoints" / name / "config.json").is_file():
                return folder / "checkpoints" / name
        raise PlaitError(f"{folder} holds no checkpoint yet. Let `plait train` reach its first one, or go on training.")
    if folder.is_dir():
        inside = "is empty" if not any(folder.iterdir()) else "holds neither a run nor a config.json"
        raise PlaitError(f"{folder} {inside}. Name the folder of a run, or of a checkpoint in it.")
    if folder.suffix == ".gguf" and folder.is_file():
        return None
    text = str(path)
    local = folder.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or text.endswith("/")
    if folder.exists():
        raise PlaitError(f"{folder} is a file. Name the folder of a run or of a checkpoint.")
    if local or ("/" in text and folder.parent.is_dir()) or folder.parts[:1] == ("runs",):
        raise PlaitError(f"{folder} does not exist. Check the path; `plait train` writes runs.")
    return None


def model_card(checkpoint: Checkpoint) -> str:
    """The README of a checkpoint."""
    config, training = checkpoint.model.config, checkpoint.training
    columns = ", ".join(f"`{name}` ({modality})" for name, modality in config.vocabulary.columns.items())
    counts = checkpoint.model.parameter_count()
    parts = "\n".join(f"| {name} | {count:,} |" for name, count in counts.items())
    facts = "\n".join(f"* {name}: {value}" for name, value in training.items())
    provenance = "Made by `plait train` from its owner's files; nothing else was used."
    if name := training.get("init_from"):
        provenance = f"Made by `plait train` from its owner's files, going on from `{name}`, whose licence applies."
    encoders = {
        name: f"`{settings['encoder']}`, {'frozen' if settings['freeze'] else 'trained further'}"
        for name, settings in config.modalities.items()
        if settings.get("hf_encoder")
    }
    if encoders:
        named = "; ".join(f"{name}: {encoder}" for name, encoder in encoders.items())
        provenance = (
            f"Made by `plait train` from its owner's files and pretrained encoders ({named}), whose licences apply."
        )
    return f"""---
library_name: plait
---
# A Plait model

Reads and writes the columns {columns}. {provenance}

| part | parameters |
| --- | ---: |
{parts}

{facts}

Load it with `plait.load("<this folder>")` or any `plait` command. Figures, with how they were measured, are in the
run's `metrics.json` and `report.html`. It knows what its data held and nothing more; images and audio clips that it
makes are machine-made.
"""
