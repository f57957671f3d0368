"""What lies in a project: its files with their labels, thumbnails and waveforms."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from plait.core.errors import PlaitError
from plait.core.files import sha256_file
from plait.data.files import TABLE_SUFFIXES, suffix_of
from plait.modalities.descriptor import MediaError
from plait.modalities.media import MEDIA, Checker, kind_of_suffix
from plait.studio import metadata
from plait.studio.labels import LabelEdits
from plait.studio.workspace import Project

TEXT_SUFFIXES = {*TABLE_SUFFIXES, ".txt", ".md"}  # files of which the page shows the beginning
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
SIDE = 160  # pixels of a thumbnail
EXCERPT = 400  # characters of a text file that are shown


@dataclass(frozen=True)
class Item:
    """A file of a project.

    Attributes:
        path: Relative to the project's source, with slashes.
        kind: "image", "audio", "video", "text", or "other" for what is not read.
        label: "" where it has none.
    """

    path: str
    kind: str
    label: str


@dataclass(frozen=True)
class Listing:
    """All files of a project that are in use.

    Attributes:
        items: By label, then path.
        labels: Label -> number of files, the most frequent first; "" for files without one.
        removed: How many files edits have left out.
    """

    items: tuple[Item, ...]
    labels: dict[str, int]
    removed: int

    def of_label(self, label: str | None) -> list[Item]:
        """The items of a label, all of them for None."""
        return [item for item in self.items if label is None or item.label == label]


def list_project(project: Project) -> Listing:
    """The files of a project, read from the disk; kept in memory until a folder or the edits change."""
    edits = project.folder / "labels.jsonl"
    # By content: two edits may fall into one tick of the file system's clock.
    stamp = sha256_file(edits) if edits.exists() else ""
    return _listing(project, edits, stamp, _state(project.source))


def _state(source: Path) -> int:
    """A number that changes when a file is added to or removed from any folder below `source`, or the table changes."""
    if source.is_file():
        return source.stat().st_mtime_ns
    times = [(folder, len(files), Path(folder).stat().st_mtime_ns) for folder, _, files in os.walk(source)]
    tables = [(name, table.stat().st_mtime_ns) for name in metadata.NAMES if (table := source / name).is_file()]
    return hash((tuple(times), tuple(tables)))


@lru_cache(maxsize=8)
def _listing(project: Project, edits: Path, stamp: str, state: int) -> Listing:
    paths = _files(project.source)
    labels = LabelEdits(edits).apply(_given_labels(project, paths))
    items = [Item(path, kind_of(path), labels.get(path) or "") for path in paths
             if labels.get(path, "") is not None and path not in metadata.NAMES]  # fmt: skip
    items.sort(key=lambda item: (item.label == "", item.label, item.path))
    counts = Counter(item.label for item in items if item.kind in MEDIA)
    removed = sum(label is None for label in labels.values())
    return Listing(tuple(items), dict(counts.most_common()), removed)


def _given_labels(project: Project, paths: list[str]) -> dict[str, str]:
    """Medium -> the label that it came with: by the table beside the media where there is one, else by its folder."""
    media = [path for path in paths if kind_of(path) in MEDIA]
    table = metadata.user_table(project)
    if table is None:
        return {path: _folder_label(path) for path in media}
    rows = metadata.read_table(table)
    return {path: str(next(iter(rows.get(path, ())), {}).get(metadata.LABEL) or "") for path in media}


def _files(source: Path) -> list[str]:
    if source.is_file():
        return [source.name]
    paths = []
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith(("._", ".", "__MACOSX")))
        inside = Path(folder)
        for name in files:
            if not name.startswith(".") and not (inside / name).is_symlink():
                paths.append((inside / name).relative_to(source).as_posix())
    return paths


def kind_of(path: str) -> str:
    """What a file is, by its ending; what is wrong inside shows when it is prepared."""
    suffix = suffix_of(Path(path).name)
    return kind_of_suffix(suffix) or ("text" if suffix in TEXT_SUFFIXES else "other")


def _folder_label(path: str) -> str:
    """The nearest folder's name, unless it is the name of a split."""
    folder = Path(path).parent.name
    return "" if folder.lower() in SPLITS and len(Path(path).parts) == 2 else folder


def write_labels(project: Project) -> None:
    """Write `metadata.jsonl` beside uploaded files where labels were edited, for `plait prepare` to read."""
    if project.linked is not None:
        return
    if LabelEdits(project.folder / "labels.jsonl").edits:
        metadata.write_table(project, labelled_rows(project))
    else:
        metadata.restore_table(project)


def labelled_rows(project: Project) -> list[metadata.Row]:
    """The rows of a project's media with their labels after all edits, as `metadata.jsonl` holds them, by file.

    A record's id is its path, as it is for files without such a table: an edit changes one label and no id. What the
    user's own table says of a medium beside its label stays.
    """
    table = metadata.user_table(project)
    user_rows = metadata.read_table(table) if table else {}
    labelled: list[metadata.Row] = []
    for item in sorted(list_project(project).items, key=lambda item: item.path):
        if item.kind not in MEDIA or (table and item.path not in user_rows and not item.label):
            continue
        rows = user_rows.get(item.path, [{}])
        for number, row in enumerate(rows):
            user_columns = {name: value for name, value in row.items() if value is not None and name != metadata.LABEL}
            label = {metadata.LABEL: item.label} if item.label else {}
            unique = item.path if len(rows) == 1 else f"{item.path}#{number}"
            labelled.append({"id": unique, **user_columns, MEDIA[item.kind].file_column: item.path, **label})
    return labelled


# --- previews ---------------------------------------------------------------------------------------------------


class Previews:
    """Thumbnails and waveforms, kept in `NAME/.cache`; media are decoded in a process of their own."""

    def __init__(self) -> None:
        self.checker = Checker(patience=20)

    def close(self) -> None:
        self.checker.close()

    def image(self, project: Project, path: Path, kind: str) -> bytes:
        """A PNG of a file: the image made small, or the waveform of audio. Raises PlaitError for what cannot be
        decoded."""
        state = path.stat()
        key = hashlib.sha256(f"{path}\0{state.st_size}\0{state.st_mtime_ns}".encode()).hexdigest()[:24]
        cached = project.folder / ".cache" / f"{key}.png"
        if cached.is_file():
            return cached.read_bytes()
        try:
            value = self.checker.decode(kind, path.read_bytes())
        except (MediaError, OSError) as error:
            raise PlaitError(f"{path.name}: {error}") from error
        picture = thumbnail(value) if isinstance(value, Image.Image) else waveform(_wave(value))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        with contextlib.suppress(OSError):  # a full disk, or one that is only read: it is made again next time
            cached.parent.mkdir(exist_ok=True)
            temporary = cached.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(buffer.getvalue())
            temporary.replace(cached)
        return buffer.getvalue()


def _wave(value: object) -> np.ndarray:
    """The samples of decoded audio, mono float32."""
    wave = np.asarray(value[0] if isinstance(value, tuple) else value, np.float32)
    return wave.mean(-1) if wave.ndim == 2 else wave


def thumbnail(image: Image.Image) -> Image.Image:
    """An image of at most SIDE x SIDE pixels; tiny ones are enlarged without smoothing, so that pixels show."""
    image = image.convert("RGB")
    if max(image.size) * 2 <= SIDE:
        factor = SIDE // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return ImageOps.contain(image, (SIDE, SIDE))


def waveform(wave: np.ndarray, width: int = SIDE, height: int = 64) -> Image.Image:
    """The loudest samples over time as bars, (width, height) pixels."""
    edges = np.linspace(0, len(wave), width // 2 + 1).astype(int)
    peaks = np.array([np.abs(wave[a:b]).max(initial=0.0) for a, b in pairwise(edges)])
    peaks = peaks / max(float(peaks.max(initial=0.0)), 1e-6)
    pixels = np.full((height, width, 3), 255, np.uint8)
    for column, peak in enumerate(peaks):
        half = max(int(peak * (height - 4) / 2), 1)
        pixels[height // 2 - half : height // 2 + half, 2 * column] = (72, 92, 199)
    return Image.fromarray(pixels)
