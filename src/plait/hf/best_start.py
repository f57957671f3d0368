"""The best pretrained start for a dataset among the models on this machine: what `plait train --start best` takes, and
what `plait train` mentions otherwise. Nothing is downloaded.

A start is an encoder below a head where the dataset has labels, an encoder of images and one of texts in one space
where images have captions, a language model with low-rank updates where texts are to be written. What it is expected
to give was measured on public sets; docs/benchmarks has the commands.
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
from plait.modalities.image_files import IMAGE
from plait.modalities.media import MEDIA
from plait.training.build import label_columns
from plait.training.tasks import find_task

ENCODER_BYTES = 8.0  # a weight: fp32, and what a batch takes beside
LORA_BYTES, LORA_BESIDE = 2.6, 2.3e9  # a weight of a language model; bytes of activations and logits beside
MODERN = {"dinov2": 3, "dinov3_vit": 3, "siglip": 2, "siglip2": 2, "clip": 2, "whisper": 3}  # else 1: what comes first
PAIRS = "pairs"  # what images with captions want: an encoder of each


@dataclass(frozen=True)
class Expectation:
    """What a start gave on a public set where training from scratch had the same minutes, or more.

    Attributes:
        encoder: What was measured, for people.
        data: The set and how much of it, for people.
        value, scratch: What `figure` came to on its test.
    """

    encoder: str
    data: str
    value: float
    scratch: float
    figure: str = "accuracy"

    def __str__(self) -> str:
        gave = f"{self.figure} {self.value:.3f}, from scratch {self.scratch:.3f}"
        return f"measured with {self.encoder}, {self.data}: {gave}"


EXPECTED = {
    "text": Expectation("MiniLM-L6", "five examples of each of BANKING77's intents", 0.813, 0.628),
    "image": Expectation("EfficientNet-Lite0", "1,008 photos of nine classes of CIFAR-10", 0.809, 0.568),
    "audio": Expectation("Whisper base", "spoken digits of a speaker never heard", 0.974, 0.918),
    PAIRS: Expectation(
        "EfficientNet-Lite0 and MiniLM-L6", "1,000 photos of Flickr8k found by their captions", 0.580, 0.226, "R@10"
    ),
}


@dataclass(frozen=True)
class BestStart:
    """A model to start from, and how.

    Attributes:
        models: The model; two, an encoder of images and one of texts, where images have captions.
        lora: Whether low-rank updates of it are trained, rather than a head over it.
        expected: What it is expected to give, for people.
        left_out: Models that would do and do not fit, for people, a line each.
    """

    models: tuple[LocalModel, ...]
    lora: bool
    expected: str
    left_out: tuple[str, ...]

    @property
    def init_from(self) -> str:
        """The name that `init_from` takes."""
        return ",".join(str(one.folder) if Path(one.name).exists() else one.name for one in self.models)

    def __str__(self) -> str:
        what = "a pretrained encoder, for a head over it"
        if self.lora:
            what = "a pretrained language model, to be trained by low-rank updates"
        elif len(self.models) > 1:
            what = "pretrained encoders, to be joined in one space for search and labels, without writing captions"
        named = " and ".join(f"{one.name} ({one.model_type}, {one.bytes / 1e9:.2f} GB)" for one in self.models)
        return f"{named}, {what}; {self.expected}"


def wanted(dataset: Dataset) -> str | None:
    """What a start would have to do: read "text", "image" or "audio" below a head, "write", or read PAIRS; None where
    none is known for the task."""
    task = find_task(dataset, label_columns(dataset, 2**31)) if dataset.manifest.kind == "records" else None
    if task == "recognise":
        try:
            return dataset.columns[columns_of(dataset)[0]]
        except PlaitError:  # several labels a record, or numbers
            return None
    if task == "describe" and IMAGE.kind in dataset.columns.values():
        return PAIRS
    return "write" if task in ("language", "chat") else None


def best_start(dataset: Dataset, folders: Sequence[str | Path] = (), cache: bool = True) -> BestStart | None:
    """The best start of those in `folders` and, with `cache`, in the Hugging Face cache, that fits into memory.

    Raises PlaitError where a folder does not exist.
    """
    what = wanted(dataset)
    if what is None:
        return None
    local, left_out, chosen = models(folders, cache), list[str](), list[LocalModel]()
    for part in (IMAGE.kind, "text") if what == PAIRS else (what,):
        model = _best(local, part, left_out)
        if model is None:
            return None
        chosen.append(model)
    expected = "what it gives was not measured" if what == "write" else str(EXPECTED[what])
    return BestStart(tuple(chosen), what == "write", expected, tuple(left_out))


def _best(local: Sequence[LocalModel], what: str, left_out: list[str]) -> LocalModel | None:
    """The best model for what is wanted that fits into memory; those that would do and do not fit go to `left_out`."""
    fitting = []
    free = available_memory()
    for model in local:
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
        return model
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
