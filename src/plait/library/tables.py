"""`plait.tabulate`: what a model says of every file of a folder, or row of a table, as a table.

Answers are written down as they come, in a journal beside the table: killed at any moment, the same call goes on from
there and asks nothing twice. At the end the journal becomes the table, in one step.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from plait.core.errors import PlaitError
from plait.core.files import write_atomic
from plait.core.progress import ProgressBar
from plait.data.files import Media
from plait.data.record import Rejected
from plait.inference.base import Model, Verb
from plait.library.sidecars import SIDECARS, Sidecar, write_sidecar
from plait.modalities.descriptor import MediaError
from plait.modalities.media import Checker
from plait.search.entries import Entry, columns_of, entries

Answering = Literal["classify", "describe", "transcribe", "embed"]
FORMATS = (".csv", ".jsonl", ".parquet")
BATCH = 32  # inputs that are asked for at one time, at most
NONE_OF_THESE = "none of these"


@dataclass(frozen=True)
class TableQuery:
    """What is asked of each input; the answer is a function of it, the model and the input.

    Attributes:
        verb: classify, describe, transcribe or embed.
        column: The text column to answer in; the model's own choice if None.
        labels: What `classify` chooses between; those of the column if None.
        top: How many labels `classify` gives; all where a record has several.
        language: Spoken in what is transcribed; found out if None.
        task: transcribe, or translate into English.
        prompt: One of the prompts that some text encoders have.
        sidecar: "xmp" or "srt": a file beside each medium with its answer; none if None.
    """

    verb: Answering
    column: str | None = None
    labels: tuple[str, ...] | None = None
    top: int = 3
    language: str | None = None
    task: str = "transcribe"
    prompt: str | None = None
    sidecar: Sidecar | None = None


@dataclass(frozen=True)
class Tabulated:
    """What `tabulate` did.

    Attributes:
        path: the table.
        rows: rows in it.
        resumed: rows among them that an earlier, stopped call had answered.
        failed: rows without an answer; their column `error` says why.
        kept: sidecars of other programs that were left as they are.
    """

    path: Path
    rows: int
    resumed: int
    failed: int
    kept: int = 0


def tabulate(
    model: Model,
    sources: Sequence[str | Path],
    out: str | Path,
    query: TableQuery,
    *,
    inputs: Sequence[str] | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool | None = None,
) -> Tabulated:
    """Answer for every input of the sources, and write a table.

    Args:
        model: what `plait.load` returned.
        sources: folders, files, tables, archives or prepared datasets; a str that names none of these is a text.
        out: a `.csv`, `.jsonl` or `.parquet` file.
        query: what is asked of each input.
        inputs: columns of a table that are read; if None those that the model knows and that are no labels.
        overwrite: whether a table that is there already is replaced.
        workers: processes that decode media; all cores if None.
        progress: as in `plait.train`.

    Raises PlaitError for a source that is missing, a format that is not known, a table that is there already, and a
    journal of other answers. An input that cannot be read costs its own row.
    """
    path = Path(out).expanduser()
    _check(model, path, query, overwrite)
    journal = Journal(path, {"model": _identity(model), "asked": asdict(query)})
    with ProgressBar(progress) as bar, journal:
        resumed = len(journal.done)
        _answer_all(model, sources, query, journal, list(inputs or ()), workers or os.cpu_count() or 1, bar)
        rows = journal.rows()
        write_atomic(path, encode_table(rows, path.suffix.lower()))
        journal.remove()
    failed = sum(row.get("error") is not None for row in rows)
    return Tabulated(path, len(rows), resumed, failed, journal.kept)


def _check(model: Model, path: Path, query: TableQuery, overwrite: bool) -> None:
    """What can be told before any input is read."""
    model.require(query.verb)
    if path.suffix.lower() not in FORMATS:
        raise PlaitError(f"{path} must end in {', '.join(FORMATS)}, which say how the table is written.")
    if path.exists() and not overwrite:
        raise PlaitError(f"{path} is there already. Choose another file, or replace it with --overwrite.")
    if not path.parent.is_dir():
        raise PlaitError(f"{path.parent} does not exist. Make the folder first.")
    if query.sidecar is not None and query.verb not in SIDECARS[query.sidecar]:
        verbs = " and ".join(SIDECARS[query.sidecar])
        raise PlaitError(f"Sidecars of {query.sidecar.upper()} are written by {verbs}, not by {query.verb}.")


def _identity(model: Model) -> str:
    """What tells one model from another: the sha256 of its files, else its name."""
    from plait.search.index import identity

    return identity(model.folder) if model.folder is not None else model.name


# --- the journal ----------------------------------------------------------------------------------------------------


class Journal:
    """The answers so far, a JSON line each, in a hidden file beside the table. The first line says what was asked."""

    def __init__(self, table: Path, query: dict[str, Any]) -> None:
        """Raises PlaitError where an earlier call asked something else."""
        self.path = table.with_name(f".{table.name}.journal")
        self.head = hashlib.sha256(json.dumps(query, sort_keys=True).encode()).hexdigest()
        self.done: dict[str, str] = {}  # id of an input -> its stamp
        self.kept = 0
        self._file: IO[bytes] | None = None
        self._restore(table)

    def _restore(self, table: Path) -> None:
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]  # a kill may have cut the last line
        if len(complete) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(complete))
        lines = complete.splitlines()
        if lines and json.loads(lines[0])["asked"] != self.head:
            raise PlaitError(
                f"{self.path} holds answers of a call that was stopped and asked something else, or another model. "
                f"Repeat that call to finish it, choose another file than {table.name}, or remove {self.path}."
            )
        for line in lines[1:]:
            entry = json.loads(line)
            self.done[entry["id"]] = entry["stamp"]

    def __enter__(self) -> Journal:
        fresh = not self.path.is_file() or not self.path.stat().st_size
        try:
            self._file = self.path.open("ab")
        except OSError as error:
            raise PlaitError(f"Cannot write {self.path}: {error.strerror}. Choose another file with -o.") from error
        if fresh:
            self._write([{"asked": self.head}])
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, answered: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Write down rows, each with the id and the stamp of its input; they last from then on."""
        new_rows = list(answered)
        self._write([{"id": id_, "stamp": stamp, "row": row} for id_, stamp, row in new_rows])
        self.done |= {id_: stamp for id_, stamp, _ in new_rows}

    def _write(self, lines: list[dict[str, Any]]) -> None:
        assert self._file is not None
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """The rows that are written down, the newest of each input, in the order in which they first came."""
        newest: dict[str, dict[str, Any]] = {}
        with self.path.open("rb") as file:
            next(file)
            for line in file:
                entry = json.loads(line)
                newest[entry["id"]] = entry["row"]
        return list(newest.values())

    def remove(self) -> None:
        """Once the table is written."""
        self.__exit__()
        self.path.unlink(missing_ok=True)


# --- answering ------------------------------------------------------------------------------------------------------


@dataclass
class _Read:
    """An input on its way: its entry, what changes with its content, and what the model takes of it."""

    entry: Entry
    stamp: str
    value: Future[Any]


def _answer_all(
    model: Model, sources: Sequence[str | Path], query: TableQuery, journal: Journal, inputs: list[str], workers: int,
    bar: ProgressBar,
) -> None:  # fmt: skip
    """Ask for what the journal has not; media are decoded ahead, by all workers, while the model answers."""
    total = sum(1 for _ in _inputs(model, sources, query, inputs))
    size, done = min(BATCH, model.embed_batch), 0
    with contextlib.closing(Checker()) as checker, ThreadPoolExecutor(workers, "media") as pool:

        def begin(chunk: list[Entry | Rejected]) -> list[_Read | Rejected]:
            return [one for item in chunk if (one := _begin(model, query, item, journal, checker, pool)) is not None]

        entries_left = _inputs(model, sources, query, inputs)
        ahead = begin(list(islice(entries_left, size)))
        for chunk in [*_chunks(entries_left, size), []]:
            now, ahead = ahead, begin(chunk)
            _answer(model, query, journal, now)
            done += size
            bar(query.verb, min(done, total), total)


def _chunks(entries_left: Iterator[Entry | Rejected], size: int) -> Iterator[list[Entry | Rejected]]:
    while chunk := list(islice(entries_left, size)):
        yield chunk


def _inputs(
    model: Model, sources: Sequence[str | Path], query: TableQuery, inputs: list[str]
) -> Iterator[Entry | Rejected]:
    """All inputs of the sources."""
    from plait.modalities.inputs import media_or_text

    for number, source in enumerate(sources):
        place = media_or_text(source) if isinstance(source, str) and "://" not in source else source
        if isinstance(place, str) and "://" not in place:
            yield Entry(f"text:{number}:{place}", f"text {number + 1}", "text", place)
            continue
        readable = inputs or _readable(model, query, columns_of(place))
        yield from entries(place, readable, empty=True)


def _readable(model: Model, query: TableQuery, columns: dict[str, str]) -> list[str] | None:
    """The columns of a source that a model reads: its own inputs; where the source has none of these, the media, or
    the only column of text. None for all."""
    answers = set(model.labels) | {query.column}
    own_inputs = [name for name in columns if name in model.columns and name not in answers]
    if own_inputs or any(kind != "text" for kind in columns.values()):
        return own_inputs or None
    texts = [name for name in columns if name not in answers]
    if len(texts) > 1:
        raise PlaitError(f"Several columns could be read: {', '.join(texts)}. Name one: --input {texts[0]}.")
    return texts or None


def _begin(
    model: Model,
    query: TableQuery,
    item: Entry | Rejected,
    journal: Journal,
    checker: Checker,
    pool: ThreadPoolExecutor,
) -> _Read | Rejected | None:
    """Begin to read an input; None where its answer is known."""
    if isinstance(item, Rejected):
        return item if f"rejected:{item.file}:{item.line}" not in journal.done else None
    stamp = _stamp(item)
    if journal.done.get(item.id) == stamp:
        return None

    def read() -> Any:
        content = item.content()
        if isinstance(content, str):
            return content
        value = checker.decode(item.kind, content)
        return value if query.verb == Verb.TRANSCRIBE else model.prepared(item.kind, value)  # silence is heard in waves

    return _Read(item, stamp, pool.submit(read))


def _stamp(entry: Entry) -> str:
    """What changes when a file does."""
    value = entry.value
    if isinstance(value, Media) and isinstance(value.path, Path):
        with contextlib.suppress(OSError):
            facts = value.path.stat()
            return f"{facts.st_size}:{facts.st_mtime_ns}"
    content = value if isinstance(value, str) else value.stamp if isinstance(value, Media) else value
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def _answer(model: Model, query: TableQuery, journal: Journal, taken: list[_Read | Rejected]) -> None:
    """Ask the model for a batch, and write the answers down."""
    rows: dict[str, tuple[str, dict[str, Any]]] = {}  # id -> stamp and row, in the order of the inputs
    ready: list[tuple[_Read, Any]] = []
    for one in taken:
        if isinstance(one, Rejected):
            row = {"file": one.file if one.line is None else f"{one.file}:{one.line}", "error": one.reason}
            row |= {"id": one.id} if one.id is not None else {}
            rows[f"rejected:{one.file}:{one.line}"] = "", row
            continue
        rows[one.entry.id] = one.stamp, {}
        try:
            ready.append((one, one.value.result()))
        except (MediaError, PlaitError, OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error).removesuffix(".")
            rows[one.entry.id] = one.stamp, _row(one.entry, {"error": why})
    for (one, _), answer in zip(ready, _answers(model, query, [value for _, value in ready]), strict=True):
        if query.sidecar is not None and "error" not in answer:
            journal.kept += not write_sidecar(query.sidecar, one.entry.value, answer)
        rows[one.entry.id] = one.stamp, _row(one.entry, answer)
    if rows:
        journal.add((id_, stamp, row) for id_, (stamp, row) in rows.items())


def _row(entry: Entry, answer: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: where the input is from, the other texts of its record, what was read, what is answered."""
    text = {"text": entry.value} if isinstance(entry.value, str) else {}
    taken = {"file", *text, *answer, "error"}
    others = {name: value for name, value in entry.texts.items() if name not in taken and value != entry.value}
    own = {"id": entry.own_id} if entry.own_id is not None else {}
    return {"file": entry.source, **own, **others, **text, **answer}


def _answers(model: Model, query: TableQuery, values: list[Any]) -> list[dict[str, Any]]:
    """The cells of each value's row; an `error` where the model cannot take it. A fault costs its own row."""
    if not values:
        return []
    try:
        return _ANSWERS[query.verb](model, query, values)
    except PlaitError as error:
        if len(values) == 1:
            return [{"error": str(error).removesuffix(".")}]
        return [row for value in values for row in _answers(model, query, [value])]


def _classified(model: Model, query: TableQuery, values: list[Any]) -> list[dict[str, Any]]:
    if query.column is not None and query.column in model.numbers:
        return [
            {"value": one.value, "low": one.low, "high": one.high}
            for one in model.estimate_inputs(values, query.column)
        ]
    labels = list(query.labels) if query.labels else None
    rows = []
    for one in model.classify_inputs(values, labels, query.column, _top(model, query)):
        if one.chosen is not None:
            row: dict[str, Any] = {"labels": one.chosen}
            rows.append(row | {f"probability of {label}": chance for label, chance in one})
            continue
        row = {"label": NONE_OF_THESE if one.none_of_these else one[0].label}
        row |= {"none_of_these": one.none_of_these, "ood_score": _digits(one.ood_score)}
        for place, (label, probability) in enumerate(one, 1):
            row |= {f"label_{place}": label, f"probability_{place}": _digits(probability)}
        rows.append(row)
    return rows


def _digits(value: float | None) -> float | None:
    """With the six digits that a probability has to say."""
    return None if value is None else float(f"{value:.6g}")


def _top(model: Model, query: TableQuery) -> int | None:
    """How many labels; all of a column of several, whose table has a column for each."""
    return None if (query.column or next(iter(model.several), None)) in model.several else query.top


def _described(model: Model, query: TableQuery, values: list[Any]) -> list[dict[str, Any]]:
    plait_model = model.plait_model
    if plait_model is None:
        return [{"caption": model.describe(value, column=query.column)} for value in values]
    target = plait_model.column(query.column, "text", Verb.DESCRIBE)
    return [
        {"caption": texts[0]} for texts in plait_model.write([plait_model.context([value]) for value in values], target)
    ]


def _transcribed(model: Model, query: TableQuery, values: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for value in values:
        if query.sidecar == "srt":
            segments = model.segments(value, language=query.language, task=query.task)
            rows.append({
                "transcript": " ".join(one.text.strip() for one in segments),
                "segments": [{"start": one.start, "end": one.end, "text": one.text.strip()} for one in segments],
            })  # fmt: skip
            continue
        text = model.transcribe(value, column=query.column, language=query.language, task=query.task)
        rows.append({"transcript": text})
    return rows


def _embedded(model: Model, query: TableQuery, values: list[Any]) -> list[dict[str, Any]]:
    vectors = model.embed_inputs(values, query.prompt)
    return [{"embedding": [round(float(number), 7) for number in vector]} for vector in vectors]


_ANSWERS = {"classify": _classified, "describe": _described, "transcribe": _transcribed, "embed": _embedded}


# --- tables ---------------------------------------------------------------------------------------------------------


def encode_table(rows: list[dict[str, Any]], suffix: str) -> bytes:
    """Rows as a file; columns in the order in which they first appear, `error` last, where there is any.

    A list becomes a cell of JSON in a CSV file, but for a vector, which has a column a number.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "error"))
    names += ["error"] if any("error" in row for row in rows) else []
    if suffix == ".jsonl":
        lines = [{name: row.get(name) for name in names} for row in rows]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    if suffix == ".parquet":
        table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    wide = next((len(row["embedding"]) for row in rows if row.get("embedding")), 0)
    head = [f"embedding_{place}" for place in range(wide)]
    writer.writerow([cell for name in names for cell in (head if name == "embedding" else [name])])
    for row in rows:
        vector = row.get("embedding") or [None] * wide
        writer.writerow(
            [cell for name in names for cell in (vector if name == "embedding" else [_cell(row.get(name))])]
        )
    return text.getvalue().encode()


def _column(values: list[Any]) -> pa.Array:
    vectors = any(isinstance(value, list) and value and isinstance(value[0], float) for value in values)
    return pa.array(values, pa.list_(pa.float32())) if vectors else pa.array(values)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
