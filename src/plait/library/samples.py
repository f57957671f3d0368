"""While a model trains, what it can do by now is written into its run, and how far it is."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from plait.core.errors import PlaitError
from plait.core.files import json_text
from plait.data.dataset import Dataset
from plait.data.record import Record
from plait.inference.model import model_of
from plait.inference.showcase import Shown
from plait.modalities.audio_files import encode_wav
from plait.training.callbacks import Callback, StartEvent, StepEvent, ValidationEvent
from plait.training.run import Progress
from plait.training.samples import Row, Sample, SampleLog

RECORDS = 40  # of val, of which a few are asked about
LARGEST = 200_000_000  # parameters of a model that is copied for this
PROGRESS = "progress.json"
PAUSE = 0.5  # seconds between two states of the progress


class ModelSamples(Callback):
    """Writes what the model can do into its run after validations, where there is time for it.

    Args:
        run: The run's folder.
        dataset: What it is trained on.
        device: Where it is asked, as in `plait.train`.
    """

    def __init__(self, run: Path, dataset: Dataset, device: str) -> None:
        self.log, self.dataset, self.device = SampleLog(run), dataset, device
        self.total = self.parameters = 0

    def on_start(self, event: StartEvent) -> None:
        self.total, self.parameters = event.total_steps, sum(event.parameters.values())

    def on_step(self, event: StepEvent) -> None:
        self.total = event.total_steps

    def on_validation(self, event: ValidationEvent) -> None:
        if event.copy is not None and self.parameters <= LARGEST:
            self.log.add("model", "", event.step, self.total, lambda: self._row(event))

    def _row(self, event: ValidationEvent) -> Row:
        assert event.copy is not None
        model = model_of(event.copy(), self.device)
        shown = enumerate(model.showcase(self._records()))
        samples = [self._file_sample(one, event.step, place) for place, one in shown]
        return Row("model", "", event.step, self.total, samples)

    def _records(self) -> list[Record]:
        """A few records of val, or of train where there is none; none of a dataset that holds something else."""
        if self.dataset.manifest.kind != "records":
            return []
        split = "val" if self.dataset.manifest.counts.get("val") else "train"
        return list(self.dataset.iterate(self.dataset.indices(split)[:RECORDS]))

    def _file_sample(self, shown: Shown, step: int, place: int) -> Sample:
        """What was shown, with its media as files."""
        prompt = shown.asked if isinstance(shown.asked, str) else ""
        asked_file = "" if isinstance(shown.asked, str) else self.log.keep(f"model-{place}.input", shown.asked)
        answer, file = "", ""
        if isinstance(shown.answer, str):
            answer = shown.answer
        elif isinstance(shown.answer, Image.Image):
            buffer = io.BytesIO()
            shown.answer.save(buffer, "PNG")
            file = self.log.keep(f"model-{place}-{step:06d}.png", buffer.getvalue())
        else:
            file = self.log.keep(f"model-{place}-{step:06d}.wav", encode_wav(*shown.answer))
        chance = None if shown.probability is None else round(float(shown.probability), 4)
        return Sample(shown.kind, prompt, asked_file, answer, file, shown.wanted, chance)


def recorded(run: Path, show: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """What the trainer tells, also written to the run's `progress.json`: work, stage, done, total, seconds_left."""
    begun: dict[str, tuple[float, int]] = {}  # stage -> when it was first heard of, and how far it was
    last_write = 0.0

    def tell(progress: Progress) -> None:
        nonlocal last_write
        show(progress)
        now = time.time()
        work = "model" if progress.work == "validation" else progress.work  # no stage of its own
        stage = "model" if work == "model" else progress.stage
        start, first = begun.setdefault(stage, (now, progress.done))
        if work == "other" or (now - last_write < PAUSE and progress.done < progress.total):
            return
        last_write = now
        left = None
        if progress.done > first:
            left = (progress.total - progress.done) * (now - start) / (progress.done - first)
        state = {"work": work, "stage": stage, "done": progress.done, "total": progress.total,
                 "seconds_left": left, "time": now}  # fmt: skip
        temporary = run / f".{PROGRESS}.{os.getpid()}.tmp"
        try:  # not synced: after a loss of power the next state takes its place
            temporary.write_text(json_text(state), encoding="utf-8")
            temporary.replace(run / PROGRESS)
        except OSError as error:
            raise PlaitError(f"Cannot write {run / PROGRESS}: {error.strerror}. Free space, then go on.") from error

    return tell
