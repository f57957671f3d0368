"""What tasks are made of: the model under test, samples of the data, the judges, and figures as they are kept."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.evaluation import kept_judges
from plait.evaluation.findings import Findings, ReportItem
from plait.evaluation.keys import TIMING, Direction, MetricKey, Metrics
from plait.evaluation.reference_classifier import ReferenceClassifier, fit_classifier
from plait.inference.model import PlaitModel
from plait.modalities.base import MediaModality
from plait.model.multimodal import Sequence

Progress = Callable[[str, int, int], None]  # stage, done, total


class DatasetEvaluation(Protocol):
    """Measures models of data of a kind of its own (`Manifest.kind`); a feature adds it."""

    def __call__(
        self, model: PlaitModel, dataset: Dataset, split: str, *, seed: int, limit: int | None, progress: Progress
    ) -> tuple[Metrics, Findings]: ...


EVALUATIONS: ExtensionPoint[DatasetEvaluation] = ExtensionPoint("evaluation")
# What features measure of records beside recognition, transcription and the rest.
RECORD_EVALUATIONS: ExtensionPoint[Callable[[EvalContext], None]] = ExtensionPoint("record_evaluation")


@dataclass(frozen=True)
class Limits:
    """The most of each that an evaluation takes; what is left out is drawn by the seed and noted."""

    records: int = 2000  # of a split, for each direction
    scores: int = 500_000  # texts times records that recognition scores
    written: int = 500  # texts written
    tokens: int = 200_000  # of text predicted
    queries: int = 500  # of retrieval
    made: int = 200  # images or audio clips that are made, over all columns that ask for them
    training: int = 60_000  # training records that judges and nearest neighbours see
    cells: int = 2**27  # numbers in the features of training samples that are kept at one time


@dataclass
class Media:
    """Samples of one column and split, and the numbers of their records, ascending."""

    indices: np.ndarray
    samples: list[np.ndarray]

    def only(self, keep: np.ndarray) -> Media:
        """Those at these places, or where this mask is true."""
        places = np.flatnonzero(keep) if keep.dtype == bool else keep
        return Media(self.indices[places], [self.samples[i] for i in places])

    def __len__(self) -> int:
        return len(self.indices)


@dataclass
class LabelClassifier:
    """A judge of one media column: its classes are the combinations of labels that occur in train."""

    judge: ReferenceClassifier
    columns: list[str]  # label columns it tells apart
    classes: list[tuple[str | None, ...]]  # a label or None for each of them

    def predicted_labels(self, features: Tensor, column: str) -> tuple[list[str | None], np.ndarray]:
        """The label that each sample has in a column, None where it looks like one of another; and features."""
        probabilities, hidden = self.judge(features)
        place = self.columns.index(column)
        return [self.classes[i][place] for i in probabilities.argmax(1)], hidden

    def predict_among(self, features: Tensor, column: str, labels: list[str]) -> np.ndarray:
        """The index of the likeliest label of a column, (N,)."""
        probabilities, _ = self.judge(features)
        place = self.columns.index(column)
        sums = np.zeros((len(probabilities), len(labels)))
        for i, value in enumerate(self.classes):
            label = value[place]
            if label is not None and label in labels:
                sums[:, labels.index(label)] += probabilities[:, i]
        return sums.argmax(1)


@dataclass
class EvalContext:
    """The model, the data and what was found so far."""

    model: PlaitModel
    dataset: Dataset
    split: str
    seed: int
    limits: Limits
    reference_seconds: float
    progress: Progress
    alternative_seconds: float | None = None  # for which a small CNN is fitted as an alternative; None for none
    metrics: Metrics = field(default_factory=Metrics)
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        self.columns = {c: kind for c, kind in self.model.columns.items() if c in self.dataset.columns}
        for column, kind in self.columns.items():
            if self.dataset.columns[column] != kind:
                raise PlaitError(
                    f"Column '{column}' holds {self.dataset.columns[column]} in {self.dataset.path}, but the model "
                    f"knows it as {kind}. Evaluate on data prepared like the training data."
                )
        if not self.columns:
            raise PlaitError(
                f"{self.dataset.path} has no column of the model's ({', '.join(self.model.columns) or 'none'}); it has "
                f"{', '.join(self.dataset.columns)}. Evaluate on data prepared like the training data."
            )
        self.chats = [c for c in self.dataset.manifest.chats if c in self.columns]
        self.columns = {c: kind for c, kind in self.columns.items() if c not in self.chats}
        self.media = self.model.checkpoint.model.media
        self.device = next(self.model.checkpoint.model.parameters()).device
        self.media_columns = [c for c, kind in self.columns.items() if kind != "text"]
        self.text_columns = [c for c, kind in self.columns.items() if kind == "text"]
        self.written = set(self.columns) - set(self.model.checkpoint.model.config.read_only)
        self.labels = {c: self.model.labels[c] for c in self.text_columns if c in self.model.labels}
        self.texts = {c: self.dataset.texts(c) for c in self.text_columns}
        self._seen = self.dataset.seen()
        if self.split != "train" and (count := int(self._seen[self.dataset.indices(self.split)].sum())):
            self.note(
                f"{count:,} records of {self.split} have equal or near-equal ones in train (duplicates.jsonl): figures "
                "named _clean leave them out."
            )
        self._read: dict[tuple[str, str], Media] = {}
        self._embedded: dict[str, np.ndarray] = {}
        self._rebuilt: dict[tuple[str, str], list[np.ndarray]] = {}
        self._label_classifiers: dict[tuple[str, tuple[str, ...]], LabelClassifier] = {}

    def modality(self, column: str) -> MediaModality:
        return self.media[self.columns[column]]

    def keep(
        self,
        task: str,
        direction: Direction,
        metric: str,
        value: float,
        *,
        label: str | None = None,
        clean: bool = False,
        stderr: float | None = None,
        chance: float | None = None,
        baseline: float | None = None,
        n: int | None = None,
    ) -> None:
        """Note a figure; arguments as in `MetricKey` and `Metrics.keep`."""
        key = MetricKey(task, direction, metric, label, clean)
        self.metrics.keep(key, value, stderr=stderr, chance=chance, baseline=baseline, n=n)

    def note(self, text: str) -> None:
        if text not in self.findings.notes:
            self.findings.notes.append(text)

    def clean(self, indices: np.ndarray) -> np.ndarray | None:
        """Which of these records (N,) have no equal or near-equal one in train; None where all or none are so."""
        clean = ~self._seen[np.asarray(indices, np.int64)]
        return None if clean.all() or not clean.any() else clean

    # --- samples ------------------------------------------------------------------------------------------------

    def shuffled(self, indices: np.ndarray) -> np.ndarray:
        """In an order that is a function of the seed."""
        return indices[np.argsort(uniform(self.seed, 21, indices), kind="stable")]

    def draw(self, indices: np.ndarray, most: int) -> np.ndarray:
        """At most so many, drawn by the seed, ascending."""
        return np.sort(self.shuffled(indices)[:most])

    def samples(self, column: str, split: str) -> Media:
        """The samples of a column, at most `limits.records` of them (`limits.training` of train), decoded once."""
        if (column, split) not in self._read:
            most = self.limits.training if split == "train" else self.limits.records
            order = self.shuffled(self.dataset.indices(split))
            if not len(order):
                return Media(order, [])
            modality, by_record, cut = self.modality(column), {}, 0
            for start in range(0, len(order), 2000):
                # Within a chunk in the file's order, which reads each row group once.
                chunk = np.sort(order[start : start + 2000])
                self.progress(f"read {column} of {split}", min(start, most), min(len(order), most))
                for index, record in zip(chunk, self.dataset.iterate(chunk, [column]), strict=True):
                    if column in record.parts:
                        windows = modality.windows(record.parts[column])
                        by_record[int(index)] = windows[0]
                        cut += len(windows) > 1
                if len(by_record) >= most or (
                    split == "train" and sum(sample.size for sample in by_record.values()) >= self.limits.cells
                ):
                    break
            self.progress(f"read {column} of {split}", min(len(order), most), min(len(order), most))
            kept = np.sort(np.array([i for i in order if i in by_record][:most], np.int64))
            if start + 2000 < len(order) or len(kept) < len(by_record):
                self.note(f"{column}: {len(kept):,} records of {split} were used, drawn by the seed.")
            if cut:
                self.note(f"{column}: {cut:,} of {split} are longer than the longest clip; their beginning was used.")
            self._read[column, split] = Media(kept, [by_record[i] for i in kept.tolist()])
        return self._read[column, split]

    def with_text(self, media: Media, column: str) -> Media:
        """Those whose record has a text in this column."""
        return media.only(np.array([self.texts[column][i] is not None for i in media.indices], bool))

    def pairs(self, source: str, target: str, split: str) -> Media:
        """Inputs of a column whose record has a text in the other; texts are kept as their record's number alone."""
        if source in self.media_columns:
            return self.with_text(self.samples(source, split), target)
        present = [i for i in self.dataset.indices(split) if self.texts[source][i] is not None]
        media = self.with_text(Media(np.array(present, np.int64), [np.empty(0)] * len(present)), target)
        return media.only(self.draw(np.arange(len(media)), self.limits.records))

    def inputs(self, source: str, media: Media) -> list[Sequence]:
        """What the model reads of these records, as sequences."""
        if source in self.media_columns:
            return self.contexts(source, media)
        return [self.text_sequence(self.texts[source][i]) for i in media.indices]

    def raw_inputs(self, source: str, media: Media) -> list[Any]:
        """Samples, or texts."""
        if source in self.media_columns:
            return list(media.samples)
        return [self.texts[source][i] for i in media.indices]

    def text_sequence(self, text: str) -> Sequence:
        """A text as context, cut as training cuts it."""
        checkpoint = self.model.checkpoint
        ids = checkpoint.text.encode(text)[: checkpoint.model.config.backbone.max_length // 2]
        return Sequence().read_ids(ids, "text")

    def contexts(self, column: str, media: Media) -> list[Sequence]:
        """Samples of a column as what the model reads, a sequence each."""
        return [self.model.context([(column, sample)]) for sample in media.samples]

    def embedded(self, column: str, media: Media) -> np.ndarray:
        """Places in the embedding space (N, E) of samples of this split, found once for all tasks."""
        media_of_split = self.samples(column, self.split)
        if column not in self._embedded:
            self.progress(f"embed {column}", 0, 1)
            self._embedded[column] = self.model.embed_sequences(self.contexts(column, media_of_split))
            self.progress(f"embed {column}", 1, 1)
        return self._embedded[column][np.searchsorted(media_of_split.indices, media.indices)]

    def features(self, column: str, samples: list[np.ndarray]) -> Tensor:
        """Samples for a plain classifier, (N, C, H, W)."""
        return self.modality(column).features(samples)  # type: ignore[arg-type]

    @torch.no_grad()
    def encode(self, column: str, samples: list[np.ndarray]) -> list[np.ndarray]:
        """Samples to their codes, each of its own length."""
        modality, all_codes = self.modality(column), []
        for start in range(0, len(samples), 256):
            chunk = samples[start : start + 256]
            values, lengths = modality.batch(chunk)
            codes = modality.codec.encode(values.to(self.device), lengths.to(self.device)).cpu().numpy()
            all_codes += [row[: modality.code_count(len(s))] for row, s in zip(codes, chunk, strict=True)]
        return all_codes

    @torch.no_grad()
    def decode(self, column: str, codes: list[np.ndarray]) -> list[np.ndarray]:
        """Codes to samples."""
        modality, samples = self.modality(column), [np.empty(0)] * len(codes)
        alike: dict[int, list[int]] = {}
        for i, row in enumerate(codes):
            alike.setdefault(len(row), []).append(i)
        for places in alike.values():
            for part in (places[at : at + 256] for at in range(0, len(places), 256)):
                values = torch.from_numpy(np.stack([codes[i] for i in part])).to(self.device)
                for i, sample in zip(part, modality.codec.decode(values).cpu().numpy(), strict=True):
                    samples[i] = sample
        return samples

    def rebuilt(self, column: str, split: str) -> Media:
        """`samples`, each after the codec."""
        media = self.samples(column, split)
        if (column, split) not in self._rebuilt:
            self._rebuilt[column, split] = self.decode(column, self.encode(column, media.samples))
        return Media(media.indices, self._rebuilt[column, split])

    def preview_sample(
        self, column: str, sample: np.ndarray, caption: str = "", right: bool | None = None
    ) -> ReportItem:
        """A sample to look at, or to listen to."""
        shown = self.modality(column).preview_sample(sample)
        return ReportItem(caption, image=shown.image, audio=shown.audio, right=right)

    def preview_input(self, source: str, media: Media, place: int) -> ReportItem:
        """What one of these records has in a column."""
        if source in self.media_columns:
            return self.preview_sample(source, media.samples[place])
        return ReportItem(text=self.texts[source][media.indices[place]])

    # --- judges -------------------------------------------------------------------------------------------------

    def label_classifier(self, media_column: str, column: str) -> LabelClassifier | None:
        """The judge of a media column that knows the labels of a text column; None where train has too few.

        Where label columns say the same of a record (a name in two languages), one judge serves them all.
        """
        columns = [c for c in self.labels if len(self.with_text(self.samples(media_column, "train"), c))]
        train = self.samples(media_column, "train")
        truth = [tuple(self.texts[c][i] for c in columns) for i in train.indices]
        joint = len(set(truth)) <= sum(len(self.labels[c]) for c in columns) + 1
        group = tuple(columns if joint else [column])
        if (media_column, group) not in self._label_classifiers and column in group:
            share = self.reference_seconds / (1 if joint else len(columns))
            classifier = self._fit(media_column, group, share)
            if classifier is None:
                return None
            self._label_classifiers[media_column, group] = classifier
        return self._label_classifiers.get((media_column, group))

    def small_cnn(self, media_column: str, column: str) -> LabelClassifier | None:
        """A small CNN fitted for `alternative_seconds`, or the one that was fitted so on these data before; None where
        train has too few records of a label."""
        assert self.alternative_seconds is not None
        return self._fit(media_column, (column,), self.alternative_seconds, keep=True)

    def _fit(
        self, media_column: str, group: tuple[str, ...], seconds: float, keep: bool = False
    ) -> LabelClassifier | None:
        """A judge of a media column; with `keep` in the user's cache, from where it comes the next time."""
        train, modality = self.samples(media_column, "train"), self.modality(media_column)
        truth = [tuple(self.texts[c][i] for c in group) for i in train.indices]
        labelled = np.array([any(value is not None for value in row) for row in truth], bool)
        rows = [row for row, there in zip(truth, labelled, strict=True) if there]
        classes = list(dict.fromkeys(rows))
        if len(classes) < 2 or len(rows) < 2 * len(classes):
            return None
        samples = train.only(labelled).samples

        def augment(places: np.ndarray, uniforms: Tensor) -> Tensor:
            values, lengths = modality.batch([samples[i] for i in places])
            values, lengths = modality.augment(values, lengths, uniforms.float())
            changed = list(values.numpy())
            if modality.variable_length:
                changed = [value[:size] for value, size in zip(changed, lengths.tolist(), strict=True)]
            return modality.features(changed)  # type: ignore[arg-type]

        def fit() -> ReferenceClassifier:
            self.progress(f"a small CNN for {seconds:.0f} s" if keep else f"judge of {media_column}", 0, 1)
            number = {value: i for i, value in enumerate(classes)}
            return fit_classifier(
                self.features(media_column, samples[:512]),
                np.array([number[row] for row in rows]),
                len(classes),
                seconds=seconds,
                seed=self.seed,
                augment=augment,
                device=self.device,
            )

        name = media_column if len(group) > 1 or len(self.labels) == 1 else f"{media_column}_{group[0]}"
        if keep:
            judge, known = kept_judges.kept(self._identity(media_column, group, seconds, classes), fit)
            judge.network.to(self.device)
            if known:
                self.note(f"The small CNN was fitted before ({judge.steps:,} steps in {judge.seconds:.0f} s).")
            name = f"small_cnn_{name}"
        else:
            judge, name = fit(), f"judge_{name}"
        self.keep(TIMING, Direction(name), "seconds", judge.seconds)
        self.keep(TIMING, Direction(name), "steps", judge.steps)
        return LabelClassifier(judge, list(group), classes)

    def _identity(
        self, media_column: str, group: tuple[str, ...], seconds: float, classes: list[tuple[str | None, ...]]
    ) -> dict[str, Any]:
        """All that a judge follows from, but for the speed of the machine."""
        settings: Any = self.modality(media_column).settings
        return {
            "data": [shard.sha256 for shard in self.dataset.manifest.shards],
            "train": hashlib.sha256(self.dataset.indices("train").tobytes()).hexdigest(),
            "column": media_column,
            "labels": list(group),
            "classes": classes,
            "settings": settings.model_dump(mode="json"),
            "records": self.limits.training,
            "seconds": round(seconds),
            "seed": self.seed,
            "device": self.device.type,
        }


class Timer:
    """Seconds of the stages of an evaluation, kept as figures."""

    def __init__(self, eval_context: EvalContext) -> None:
        self.eval_context, self.start = eval_context, time.perf_counter()

    def lap(self, stage: str) -> None:
        """Keep the seconds since the last lap as those of a stage."""
        now = time.perf_counter()
        self.eval_context.keep(TIMING, Direction(stage), "seconds", now - self.start)
        self.start = now


def quotient_error(top: float, top_error: float, bottom: float, bottom_error: float) -> float:
    """Standard error of top / bottom for two independent figures, to first order; nan where it means nothing."""
    if not top or not bottom:
        return math.nan
    return abs(top / bottom) * math.hypot(top_error / top, bottom_error / bottom)
