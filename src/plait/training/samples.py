"""What a model can do by now, written into its run while it trains: `samples/samples.jsonl`, with media beside it.

An encoder that learns labels names three records of val; a codec gives three media back; the model draws, speaks and
answers (`plait.library.samples`). Samples are made when they are due and cost at most two percent of the time; they
change nothing of what is trained.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from plait.modalities.base import MediaModality
from plait.modalities.recogniser import Recogniser

if TYPE_CHECKING:
    from plait.training.recogniser_training import Labelled

FOLDER, FILE = "samples", "samples.jsonl"
SHARE = 0.02  # of the time, at most
EVERY = 0.05  # of a stage's steps that lie between two rows, at least
INPUTS = 3  # that are asked about again and again
JUDGED = 100  # records that an encoder is measured on

Stage = Literal["encoder", "codec", "model"]


@dataclass(frozen=True)
class Sample:
    """One thing that was asked, and what was answered.

    Attributes:
        kind: "image", "audio" or "text": what was answered.
        asked: The words that were given, "" for a medium.
        asked_file: The file of the medium that was given, in the run's `samples` folder; "" for words.
        answer: The words of the answer, "" for a medium.
        file: The file of the answer, "" for words.
        wanted: The right answer, "" where there are many.
        probability: Of the answer, None where there is none.
    """

    kind: str
    asked: str = ""
    asked_file: str = ""
    answer: str = ""
    file: str = ""
    wanted: str = ""
    probability: float | None = None


@dataclass(frozen=True)
class Row:
    """What was answered at one time.

    Attributes:
        stage: What was learning: an encoder, a codec or the model.
        name: The modality of an encoder or codec, "" for the model.
        step: Steps of the stage by then.
        total: Steps of the stage as planned.
        share: Records of val that were named right, None where that was not measured.
        samples: What was asked and answered, in the same order at each time.
    """

    stage: Stage
    name: str
    step: int
    total: int
    samples: list[Sample] = field(default_factory=list)
    share: float | None = None


class SampleLog:
    """The file that samples are written into, and the time that they may take.

    Args:
        run: The run's folder.
        share: Of the time since now that making samples may take.
    """

    def __init__(self, run: Path, share: float = SHARE) -> None:
        self.folder, self.share = run / FOLDER, share
        self.began, self.spent, self.last = time.perf_counter(), 0.0, 0.0
        self.steps: dict[tuple[str, str], int] = {}  # of a stage's last row

    def due(self, stage: Stage, name: str, step: int, total: int) -> bool:
        """Whether a row is due: the stage has gone on, and there is time for one that costs as much as the last."""
        before = self.steps.get((stage, name))
        if before is not None and step - before < EVERY * total and step < total:
            return False
        return self.spent + self.last <= self.share * (time.perf_counter() - self.began)

    def add(self, stage: Stage, name: str, step: int, total: int, make: Callable[[], Row]) -> None:
        """Write a row where one is due. What goes wrong in making it is written down in its place: it may not end a
        training. Random numbers of training stay as they were."""
        if not self.due(stage, name, step, total):
            return
        begun = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                row = asdict(make())
        except Exception as error:
            row = {"stage": stage, "name": name, "step": step, "total": total, "error": str(error)[:300]}
        if row.get("samples") or "error" in row:
            with (self.folder / FILE).open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.steps[stage, name] = step
        self.last = time.perf_counter() - begun
        self.spent += self.last

    def keep(self, name: str, data: bytes) -> str:
        """Write a medium beside the rows; returns its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)
        return name

    def keep_sample(self, name: str, modality: MediaModality, sample: np.ndarray) -> str:
        """Write a sample of a modality as a file of its kind; returns its name."""
        data = modality.to_bytes(sample)
        return self.keep(f"{name}.{'png' if data[:4] == bytes([0x89]) + b'PNG' else 'wav'}", data)


class EncoderSamples:
    """What an encoder that learns labels says about a few records of val, and how many of them it names right.

    Args:
        log: Where to.
        modality: The encoder's.
        data: Records of val, or of train where there is none.
        labels: Of the first column, in the order of its classes.
    """

    def __init__(self, log: SampleLog, modality: MediaModality, data: Labelled, labels: list[str]) -> None:
        assert isinstance(modality.encoder, Recogniser)
        self.log, self.modality, self.encoder = log, modality, modality.encoder
        self.labels, self.samples = labels, data.samples
        self.classes = data.classes[self.encoder.columns[0]]
        known = np.flatnonzero(self.classes >= 0)
        self.places = known[np.linspace(0, len(known) - 1, min(JUDGED, len(known))).astype(int)]
        _, first = np.unique(self.classes[self.places], return_index=True)
        self.shown = [int(i) for i in np.sort(first)[:INPUTS]]  # of places: one a label

    def __call__(self, step: int, total: int) -> None:
        """Write what it says now, where that is due."""
        if len(self.places):
            self.log.add("encoder", self.modality.name, step, total, lambda: self._answer(step, total))

    def _answer(self, step: int, total: int) -> Row:
        values, lengths = self.modality.batch([self.samples[i] for i in self.places])
        if self.modality.variable_length:
            values = values[:, : int(lengths.max())]
        device = next(self.encoder.parameters()).device
        self.encoder.learn(False)
        try:
            logits = self.encoder.logits(values.to(device), lengths.to(device))[self.encoder.columns[0]]
        finally:
            self.encoder.learn(True)
        chances, answers = logits.float().softmax(1).cpu().max(1)
        rows = []
        for i in self.shown:
            place, answer = int(self.places[i]), int(answers[i])
            shown = self.log.keep_sample(f"{self.modality.name}-{place}", self.modality, self.samples[place])
            label = self.labels[int(self.classes[place])]
            chance = round(float(chances[i]), 4)
            rows.append(Sample("text", asked_file=shown, answer=self.labels[answer], wanted=label, probability=chance))
        share = float(np.mean(answers.numpy() == self.classes[self.places]))
        return Row("encoder", self.modality.name, step, total, rows, round(share, 4))


class CodecSamples:
    """What a codec makes of a few media: it gives back what it was given.

    Args:
        log: Where to.
        modality: The codec's.
        samples: Of which the first, a middle and the last are taken.
    """

    def __init__(self, log: SampleLog, modality: MediaModality, samples: list[np.ndarray]) -> None:
        self.log, self.modality, self.samples = log, modality, samples

    def __call__(self, step: int, total: int) -> None:
        """Write what it gives back now, where that is due."""
        if self.samples:
            self.log.add("codec", self.modality.name, step, total, lambda: self._given_back(step, total))

    def _given_back(self, step: int, total: int) -> Row:
        name, codec = self.modality.name, self.modality.codec
        values, lengths = self.modality.batch(self.samples)
        codec.eval()
        try:
            codes = codec.encode(values, lengths)
            rebuilt = [
                codec.decode(codes[i : i + 1, : self.modality.code_count(len(sample))])[0].numpy()
                for i, sample in enumerate(self.samples)
            ]
        finally:
            codec.train()
        rows = []
        for i, (sample, back) in enumerate(zip(self.samples, rebuilt, strict=True)):
            shown = self.log.keep_sample(f"codec-{name}-{i}", self.modality, sample)
            file = self.log.keep_sample(f"codec-{name}-{i}-{step:06d}", self.modality, back)
            rows.append(Sample(name, asked_file=shown, file=file))
        return Row("codec", name, step, total, rows)


def places_shown(count: int) -> list[int]:
    """The places of the first, a middle and the last of so many things."""
    return sorted({int(i) for i in np.linspace(0, count - 1, INPUTS)}) if count else []
