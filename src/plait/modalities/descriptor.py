"""What a modality says of files: which are its own, how to decode them, what to show of them.

Imports no torch, so that `plait prepare` and the processes that check media start fast. A modality's descriptor is in
its file (image_files.py, audio_files.py, video_files.py); `media.py` holds the registry that all others ask.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from plait.core.dist import install_command
from plait.core.rejects import Reason, RejectKind

if TYPE_CHECKING:
    from PIL import Image as PILImage


class MediaError(ValueError):
    """An image, audio or video that cannot be used. The message is a short reason for people; `reason` has its kind."""

    def __init__(self, detail: str, kind: RejectKind = RejectKind.DAMAGED) -> None:
        super().__init__(detail, kind)
        self.reason = Reason(kind, detail)

    def __str__(self) -> str:
        return str(self.reason)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a media file may ask for."""

    file_bytes: int = 64 << 20
    pixels: int = 40_000_000
    seconds: float = 600.0
    samples: int = 64_000_000  # frames x channels
    channels: int = 16


LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format: how it is called, the endings it goes by, its media type, and what decodes it."""

    name: str
    suffixes: tuple[str, ...]
    media_type: str
    needs: str = ""  # a package of the extra `media`, where Plait's own dependencies do not read the format

    def decoder_missing(self) -> bool:
        """Whether the package that reads this format is not installed."""
        from importlib.util import find_spec

        return bool(self.needs) and find_spec(self.needs) is None


@dataclasses.dataclass(frozen=True)
class Packed:
    """A decoded medium on its way from one process to another: what it is, and its bytes."""

    facts: dict[str, Any]
    body: bytes


class Comparison(StrEnum):
    """The ways in which fingerprints are compared (`plait.data.near`)."""

    PIXELS = "pixels"
    SPECTROGRAM = "spectrogram"


class MediaFiles(ABC):
    """The files of a modality. Values are what its `decode` returns."""

    kind: ClassVar[str]  # "image"
    verb: ClassVar[str]  # the command that puts such a file into words: "describe"
    formats: ClassVar[tuple[Format, ...]]
    unit: ClassVar[str]  # of `length`
    comparison: ClassVar[Comparison]  # how its fingerprints are compared
    writes: ClassVar[str]  # the command that makes such a file from words: "draw"
    element: ClassVar[Literal["img", "audio", "video"]]  # of HTML, which shows such a file
    file_column: ClassVar[str]  # of a `metadata.jsonl` that names such files
    simple_model: ClassVar[str]  # what `simple_features` and a linear model are called, for people

    @abstractmethod
    def sniff(self, head: bytes) -> str | None:
        """The name of the format that a file's first 64 bytes or more show, or None where it is none of this kind's."""

    @abstractmethod
    def decode(self, data: bytes | Path, limits: Limits = LIMITS) -> Any:
        """The medium, whole. Raises MediaError where it is damaged, of another format or beyond the limits, before
        memory is asked for."""

    @abstractmethod
    def check(self, data: bytes, limits: Limits = LIMITS) -> dict[str, Any]:
        """What decoding shows, for people and programs; keeps nothing. Raises MediaError."""

    @abstractmethod
    def facts(self, value: Any) -> tuple[float, float]:
        """Two figures of a decoded medium: width and height, or seconds and rate."""

    @abstractmethod
    def length(self, first: Any, second: Any) -> Any:
        """The length in `unit` from the two figures (numbers, or arrays of them)."""

    @abstractmethod
    def size_name(self, first: float, second: float) -> str:
        """What the two figures say, for people: "640x480", "8000 Hz"."""

    def look(self, data: bytes, fingerprint: bool) -> tuple[float, float, bytes]:
        """The facts of a file that holds all it claims to hold, and its fingerprint, empty unless it is wanted. Raises
        MediaError as `decode` does."""
        value = self.decode(data)
        return *self.facts(value), self.fingerprint(value) if fingerprint else b""

    @abstractmethod
    def fingerprint(self, value: Any) -> bytes:
        """A few hundred bytes that survive resizing, re-encoding and cropping."""

    @abstractmethod
    def preview(self, data: bytes, value: Any) -> bytes:
        """The medium, encoded, small enough to be kept in an index or shown in a browser."""

    @abstractmethod
    def page_preview(self, data: bytes) -> bytes:
        """The bytes of a file as a report shows it: of some 100 KB, to look at or to listen to. Raises MediaError."""

    @abstractmethod
    def tile(self, preview: bytes, side: int) -> PILImage.Image:
        """What `preview` made, on a square of `side` pixels. Raises MediaError."""

    @abstractmethod
    def message_part(self, data: bytes, form: str) -> dict[str, Any]:
        """A file as a part of OpenAI's messages; `form` is its format's name."""

    @abstractmethod
    def simple_features(self, samples: Sequence[np.ndarray], bands: int) -> np.ndarray:
        """Features that need no training: samples as the modality fits them, to float32 (N, F). `bands` is the setting
        of that name, 0 where the modality has none."""

    def simple_weights(self, features: int) -> np.ndarray:
        """How much each of so many simple features counts once they are scaled alike, (F,)."""
        return np.ones(features, np.float32)

    @abstractmethod
    def pack(self, value: Any) -> Packed:
        """A decoded medium for another process; a large image comes reduced."""

    @abstractmethod
    def unpack(self, packed: Packed) -> Any:
        """What `pack` made, as `decode` gives it."""

    @property
    def suffixes(self) -> frozenset[str]:
        """The endings of this kind's files, with the dot, in lower case."""
        return frozenset(suffix for form in self.formats for suffix in form.suffixes)

    @property
    def format_names(self) -> str:
        """The formats that are read, for people."""
        return ", ".join(form.name for form in self.formats)

    def read(self, data: bytes | Path, limits: Limits) -> tuple[bytes, Format]:
        """A file's bytes and its format. Raises MediaError where it is empty, too large or of no format that is read
        here."""
        if not isinstance(data, bytes):
            try:
                with Path(data).open("rb") as file:
                    data = file.read(limits.file_bytes + 1)
            except OSError as error:
                raise MediaError(f"cannot be read: {error.strerror or error}", RejectKind.UNREADABLE) from error
        if not data:
            raise MediaError("the file is empty", RejectKind.EMPTY)
        if len(data) > limits.file_bytes:
            raise MediaError(f"larger than {limits.file_bytes >> 20} MiB", RejectKind.TOO_LARGE)
        name = self.sniff(data[:64])
        if name is None:
            from plait.modalities.media import sniff

            other = sniff(data[:64])
            what = f"{other[1]}, not {self.kind}" if other else "of an unknown format"
            raise MediaError(f"the content is {what} (read are {self.format_names})", RejectKind.UNKNOWN_FORMAT)
        form = next(form for form in self.formats if form.name == name)
        if form.decoder_missing():
            raise MediaError(f"{name} needs the extra media: {install_command('media')}", RejectKind.NEEDS_EXTRA)
        return data, form


def short(error: BaseException) -> str:
    """An error of a decoder, short enough for a list of reasons."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.replace("Error opening <_io.BytesIO object>: ", "")
    if "<_io.BytesIO" in text:
        return "it cannot be identified"
    return text[:160].rstrip(".")


def container_brand(head: bytes) -> bytes | None:
    """The brand of a file in the ISO base media format (HEIC, AVIF, MP4, M4A, MOV, 3GP), from its first bytes."""
    if head[4:8] == b"ftyp" and len(head) >= 12:
        return head[8:12]
    # QuickTime files of old begin with another box.
    return b"qt  " if head[4:8] in (b"moov", b"mdat", b"wide") else None
