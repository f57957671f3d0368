"""What people give, as sequences that the model reads: texts, images, audio clips, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from plait.core.errors import PlaitError
from plait.inference.base import Verb
from plait.modalities.base import MediaModality, Vocabulary
from plait.modalities.descriptor import MediaError
from plait.modalities.inputs import plain_input
from plait.modalities.media import MEDIA, kind_of_file
from plait.modalities.video_files import Clip
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import Sequence


class Reading:
    """How inputs, as `plait.Model` describes them, become sequences; a part of it."""

    checkpoint: Checkpoint
    vocabulary: Vocabulary

    @property
    def columns(self) -> dict[str, str]:
        """Column -> modality, in the data's order; a model of plain text has none."""
        return self.vocabulary.columns

    @property
    def labels(self) -> dict[str, list[str]]:
        """Text column -> its few distinct values, where they are few."""
        return self.checkpoint.labels

    @property
    def modalities(self) -> set[str]:
        """The modalities of its columns."""
        return set(self.columns.values())

    @property
    def verbs(self) -> list[str]:
        """What this model can do."""
        kinds = set(self.columns.values())
        written = kinds - set(self.checkpoint.model.config.read_only)
        verbs: list[str] = [Verb.GENERATE, *([Verb.CLASSIFY] if "text" in kinds else [])]
        verbs += [files.verb for kind, files in MEDIA.items() if {kind, "text"} <= kinds]
        verbs += [files.writes for kind, files in MEDIA.items() if kind in written and files.writes]
        return list(dict.fromkeys(verbs)) + ([Verb.EMBED] if self.checkpoint.model.config.embed_dim else [])

    def column(self, name: str | None, modality: str, verb: str) -> str:
        """The column to use: the one asked for, which must be of this modality, or the first of its modality."""
        if name is not None:
            if name not in self.columns:
                raise PlaitError(f"There is no column '{name}'. The columns are {', '.join(self.columns) or 'none'}.")
            if self.columns[name] != modality:
                raise PlaitError(f"Column '{name}' holds {self.columns[name]}, not {modality}.")
            return name
        for column, kind in self.columns.items():
            if kind == modality:
                return column
        raise PlaitError(f"This model cannot {verb}: it has no {modality}. It can {', '.join(self.verbs)}.")

    def context(self, parts: Any, column: str | None = None) -> Sequence:
        """Parts in their order, and the opener of `column` where one is to be written next.

        A part is an input as `plait.Model` describes it. Raises PlaitError for an audio clip longer than the model's
        window.
        """
        sequence = Sequence()
        if not self.columns:  # an import: its texts begin as it was trained to read them
            sequence.read_ids(self.checkpoint.text.start)
        for part in parts if isinstance(parts, list) else [parts]:
            name, windows = self._windows(part)
            if isinstance(windows, str):
                sequence.read_ids(self.checkpoint.text.encode(windows), "text")
                continue
            if len(windows) > 1:
                seconds = getattr(self.modality(name).settings, "seconds", "?")
                raise PlaitError(
                    f"The audio is longer than the {seconds} s that this model reads at once. Cut it; classify, embed "
                    "and transcribe read longer ones in windows."
                )
            self._read(sequence, name, windows[0])
        if column is not None:
            if column not in self.columns:
                raise PlaitError(f"There is no column '{column}'. The columns are {', '.join(self.columns) or 'none'}.")
            sequence.read_ids([self.vocabulary.opener(column)])
        return sequence

    def _read(self, sequence: Sequence, column: str, sample: np.ndarray) -> Sequence:
        vocabulary = self.vocabulary
        return sequence.read_media(self.modality(column), vocabulary.opener(column), sample, vocabulary.pad)

    def modality(self, column: str) -> MediaModality:
        """The modality of a column of media."""
        return self.checkpoint.model.media[self.columns[column]]

    def _windows(self, part: Any) -> tuple[str, list[np.ndarray] | str]:
        """A part's column and its samples: usually one, several where an audio clip is long; a text stays a str."""
        column = None
        if isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], str):
            column, part = part
            if column not in self.columns:
                raise PlaitError(f"There is no column '{column}'. The columns are {', '.join(self.columns) or 'none'}.")
            if isinstance(part, str) and self.columns[column] == "text":
                return column, part
            if isinstance(part, np.ndarray | list):
                return column, part if isinstance(part, list) else [part]
        if isinstance(part, str):
            return "", part
        part = plain_input(part)
        kind, name = _kind(part)
        column = self.column(column, kind, f"read {kind}")
        try:
            return column, self.modality(column).windows(part)
        except MediaError as error:
            raise PlaitError(f"{name}: {error}.") from error

    def window_count(self, value: Any) -> int:
        """How many windows `classify`, `transcribe` and `embed` read an input in."""
        windows = self._windows(value)[1]
        return 1 if isinstance(windows, str) else len(windows)

    def alone(self, value: Any, limit: int) -> list[Sequence]:
        """An input as the sequences that cover it, each of at most `limit` tokens of text or one window of a medium,
        and each with its span."""
        column, windows = self._windows(value)
        if not isinstance(windows, str):
            return [self._read(Sequence(), column, sample) for sample in windows]
        ids = self.checkpoint.text.encode(windows)
        return [Sequence().read_ids(ids[i : i + limit], "text") for i in range(0, max(len(ids), 1), limit)]

    def _opened(self, context: Sequence, column: str) -> Sequence:
        """The context, ending with the column's opener."""
        opener = self.vocabulary.opener(column)
        if context.ids and context.ids[-1] == opener:
            return context
        copy = Sequence(list(context.ids), list(context.targets), list(context.media), list(context.spans))
        return copy.read_ids([opener])

    def start(self) -> Sequence:
        """What an empty prompt becomes: the opener of the first text column, or an imported model's end token."""
        for column, kind in self.columns.items():
            if kind == "text":
                return Sequence().read_ids([self.vocabulary.opener(column)])
        if self.vocabulary.end_id is None:
            raise PlaitError("The prompt is empty, and this model has no token to begin with. Give it some text.")
        return Sequence().read_ids([self.vocabulary.end_id])


def _kind(part: Any) -> tuple[str, str]:
    """The modality of a raw medium, by what it is or by a file's first bytes, and a name for messages."""
    if isinstance(part, (PILImage.Image, np.ndarray)):
        return "image", "the image"
    if isinstance(part, tuple) and len(part) == 2:
        return "audio", "the audio"
    if isinstance(part, Clip):
        return "video", "the video"
    if isinstance(part, (Path, bytes)):
        name, head = "the medium", part[:64] if isinstance(part, bytes) else b""
        if isinstance(part, Path):
            name = str(part)
            try:
                with part.open("rb") as file:
                    head = file.read(64)
            except OSError as error:
                raise PlaitError(f"{part} cannot be read: {error.strerror or error}.") from error
        kind = kind_of_file(head, part.suffix if isinstance(part, Path) else "")
        if kind is None:
            raise PlaitError(f"{name} is no image, audio clip or video that can be read.")
        return kind, name
    raise PlaitError(
        f"An input of type {type(part).__name__} is none that can be read. Give a str, a PIL image, (waveform, rate), "
        "a pathlib.Path or bytes of a media file."
    )
