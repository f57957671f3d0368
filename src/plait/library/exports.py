"""`plait.export`: a model for other machines and programs: its backbone, its classifier, or all that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from plait.core.dist import check_extra
from plait.core.errors import PlaitError
from plait.library.model_cards import read_card

if TYPE_CHECKING:
    from plait.inference.base import Model
    from plait.inference.model import PlaitModel


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where it lies.
        difference: the largest difference from ours of logits, or of a classifier's probabilities, where the written
            model was run and compared.
        accuracy: of a page, on records of test.
        left_behind: what of the model was not written, in words.
    """

    folder: Path
    difference: float | None
    accuracy: float | None = None
    left_behind: str = ""


def export(
    model: Model | str | Path,
    out: str | Path,
    *,
    to: str = "transformers",
    adapter: str | Path | None = None,
    length: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Export:
    """Write a model for other machines and programs. Where it is of a run, the run's card (data, splits, figures,
    limits, licences) goes along in `README.md`.

    `folder` has all that `plait` needs to use it, and nothing that only training does. `onnx` (with an example page)
    and `tflite` write the whole classifier of a run that recognises images or audio, and of other models the
    text-and-codes backbone, as all other forms do.

    Args:
        model: a model on the CPU, or what `plait.load` takes.
        out: the folder to write.
        to: folder, transformers, gguf, onnx or tflite; or peft, the low-rank updates alone of a run that was trained
            with LoRA; or html, a page that classifies images offline, calibrated on the run's data.
        adapter: a folder of an adapter that is added to the weights first.
        length: positions of a tflite graph; 512 at most if left out.
        tell: called with lines about long work.

    Raises PlaitError for a format that is unknown or whose library is missing, and for a model that cannot be written.
    """
    from plait.hf.export import add_to_card
    from plait.inference.model import load

    _check_options(to, length)
    if to == "peft":
        return Export(_export_peft(model, Path(out)), None)
    opened = load(model, "cpu") if isinstance(model, (str, Path)) else model
    card = read_card(opened.folder)
    written = _write(opened, str(model), Path(out), to, adapter, length, tell or (lambda line: None), card)
    if written.left_behind and card:
        card = f"**Figures below are of the whole run.** {written.left_behind}\n\n{card}"
    if to != "folder":  # which has it among what its manifest seals
        add_to_card(Path(out), card)
    return written


FORMATS = ("folder", "transformers", "gguf", "onnx", "tflite", "peft", "html")


def _check_options(to: str, length: int | None) -> None:
    """Raise PlaitError for a format that is unknown or whose library is missing, and an option that is not of it."""
    if to not in FORMATS:
        raise PlaitError(f"Unknown format '{to}'. Use {', '.join(FORMATS)}.")
    if length is not None and to != "tflite":
        raise PlaitError("--length is of --to tflite alone: the others take texts of any length.")
    if to == "onnx":
        for module in ("onnx", "onnxruntime"):
            check_extra(module, "onnx", "Export to ONNX")


def _write(
    opened: Model, name: str, out: Path, to: str, adapter: str | Path | None, length: int | None,
    tell: Callable[[str], None], card: str,
) -> Export:  # fmt: skip
    """Write a model in one of the formats; see `export`."""
    from plait.hf.export import export_folder
    from plait.hf.export_classifier import export_classifier, export_classifier_tflite, exportable
    from plait.hf.further import export_further, is_further

    loaded = opened.plait_model
    if opened.folder is not None and is_further(opened.folder) and to == "transformers":
        export_further(opened.folder, out)
        return Export(out, None)
    if loaded is None:
        raise PlaitError(
            f"{name} runs in transformers already; only GPT-2, Llama, Qwen3 and Plait models are exported."
        )
    if to == "html":
        return _page(loaded, out)
    if to == "folder":
        export_folder(loaded.checkpoint, out, card)
        return Export(out, None)
    classifier = exportable(loaded)
    if to == "onnx" and classifier is not None:
        return Export(out, export_classifier(loaded, classifier, out))
    if to == "tflite" and length is None and classifier is not None:
        return Export(out, export_classifier_tflite(loaded, classifier, out, tell))
    return _write_backbone(loaded, name, out, to, adapter, length, tell)


def _write_backbone(
    loaded: PlaitModel, name: str, out: Path, to: str, adapter: str | Path | None, length: int | None,
    tell: Callable[[str], None],
) -> Export:  # fmt: skip
    """Write the text-and-codes backbone, and say what is left behind."""
    from plait.hf.adapters import read_adapter
    from plait.hf.export import export_onnx, export_transformers
    from plait.hf.export_constraints import add_export_constraints
    from plait.hf.gguf_export import export_gguf
    from plait.hf.tflite import export_tflite
    from plait.inference.base import Verb
    from plait.model.lora import merge_adapter

    formats: dict[str, Callable[..., object]] = {
        "transformers": export_transformers,
        "gguf": export_gguf,
        "onnx": export_onnx,
        "tflite": partial(export_tflite, length=length, tell=tell),
    }
    if Verb.GENERATE not in loaded.verbs:
        raise PlaitError(f"{name} can {' and '.join(loaded.verbs)}, which no other program can; nothing is written.")
    left = _left_behind(loaded)
    if left:
        tell(left)
    if loaded.checkpoint.predictors:
        names = ", ".join(dict.fromkeys(one.target for one in loaded.checkpoint.predictors))
        tell(f"What predicts {names} (several labels, or numbers) is no part of the network, and is not written.")
    if adapter is not None:
        merge_adapter(loaded.checkpoint.model.backbone, read_adapter(adapter, loaded.checkpoint))
    worst = formats[to](add_export_constraints(loaded.checkpoint, loaded.engine), out)
    return Export(out, worst if isinstance(worst, float) else None, left_behind=left)


def _left_behind(model: PlaitModel | None) -> str:
    """What classifies and is no part of a backbone that is written alone; "" where nothing does."""
    if model is None or not model.checkpoint.classifiers:
        return ""
    names = ", ".join(dict.fromkeys(one.target for one in model.checkpoint.classifiers))
    return (
        f"What classifies {names} is not written: it reads texts, or this run makes media too. Only the backbone is; "
        "serve the classifier with plait serve, or write it for Plait elsewhere with --to folder."
    )


def _page(model: PlaitModel, out: Path) -> Export:
    """A page that classifies images offline. Raises PlaitError for a model that lies in no run."""
    from plait.library.runs import Run
    from plait.reports.offline import export_page

    places = model.folder.resolve().parents if model.folder else []
    run = next((place for place in places if (place / "run.json").is_file()), None)
    if run is None:
        raise PlaitError(f"{model.name} lies in no run, whose data a page is calibrated on. Name a run's folder.")
    page = export_page(model, Run(run).dataset, out)
    return Export(page.file, None, page.accuracy)


def _export_peft(model: Model | str | Path, out: Path) -> Path:
    """The low-rank updates of a run as PEFT has them. Raises PlaitError where it was not trained so."""
    from plait.hf.adapters import write_adapter
    from plait.model.adapted import FILE, load_adapted
    from plait.model.checkpoint import find_checkpoint

    folder = find_checkpoint(model if isinstance(model, (str, Path)) else model.folder or "")
    if folder is None or not (folder / FILE).is_file():
        raise PlaitError(f"{model} was not trained with --lora, so there is no adapter. Use --to transformers.")
    write_adapter(load_adapted(folder, merge=False), out)
    return out
