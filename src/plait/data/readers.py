"""What people have -> records not yet checked: idx files, texts, media in folders; tables are in `tables.py`.

`plan` decides how a source is read; each reader yields `RawRecord`s and `Rejected` lines. The bytes of a medium are
fetched later, when the record is prepared.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np

from plait.core.errors import PlaitError
from plait.core.rejects import Reason, RejectKind
from plait.data.files import (
    DAMAGED,
    Item,
    Media,
    Plan,
    RawRecord,
    Tree,
    idx_name,
    open_text,
    suffix_of,
    unread,
)
from plait.data.folders import Folders
from plait.data.record import RESERVED, Rejected, split_name, split_of_file
from plait.data.stores import Location, open_binary, raise_if_passing
from plait.data.tables import plan_tables
from plait.data.webdataset import plan_shards
from plait.modalities.descriptor import LIMITS
from plait.modalities.media import MEDIA, kind_of_suffix, known_formats

TEXT_BYTES = 8192  # of one record of a long text
TAILS = ((0.9, "val"), (0.95, "test"))  # where the splits of a text begin, where there are few
BESIDE = (".txt", ".srt", ".vtt")  # of a medium's text
LISTED_SHARE = 0.8  # of the lines of a list of transcripts that begin with the name of a medium
LINE_MOST = 1 << 16  # characters of such a line
FEW_TEXTS = 20  # files, below which each of them is cut at its last tenth: a split by file would hang on one or two
WORTH_CUTTING = 1000  # characters of one of several files; a shorter one is trained on as a whole

# --- idx files, as MNIST ships them -----------------------------------------------------------------------------


def _open_idx(path: Location, name: str) -> IO[bytes]:
    file = open_binary(path)
    return gzip.open(file) if name.endswith(".gz") else file  # type: ignore[return-value]


def _read_idx(path: Location, name: str) -> np.ndarray:
    """The array in an idx file of bytes: (N,) labels or (N, H, W) images. Raises ValueError."""
    with _open_idx(path, name) as file:
        head = file.read(4)
        if len(head) < 4 or head[:3] != b"\0\0\x08" or head[3] not in (1, 3):
            raise ValueError("not an idx file of bytes")
        axes = file.read(4 * head[3])
        if len(axes) < 4 * head[3]:
            raise ValueError("cut short in the header")
        shape = struct.unpack(f">{head[3]}I", axes)
        size = int(np.prod([int(n) for n in shape], dtype=object))
        if size > 4 << 30 or (len(shape) == 3 and shape[1] * shape[2] > LIMITS.pixels):
            raise ValueError(f"the header asks for {size} bytes")
        parts = []  # block by block: the header may promise more than there is
        while size > 0 and (block := file.read(min(size, 1 << 24))):
            parts.append(block)
            size -= len(block)
    if size or not all(shape):
        raise ValueError(f"cut short: {size} bytes are missing" if size else "no images in it")
    return np.frombuffer(b"".join(parts), np.uint8).reshape(shape)


def _read_idx_pair(
    tree: Tree, image_file: str, label_file: str | None
) -> tuple[np.ndarray, np.ndarray | None] | Rejected:
    """The images (N, H, W) of one idx file and the labels (N,) of the other, or why they cannot be used."""
    tree.used.add(image_file)
    at = image_file
    try:
        images = _read_idx(tree.files[at], at)
        if images.ndim != 3:
            raise ValueError("an idx file of images has three dimensions")
        if label_file is None:
            return images, None
        tree.used.add(at := label_file)
        values = _read_idx(tree.files[at], at)
        if len(values) != len(images):
            raise ValueError(f"{len(values)} labels for {len(images)} images")
        return images, values
    except DAMAGED as error:
        raise_if_passing(error, at)
        return Rejected(at, None, Reason(RejectKind.DAMAGED, f"damaged idx file: {error}"))


def plan_idx(tree: Tree, labels: dict[str, list[str]]) -> Plan | None:
    """Pairs of idx files -> columns `image` and `label`; the split is what the file's name begins with."""
    pairs: dict[str, dict[str, str]] = {}
    for name in tree.files:
        if match := idx_name(name):
            pairs.setdefault(name[: len(name) - len(name.rpartition("/")[2])] + match[1], {})[match[2]] = name
    pairs = {stem: pair for stem, pair in sorted(pairs.items()) if "images" in pair}
    if not pairs:
        return None
    names = labels.get("label")

    def read() -> Iterator[Item]:
        for stem, pair in pairs.items():
            read = _read_idx_pair(tree, pair["images"], pair.get("labels"))
            if isinstance(read, Rejected):
                yield read
                continue
            images, values = read
            split = split_of_file(stem.rpartition("/")[2])
            for n, image in enumerate(images):
                parts: dict[str, str | Media] = {}
                place = f"{pair['images']}:{n}"
                parts["image"] = Media("image", place, pixels=image)
                if values is not None:
                    value = int(values[n])
                    if names is not None and value >= len(names):
                        yield Rejected(
                            pair["labels"],
                            n,
                            Reason(RejectKind.UNKNOWN_LABEL, f"label {value}, but {len(names)} names were given"),
                        )
                        continue
                    parts["label"] = names[value] if names is not None else str(value)
                yield RawRecord(f"{stem}:{n}", place, parts, split)

    split_counts: Counter[str | None] = Counter()
    notes = []
    for stem, pair in pairs.items():
        split = split_of_file(stem.rpartition("/")[2])
        try:
            with _open_idx(tree.files[pair["images"]], pair["images"]) as file:
                split_counts[split] += int.from_bytes(file.read(8)[4:], "big")
        except DAMAGED:
            continue
        notes.append(f"{pair['images']}: images -> image" + (", labels -> label" if "labels" in pair else ""))
    columns = {"image": "image"} | ({"label": "text"} if any("labels" in p for p in pairs.values()) else {})
    return Plan(columns, split_counts, read, notes)


# --- plain text -------------------------------------------------------------------------------------------------


def plan_text(tree: Tree) -> Plan | None:
    """Text files -> column `text`: one record a file; a long text in order in pieces of some 8 kB at line ends. Where
    there are few, and neither labels nor splits, the last tenth of each is for val and test."""
    names = [name for name in tree.files if suffix_of(name) == ".txt"]
    if not names:
        return None
    single = len(names) == 1
    folders = Folders(names)
    classes = {name: folders.label(name) for name in names}
    labelled = len({label for label in classes.values() if label}) > 1
    sizes: dict[str, int] = {}  # characters
    broken: dict[str, Reason] = {}
    split_counts: Counter[str | None] = Counter()
    for name in names:
        try:
            with open_text(tree.files[name], name, "strict") as file:
                sizes[name] = sum(map(len, iter(partial(file.read, 1 << 20), "")))
            split_counts[None if single else folders.split(name)] += 1 + sizes[name] // TEXT_BYTES
        except UnicodeDecodeError as error:
            broken[name] = Reason(
                RejectKind.BAD_TEXT, f"not UTF-8: byte {error.object[error.start]:#04x}. Save it as UTF-8"
            )
        except DAMAGED as error:
            raise_if_passing(error, name)
            broken[name] = Reason(RejectKind.UNREADABLE, f"cannot be read: {error}")

    unsplit = not labelled and not any(folders.split(name) for name in names)
    few = len(names) < FEW_TEXTS and unsplit and any(size >= WORTH_CUTTING for size in sizes.values())
    cut = {name for name in names if single or (few and sizes.get(name, 0) >= WORTH_CUTTING)}

    def read() -> Iterator[Item]:
        for name in names:
            tree.used.add(name)
            if name in broken:
                yield Rejected(name, None, broken[name])
                continue
            # The customary last tenth, to the character: half of it to choose by, half of it to measure on.
            borders = {int(share * sizes[name]): part for share, part in TAILS} if name in cut else {}
            if single and sizes[name] <= TEXT_BYTES:  # training needs two records
                borders = {int(sizes[name] * TAILS[0][0] / 2): "train", **borders}
            borders.pop(0, None)
            split = "train" if borders or few else folders.split(name)
            label = classes[name]
            given_label: dict[str, str | Media] = {"label": label} if labelled and label else {}
            group = None if single or few else _sha256(tree.files[name])  # the pieces of a text stay together
            for n, (start, text) in enumerate(_pieces(tree.files[name], name, list(borders))):
                split = borders.get(start, split)
                yield RawRecord(f"{name}:{n}", f"{name}:{n}", {"text": text, **given_label}, split, group)

    if labelled:
        folders.note_namesakes(names)
    note = f"{names[0]} -> text, the last tenth for val and test" if single else f"{len(names)} text files -> text"
    told = []
    if few and not single:
        whole = f", {len(names) - len(cut)} short ones are trained on whole" if len(cut) < len(names) else ""
        told = [f"Of each of the few text files the last tenth is for val and test{whole}."]
    columns = {"text": "text", "label": "text"} if labelled else {"text": "text"}
    notes = [note] + ["folder names -> label"] * labelled
    return Plan(columns, split_counts, read, notes, tail=single or few, warnings=[*told, *folders.notes.values()])


def _sha256(place: Location) -> str:
    with open_binary(place) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _pieces(path: Location, name: str, borders: list[int]) -> Iterator[tuple[int, str]]:
    """(first character's position, text) of pieces of at most TEXT_BYTES characters; one begins at each border."""
    with open_text(path, name, "strict") as file:
        at, buffer = 0, ""
        for block in iter(partial(file.read, 1 << 20), ""):
            buffer += block
            start = 0
            while len(buffer) - start > TEXT_BYTES:
                stop = buffer.rfind("\n", start + TEXT_BYTES // 2, start + TEXT_BYTES) + 1 or start + TEXT_BYTES
                stop = next((start + border - at for border in borders if 0 < border - at < stop - start), stop)
                yield at, buffer[start:stop]
                at, start = at + stop - start, stop
            buffer = buffer[start:]
        while buffer:
            stop = next((border - at for border in borders if 0 < border - at < len(buffer)), len(buffer))
            yield at, buffer[:stop]
            at, buffer = at + stop, buffer[stop:]


# --- media in folders -------------------------------------------------------------------------------------------


@dataclass
class _MediaFiles:
    """Media files as records: one for each stem.

    Attributes:
        tree: The source.
        stems: Stem -> kind -> file.
        folders: What the files' folders say.
        classes: Stem -> the label that its folder names.
        labelled: Whether folders are labels.
        pattern: Whose named groups are further texts.
    """

    tree: Tree
    stems: dict[str, dict[str, str]]
    folders: Folders
    classes: dict[str, str | None]
    labelled: bool
    pattern: re.Pattern[str] | None
    transcripts: dict[str, str]  # stem -> its text, of lists of transcripts

    def record(self, stem: str) -> Item:
        """The record of a stem, but for the text beside it."""
        files = self.stems[stem]
        first = next(iter(files.values()))
        split = self.folders.split(first)
        parts: dict[str, str | Media] = {kind: self.tree.media(kind, name) for kind, name in files.items()}
        if self.labelled and (label := self.classes[stem]) is not None:
            parts["label"] = label
        if self.pattern:
            match = self.pattern.search(first)
            if not match:
                return Rejected(first, None, Reason(RejectKind.PATTERN, "its name does not match the pattern"))
            for column, value in match.groupdict().items():
                if column == "split":
                    split = split_name(value or "") or split
                elif value:
                    parts[column] = value
        return RawRecord(first, first, parts, split)

    def read(self) -> Iterator[Item]:
        """All records, with the texts beside them."""
        for stem, files in self.stems.items():
            item, text = self.record(stem), _text_beside(self.tree, stem)
            self.tree.used.update(files.values())
            if isinstance(item, RawRecord) and text is not None and "text" not in item.parts:
                self.tree.used.add(text)
                try:
                    with open_text(self.tree.files[text], text, "strict") as file:
                        words = file.read(LIMITS.file_bytes).strip()
                    words = words if text.endswith(".txt") else _spoken(words)
                except DAMAGED as error:
                    raise_if_passing(error, text)
                    yield Rejected(text, None, Reason(RejectKind.UNREADABLE, f"the text cannot be read: {error}"))
                    continue
                if words:
                    item.parts["text"] = words
            elif isinstance(item, RawRecord) and stem in self.transcripts:
                item.parts.setdefault("text", self.transcripts[stem])
            yield item


def _text_beside(tree: Tree, stem: str) -> str | None:
    """The file of a medium's text: of the same name, a text or subtitles; None where there is none."""
    return next((name for ending in BESIDE if (name := f"{stem}{ending}") in tree.files), None)


def _spoken(subtitles: str) -> str:
    """What subtitles (SubRip or WebVTT) say, without numbers, times and marks, as one line."""
    said = []
    for block in re.split(r"\n\s*\n", subtitles.replace("\r", "")):
        lines = block.split("\n")
        at = next((n for n, line in enumerate(lines) if "-->" in line), None)
        if at is not None:
            said += [re.sub(r"<[^>]*>|\{\\[^}]*\}", "", line).strip() for line in lines[at + 1 :]]
    return " ".join(line for line in said if line)


def _transcripts(tree: Tree, stems: Collection[str]) -> dict[str, str]:
    """The texts of stems out of `.txt` files beside the media, whose lines begin with a medium's name each, as
    LibriSpeech has them."""
    texts: dict[str, str] = {}
    for name in tree.files:
        if suffix_of(name) != ".txt" or name.removesuffix(".txt") in stems:
            continue
        folder = name.rpartition("/")[0]
        try:
            with open_text(tree.files[name], name, "strict") as file:
                found = _listed_texts(file, folder, stems)
        except DAMAGED as error:
            raise_if_passing(error, name)
            continue  # told of as a text that belongs to nothing
        if found:
            tree.used.add(name)
            texts |= found
    return texts


def _listed_texts(file: IO[str], folder: str, stems: Collection[str]) -> dict[str, str]:
    """The texts of stems out of a file's lines; none where too few of its lines begin with a medium's name. A large
    text of something else is not read whole: there cannot be more media than there are."""
    found: dict[str, str] = {}
    lines = 0
    while line := file.readline(LINE_MOST):
        if not line.strip():
            continue
        lines += 1
        first, _, words = line.strip().partition(" ")
        stem = f"{folder}/{first}" if folder else first
        if stem in stems and words.strip():
            found[stem] = words.strip()
        others = lines - len(found)
        if len(stems) < LISTED_SHARE * (others + len(stems)):  # too few, even if all media followed
            return {}
    return found if len(found) >= LISTED_SHARE * lines else {}


def plan_media(tree: Tree, pattern: re.Pattern[str] | None) -> Plan | None:
    """Media files -> records: one for each stem, with its same-stem `.txt` as `text`, its folder as `label`, and
    the named groups of `pattern` as further texts."""
    kinds = {name: kind for name in tree.files if (kind := tree.kind(name))}
    if not kinds:
        return None
    stems: dict[str, dict[str, str]] = {}
    for name, kind in kinds.items():
        stem = name.removesuffix(_ending(name))
        key = stem if kind not in stems.get(stem, {}) else name
        stems.setdefault(key, {})[kind] = name
    groups = list(pattern.groupindex) if pattern else []
    folders = Folders(kinds)
    classes = {stem: folders.label(next(iter(files.values()))) for stem, files in stems.items()}
    transcripts = _transcripts(tree, stems)  # then folders are speakers and chapters, and no labels
    labelled = "label" not in groups and not transcripts and len({c for c in classes.values() if c}) > 1
    columns = {kind: kind for kind in MEDIA if kind in kinds.values()}
    if transcripts or any(_text_beside(tree, stem) for stem in stems):
        columns["text"] = "text"
    for column in (["label"] if labelled else []) + [group for group in groups if group != "split"]:
        if column in (*MEDIA, *RESERVED):
            raise PlaitError(f"The pattern's group '{column}' has the name of another column. Rename the group.")
        columns[column] = "text"
    if labelled:
        folders.note_namesakes(kinds)
    files = _MediaFiles(tree, stems, folders, classes, labelled, pattern, transcripts)
    records = map(files.record, stems)
    split_counts: Counter[str | None] = Counter(item.split for item in records if isinstance(item, RawRecord))
    notes = [f"{sum(k == kind for k in kinds.values())} {kind} files -> {kind}" for kind in MEDIA
             if kind in columns]  # fmt: skip
    notes += [f"files of the same name ending in {', '.join(BESIDE)} -> text"] if "text" in columns else []
    notes += ["folder names -> label"] if labelled else []
    told = []
    if transcripts:
        told = [f"The texts of {len(transcripts):,} media are lines of lists beside them; folder names are no labels."]
    notes += [f"the pattern's groups -> {', '.join(groups)}"] if groups else []
    return Plan(columns, split_counts, files.read, notes, warnings=[*told, *folders.notes.values()])


def _ending(name: str) -> str:
    last = name.rpartition("/")[2]
    suffix = os.path.splitext(last)[1]  # noqa: PTH122
    return suffix if kind_of_suffix(suffix) else ""


def _reasons(tree: Tree) -> str:
    """Why files were refused, or are no tables, for people: the commonest reasons with their counts."""
    counts = Counter(refused.reason for refused in tree.refused)
    counts.update(f"{name.rpartition('/')[2]}: {why}" for name, why in tree.why_not.items())
    plain = unread("")
    counts.update(why for name in tree.files if name not in tree.why_not and (why := unread(name)) != plain)
    common = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))
    return f" {common[:1].upper()}{common[1:]}." if common else ""


def plan(
    tree: Tree,
    column_map: dict[str, str] | None = None,
    labels: dict[str, list[str]] | None = None,
    pattern: str | None = None,
) -> Plan:
    """How the source is read. Tables govern the media they name; without tables, idx files, media, then texts.

    Raises PlaitError where there is nothing to read or an option does not fit.
    """
    try:
        compiled = re.compile(pattern) if pattern else None
    except re.error as error:
        raise PlaitError(
            f"The pattern is not a regular expression: {error}. Write groups as (?P<label>\\d)."
        ) from error
    if compiled and not compiled.groupindex:
        raise PlaitError("The pattern has no named group. Write groups as (?P<label>\\d).")
    # A pattern is about media files, so it passes idx files and tables by.
    shards = plan_shards(tree, labels or {})
    idx = None if compiled or shards else plan_idx(tree, labels or {})
    tables = None if compiled or idx or shards else plan_tables(tree, column_map or {}, labels or {})
    chosen = shards or idx or tables
    plain = chosen is not None and chosen is tables and not set(MEDIA) & set(chosen.columns.values())
    if chosen is None or (plain and not column_map and not (chosen.chats or chosen.multi_label)):
        # Tables that name no media give way to media that lie there.
        chosen = plan_media(tree, compiled) or chosen or (plan_text(tree) if not compiled else None)
    if chosen is None:
        raise PlaitError(
            f"{tree.source} holds nothing that can be read.{_reasons(tree)} What is read: {known_formats()}, tables "
            "(jsonl, json, csv, tsv, parquet, arrow), text (txt), idx files, and archives of these (zip, tar)."
        )
    if labels and chosen is not tables and chosen is not shards and (chosen is not idx or set(labels) != {"label"}):
        raise PlaitError(
            "Labels name the integer classes of a table's column, or of idx files (their column is 'label')."
        )
    if column_map and chosen is not tables:
        columns = ", ".join(chosen.columns)
        raise PlaitError(f"--map applies to the columns of tables; this source has none (its columns are {columns}).")
    return chosen
