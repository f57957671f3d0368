"""The best pretrained start for a dataset among the models on this machine: what `plait train --start best` takes, and
what `plait train` mentions otherwise. Nothing is downloaded.

A start is an encoder below a head where the dataset has labels, a language model with low-rank updates where texts are
to be written. What it is expected to give was measured on public sets; docs/benchmarks has the commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.core.errors import PlaitError
from plait.core.system import available_memory
from plait.data.dataset import Dataset
from plait.hf.catalogue import LocalModel, models
from plait.hf.encoders import describe
from plait.hf.heads import columns_of
from plait.hf.pretrained import kind_of
from plait.modalities.media import MEDIA
from plait.training.build import label_columns
from plait.training.tasks import find_task

ENCODER_BYTES = 8.0  # a weight: fp32, and what a batch takes beside
LORA_BYTES, LORA_BESIDE = 2.6, 2.3e9  # a weight of a language model; bytes of activations and logits beside
MODERN = {"dinov2": 3, "dinov3_vit": 3, "siglip": 2, "siglip2": 2, "clip": 2, "whisper": 3}  # else 1: what comes first


@dataclass(frozen=True)
class Expectation:
    """What a start gave on a public set where training from scratch had the same minutes.

    Attributes:
        encoder: What was measured, for people.
        data: The set and how much of it, for people.
        value, scratch: Accuracy on its test.
    """

    encoder: str
    data: str
    value: float
    scratch: float

    def __str__(self) -> str:
        return f"measured with {self.encoder}, {self.data}: accuracy {self.value:.3f}, from scratch {self.scratch:.3f}"


EXPECTED = {
    "text": Expectation("MiniLM-L6", "five examples of each of BANKING77's intents", 0.813, 0.628),
    "image": Expectation("EfficientNet-Lite0", "1,008 photos of nine classes of CIFAR-10", 0.809, 0.568),
    "audio": Expectation("Whisper base", "spoken digits of a speaker never heard", 0.974, 0.918),
}


@dataclass(frozen=True)
class BestStart:
    """A model to start from, and how.

    Attributes:
        model: The model.
        lora: Whether low-rank updates of it are trained, rather than a head over it.
        expected: What it is expected to give, for people.
        left_out: Models that would do and do not fit, for people, a line each.
    """

    model: LocalModel
    lora: bool
    expected: str
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        what = "language model, to be trained by low-rank updates" if self.lora else "encoder, for a head over it"
        size = f"{self.model.bytes / 1e9:.2f} GB"
        return f"{self.model.name} ({self.model.model_type}, {size}), a pretrained {what}; {self.expected}"


def wanted(dataset: Dataset) -> str | None:
    """What a start would have to do: read "text", "image" or "audio" below a head, or "write"; None where none is
    known for the task."""
    task = find_task(dataset, label_columns(dataset, 2**31)) if dataset.manifest.kind == "records" else None
    if task == "recognise":
        try:
            return dataset.columns[columns_of(dataset)[0]]
        except PlaitError:  # several labels a record, or numbers
            return None
    return "write" if task in ("language", "chat") else None


def best_start(dataset: Dataset, folders: Sequence[str | Path] = (), cache: bool = True) -> BestStart | None:
    """The best start of those in `folders` and, with `cache`, in the Hugging Face cache, that fits into memory.

    Raises PlaitError where a folder does not exist.
    """
    what = wanted(dataset)
    if what is None:
        return None
    fitting, left_out = [], []
    free = available_memory()
    for model in models(folders, cache):
        if not (model.writes if what == "write" else model.encodes == what):
            continue
        needed = model.parameters * (LORA_BYTES if what == "write" else ENCODER_BYTES)
        needed += LORA_BESIDE if what == "write" else 0
        if needed > free:
            left_out.append(f"{model.name} needs about {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.")
        else:
            fitting.append(model)
    for model in sorted(fitting, key=_rank, reverse=True):
        try:
            _check(model, what)
        except PlaitError as error:
            left_out.append(str(error))
            continue
        expected = "what it gives was not measured" if what == "write" else str(EXPECTED[what])
        return BestStart(model, what == "write", expected, tuple(left_out))
    return None


def _check(model: LocalModel, what: str) -> None:
    """Raise PlaitError where a model cannot do what is wanted, as far as its configuration says."""
    if what in MEDIA:
        describe(f"hf:{model.folder}", what)
    elif what == "text" and kind_of(model.folder) != "encoder":
        raise PlaitError(f"{model.name} ({model.model_type}) is no encoder of texts.")


def _rank(model: LocalModel) -> tuple[int, int, str]:
    """Encoders that were trained for what heads need come first, then the larger ones."""
    sentences = (model.folder / "modules.json").is_file()
    return 3 if sentences else MODERN.get(model.model_type, 1), model.parameters, model.name
