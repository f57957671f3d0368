"""A whole classifier as one file for other programs: pixels or a waveform in, labels out.

`classifier.onnx` runs in browsers (onnxruntime-web; an example page lies beside it), on phones and everywhere else,
`classifier.tflite` with LiteRT; what they read and write is told in `classifier.json`, and for people in `README.md`.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.classifiers.classifier import Classifier
from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.core.files import publish_folder, read_json, write_atomic, write_json
from plait.hf import tflite
from plait.hf.classifier_graph import ClassifierGraph
from plait.hf.export import must_be_free
from plait.inference.model import PlaitModel
from plait.inference.opinions import opinion_scores
from plait.modalities.base import MediaModality
from plait.modalities.recogniser import Recogniser
from plait.model.checkpoint import model_card

TOLERANCE = 1e-3  # of a probability
OPSET = 17
OUTPUTS = ["probabilities", "ood_score"]
CASES = 6  # inputs that are compared: noise, some of it beside flat areas or silence, and one flat or silent alone


def exportable(model: PlaitModel) -> Classifier | None:
    """The first classifier of a run that recognises media; None where it has none, or makes media too."""
    network = model.checkpoint.model
    for one in model.checkpoint.classifiers:
        kind = one.features.kind
        if kind == "text" or one.portable is None or kind not in network.config.read_only:
            continue
        encoder = network.media[kind].encoder
        if "network" not in one.portable.used or isinstance(encoder, Recogniser):
            return one
    return None


def export_classifier(model: PlaitModel, classifier: Classifier, folder: Path) -> float:
    """Write the ONNX file, what it reads, a card and an example page; the file is run and compared with ours.

    Returns the largest difference of a probability. Raises PlaitError where onnxruntime is not installed, the
    difference is above 1e-3 or the folder cannot be written.
    """
    must_be_free(folder)
    onnxruntime = import_extra("onnxruntime", "onnx", "Export to ONNX")
    modality = model.modality(classifier.source)
    graph = ClassifierGraph(classifier, modality).cpu().eval()
    facts = _facts(classifier, modality)
    rng = np.random.default_rng(0)
    with publish_folder(folder) as temporary:
        file = temporary / "classifier.onnx"
        _trace(graph, _inputs(modality, _noise(modality, rng, 0)), file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        worst = 0.0
        for case in range(CASES):
            raw = _noise(modality, rng, case)
            graph_inputs = {name: value.numpy() for name, value in _inputs(modality, raw).items()}
            probabilities, _ = session.run(OUTPUTS, graph_inputs)
            difference = np.abs(probabilities - _ours(model, classifier, raw)).max()
            worst = float(np.maximum(worst, difference))  # which keeps what is no number
        if not worst <= TOLERANCE:
            raise PlaitError(
                f"The ONNX classifier's probabilities differ by {worst:.2g} from ours, where {TOLERANCE:g} "
                "is allowed; nothing was written. That is a fault of Plait's: please report it. --to html or --to "
                "folder hand the run over meanwhile."
            )
        write_json(temporary / "classifier.json", facts)
        write_atomic(temporary / "README.md", _card(model, classifier, facts, ONNX_USE))
        write_atomic(temporary / "index.html", files("plait.hf").joinpath("templates/classifier.html").read_bytes())
    return worst


def export_classifier_tflite(
    model: PlaitModel, classifier: Classifier, folder: Path, tell: Callable[[str], None] = lambda line: None
) -> float:
    """Write the LiteRT file, what it reads and a card; it is run by LiteRT's interpreter and compared with ours.

    Returns the largest difference of a probability. Raises PlaitError where the environment cannot be made or the
    conversion fails (see `tflite`), the difference is above 1e-3 or the folder cannot be written.
    """
    must_be_free(folder)
    modality = model.modality(classifier.source)
    graph = ClassifierGraph(classifier, modality).cpu().eval()
    rng = np.random.default_rng(0)
    raws = [_noise(modality, rng, case) for case in range(CASES)]
    inputs = [_inputs(modality, raw) for raw in raws]
    place = tflite.environment(tell)
    with tempfile.TemporaryDirectory(prefix="plait-tflite-") as scratch:
        work = Path(scratch)
        cases = {name: torch.stack([one[name] for one in inputs]) for name in inputs[0]}
        tflite.hand_over_graph(graph, cases, OUTPUTS, work)
        tell("Converting.")
        probabilities = tflite.convert(place, work)["probabilities"]
        expected = np.stack([_ours(model, classifier, raw) for raw in raws])
        worst = float(np.abs(probabilities - expected).max())
        if not worst <= TOLERANCE:
            raise PlaitError(
                f"The TFLite classifier's probabilities differ by {worst:.2g} from ours, where {TOLERANCE:g} "
                "is allowed; nothing was written. That is a fault of Plait's: please report it. --to html or --to "
                "folder hand the run over meanwhile."
            )
        facts = {**_facts(classifier, modality), "inputs": read_json(work / "inputs.json")}
        with publish_folder(folder) as temporary:
            shutil.copyfile(work / "model.tflite", temporary / "classifier.tflite")
            write_json(temporary / "classifier.json", facts)
            write_atomic(temporary / "README.md", _card(model, classifier, facts, LITERT_USE))
    return worst


def _ours(model: PlaitModel, classifier: Classifier, raw: Any) -> np.ndarray:
    """Probabilities (1, L) by the same opinions, as Plait computes them."""
    assert classifier.portable is not None
    sample = model.modality(classifier.source).windows(raw)[0]
    scores = opinion_scores(model, classifier, [sample], classifier.portable.used)
    return np.exp(classifier.portable.log_probabilities(scores))


def _facts(classifier: Classifier, modality: MediaModality) -> dict[str, Any]:
    """What a program must know to run the file."""
    assert classifier.portable is not None
    settings: Any = modality.settings
    shared = {"kind": modality.name, "labels": classifier.labels, "threshold": classifier.portable.threshold}
    if modality.variable_length:
        return {**shared, "rate": settings.rate, "samples": settings.frames * settings.hop}
    names = ("size", "channels", "fit", "background")
    return {**shared, **{name: getattr(settings, name) for name in names}}


def _noise(modality: MediaModality, rng: np.random.Generator, case: int) -> Any:
    """An input of noise, as `windows` reads it: whole, from the middle on, or none of it where all is flat."""
    settings: Any = modality.settings
    if modality.variable_length:
        count = int(settings.rate * settings.seconds * rng.uniform(0.3, 0.95))
        wave = rng.normal(0, 0.1, count).astype(np.float32)
        wave[: count * (case % 3) // 2] = 0
        return wave, settings.rate
    pixels = rng.integers(0, 256, (settings.size, settings.size, settings.channels), dtype=np.uint8)
    pixels[: settings.size * (case % 3) // 2] = pixels[0, 0]
    return pixels[..., 0] if settings.channels == 1 else pixels


def _inputs(modality: MediaModality, raw: Any) -> dict[str, Tensor]:
    """The inputs of the graph, by name."""
    settings: Any = modality.settings
    if not modality.variable_length:
        return {"pixels": torch.from_numpy(modality.sample(raw)[None].astype(np.float32))}
    wave = np.zeros((1, settings.frames * settings.hop), np.float32)
    wave[0, : len(raw[0])] = raw[0]
    return {"waveform": torch.from_numpy(wave), "samples": torch.tensor([len(raw[0])])}


def _trace(graph: ClassifierGraph, inputs: dict[str, Tensor], file: Path) -> None:
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph,
                tuple(inputs.values()),
                str(file),
                dynamo=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=OUTPUTS,
            )
    except (RuntimeError, TypeError) as error:
        raise PlaitError(f"torch {torch.__version__} cannot export this classifier to ONNX: {error}") from error
    finally:
        quiet.setLevel(level)


@dataclass(frozen=True)
class Use:
    """A form of export: its file, and how it is used."""

    file: str
    how: str


ONNX_USE = Use(
    "classifier.onnx",
    "`index.html` is an example page: serve this folder (`python -m http.server`) and open it. onnxruntime-web is "
    "fetched\nfrom its public address, or put into the folder `ort` beside it. A browser scales and resamples "
    "otherwise than Plait,\nso answers to files of another size or rate may differ a little.",
)
LITERT_USE = Use(
    "classifier.tflite",
    "With LiteRT (Android, iOS, Python: `pip install ai-edge-litert`); the types of inputs are in `inputs` of "
    "`classifier.json`:\n\n"
    "```python\n"
    "from ai_edge_litert.interpreter import Interpreter\n\n"
    'run = Interpreter("classifier.tflite").get_signature_runner()\n'
    "answer = run(pixels=pixels)  # of audio: waveform=..., samples=...\n"
    'print(answer["probabilities"], answer["ood_score"])\n'
    "```\n\n"
    "Images have to be scaled, and audio resampled, as `classifier.json` says before.",
)


def _card(model: PlaitModel, classifier: Classifier, facts: dict[str, Any], use: Use) -> str:
    """What the file is, what it reads, how good it is, and what it was made of."""
    used = ", ".join(classifier.portable.used) if classifier.portable else ""
    if "rate" in facts:
        reads = (
            f"`waveform` (1, {facts['samples']}) float32, one channel of {facts['rate']} samples a second from -1 to "
            "1, filled up with zeros behind its end, and `samples` (1,) int64, how many of these there are. Of longer "
            "clips it reads the beginning"
        )
    else:
        side, channels = facts["size"], facts["channels"]
        reads = f"`pixels` (1, {side}, {side}, {channels}) float32 from 0 to 255"
    count, measured = len(classifier.labels), classifier.measured
    by_these, by_all = (measured.get(name, float("nan")) for name in ("portable", "mixed"))
    return f"""{model_card(model.checkpoint)}
## This export

`{use.file}` says which `{classifier.target}` a `{classifier.source}` has, of {count} labels. It reads {reads}.
It writes `probabilities` (1, {count}) in the order of `labels` in `classifier.json`, and `ood_score` (1,): above
{facts["threshold"]:g} the opinions are less sure than of nearly all validation records: the answer is none of these.
(Plait itself also asks how unlike the training records an input lies.)

It asks: {used}. On the {classifier.records} validation records by which it was calibrated {by_these:.1%} are right
({by_all:.1%} with all opinions that `plait classify` asks; always the most frequent label: {classifier.guess:.1%}).

{use.how}

The data's licence is that of its owner's files.
"""
