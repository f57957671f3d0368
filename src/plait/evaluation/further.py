"""What further training gave: a run's Whisper or CLIP on held-out records, beside the model that it began from.

Shapes: N records.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np

from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.data.dataset import Dataset
from plait.evaluation import metrics
from plait.evaluation.findings import Findings, Gallery, GalleryKind, ReportItem
from plait.evaluation.keys import Direction, MetricKey, Metrics
from plait.evaluation.outcome import Outcome
from plait.evaluation.verdict import make_verdict
from plait.hf import hub
from plait.hf.contrastive import EMBEDDED, QUERIES, EmbeddedPairs, Pairs, embed_pairs, text_numbers
from plait.hf.dual_encoder import DualEncoder
from plait.hf.pretrained import Pretrained, load_pretrained
from plait.hf.speech_training import speech_columns
from plait.modalities.audio_files import decode_audio

CLIPS = 100  # that both models transcribe at most, where nothing is said
SHOWN = 8  # clips in the report
BASE = "the model it began from"

Progress = Callable[[str, int, int], None]


def measure_further(
    model: Pretrained, dataset: Dataset, split: str, limit: int | None, progress: Progress
) -> tuple[Metrics, Findings]:
    """Word error rates of a Whisper, or how often a CLIP finds the image of a text, of a split, beside the base's own.

    Raises PlaitError where the model is of another kind, or the split has no records for it.
    """
    if model.kind not in MEASURED:
        raise PlaitError(f"{model.name} is no model that plait trained; evaluation needs a run.")
    findings = Findings()
    figures = MEASURED[model.kind](model, _base_of(model, findings), dataset, split, limit, progress, findings)
    findings.verdict = make_verdict(findings.outcomes)
    return figures, findings


def _base_of(model: Pretrained, findings: Findings) -> Pretrained | None:
    """The model that a run began from; None, with a note, where it is gone."""
    name = read_json(model.folder / "config.json").get("training", {}).get("init_from")
    if name is None:
        raise PlaitError(f"{model.name} is no model that plait trained; evaluation needs a run.")
    try:
        return load_pretrained(hub.find(name), model.device.name)
    except PlaitError as error:
        findings.notes.append(f"{BASE.capitalize()}, {name}, was not measured: {error}")
        return None


# --- speech -----------------------------------------------------------------------------------------------------


def _measure_speech(
    model: Pretrained, base: Pretrained | None, dataset: Dataset, split: str, limit: int | None, progress: Progress,
    findings: Findings,
) -> Metrics:  # fmt: skip
    audio, text = speech_columns(dataset)
    said = dataset.texts(text)
    indices = np.array([i for i in dataset.indices(split) if said[i]], np.int64)[: limit or CLIPS]
    truth, written, before = list[str](), list[str](), list[str]()
    language = _language(model)
    for done, (index, record) in enumerate(zip(indices, dataset.iterate(indices, [audio]), strict=True)):
        progress(f"transcription {split}", done, len(indices))
        if (value := record.parts.get(audio)) is None:
            continue
        wave = decode_audio(cast(Any, value))
        truth.append(_plain(str(said[index])))
        written.append(_plain(model.transcribe(wave)))
        if base is not None:
            before.append(_plain(base.transcribe(wave, language=language)))
    if not truth:
        raise PlaitError(f"{dataset.path} has no clip of {split} with {audio} and {text}. Name another --split.")
    direction, figures = Direction(audio, text), Metrics()
    errors, other = metrics.error_rates(truth, written), metrics.error_rates(truth, before or truth)
    for name, (wrong, lengths) in errors.items():
        rate, stderr = metrics.ratio_with_error(wrong, lengths)
        beside = float(other[name][0].sum() / max(lengths.sum(), 1)) if before else None
        figures.keep(MetricKey("transcription", direction, name), rate, stderr=stderr, baseline=beside, n=len(truth))
    wrong, lengths = errors["wer"]
    word = figures[MetricKey("transcription", direction, "wer")]
    findings.outcomes.append(
        Outcome(
            "transcription", f"{text} from {audio}", "of the words wrong", float(word["value"] or 0), word["stderr"],
            len(truth), alternative=BASE if before else None, alternative_value=word["baseline"],
            lead_stderr=metrics.ratio_with_error(wrong - other["wer"][0], lengths)[1], higher_is_better=False,
            unit="clips",
        )
    )  # fmt: skip
    findings.notes.append("Words are compared in lower case, without punctuation, as Whisper's own figures are.")
    rows = [
        (
            ReportItem("said", text=truth[i]),
            [ReportItem("written", text=written[i], right=written[i] == truth[i])]
            + ([ReportItem("before", text=before[i], right=before[i] == truth[i])] if before else []),
        )
        for i in range(min(SHOWN, len(truth)))
    ]
    findings.galleries.append(
        Gallery(f"Written: {direction.arrow}", "The first of the split.", rows, GalleryKind.WRITTEN)
    )
    return figures


def _language(model: Pretrained) -> str | None:
    """The language that a run's model keeps as its own; None where the model knows one alone."""
    settings = model.model.generation_config
    return getattr(settings, "language", None) if getattr(settings, "is_multilingual", False) else None


def _plain(text: str) -> str:
    """A transcript without case and punctuation."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return str(BasicTextNormalizer()(text)).strip()


# --- images and texts -------------------------------------------------------------------------------------------


Embedder = Callable[[Pairs, np.ndarray], EmbeddedPairs]


def measure_dual_encoder(
    model: DualEncoder, dataset: Dataset, split: str, limit: int | None, progress: Progress
) -> tuple[Metrics, Findings]:
    """How often two joined encoders find the image of a text, and back.

    Raises PlaitError where the split has no images with texts.
    """

    def embed(pairs: Pairs, places: np.ndarray) -> EmbeddedPairs:
        a, b, words = list[np.ndarray](), list[np.ndarray](), list[str]()
        for part in np.split(places, range(EMBEDDED, len(places), EMBEDDED)):
            images, texts = pairs.read(part, np.zeros(len(part)))
            a.append(model.embed_inputs(images))
            b.append(model.embed_inputs(list(texts)))
            words += texts
        return EmbeddedPairs(np.concatenate(a), np.concatenate(b), text_numbers(words))

    findings = Findings()
    figures = _measure_pairs(embed, None, dataset, split, limit, progress, findings)
    findings.verdict = make_verdict(findings.outcomes)
    return figures, findings


def _measure_contrastive(
    model: Pretrained, base: Pretrained | None, dataset: Dataset, split: str, limit: int | None, progress: Progress,
    findings: Findings,
) -> Metrics:  # fmt: skip
    before = partial(embed_pairs, base) if base is not None else None
    return _measure_pairs(partial(embed_pairs, model), before, dataset, split, limit, progress, findings)


def _measure_pairs(
    embed: Embedder, base: Embedder | None, dataset: Dataset, split: str, limit: int | None, progress: Progress,
    findings: Findings,
) -> Metrics:  # fmt: skip
    pairs = Pairs.of(dataset, split)
    places = np.arange(min(len(pairs), limit or QUERIES))
    if not len(places):
        raise PlaitError(f"{dataset.path} has no image of {split} with a text. Name another --split.")
    progress(f"retrieval {split}", 0, 2)
    embedded = embed(pairs, places)
    progress(f"retrieval {split}", 1, 2)
    own = _found(embedded)
    before = _found(base(pairs, places)) if base is not None else None
    text, figures = pairs.texts[0], Metrics()
    for direction in (Direction(text, pairs.image), Direction(pairs.image, text)):
        for name in ("r_at_1", "r_at_10"):
            search = own[direction.source == text]
            hits = search[name]
            value, stderr = metrics.mean_with_error(hits)
            beside = float(before[direction.source == text][name].mean()) if before else None
            chance, _ = metrics.retrieval_chance(search["relevant"], len(hits), int(name.rpartition("_")[2]))
            figures.keep(
                MetricKey("retrieval", direction, name), value, stderr=stderr, chance=chance, baseline=beside,
                n=len(hits),
            )  # fmt: skip
            if name == "r_at_10" and direction.source == text:
                lead = metrics.mean_with_error(hits - before[True][name])[1] if before else None
                findings.outcomes.append(
                    Outcome(
                        "retrieval", f"{pairs.image} by {text}", "found among the first ten", value, stderr, len(hits),
                        chance, BASE if before else None, beside, lead, unit="texts", advice="more images with texts.",
                    )
                )  # fmt: skip
    return figures


def _found(pairs: EmbeddedPairs) -> dict[bool, dict[str, np.ndarray]]:
    """Whether the other half of each pair, or of one with the same text, is among the first, (N,) by figure; True is of
    images by texts."""
    return {
        True: metrics.retrieval(pairs.texts, pairs.images, pairs.same),
        False: metrics.retrieval(pairs.images, pairs.texts, pairs.same),
    }


MEASURED: dict[str, Callable[..., Metrics]] = {"speech": _measure_speech, "contrastive": _measure_contrastive}
