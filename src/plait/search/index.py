"""Search across modalities: an index of embeddings, texts and previews in LanceDB, exact while it is small.

An index is a folder, or the URL of an object store. It remembers which weights made it and takes no others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from plait.classifiers.space import SpaceQuality
from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.core.files import fsync_folder, only_writer, sha256_file, write_atomic
from plait.data.dataset import Dataset
from plait.data.record import Rejected
from plait.data.stores import Location, location
from plait.inference.base import Model
from plait.inference.model import load
from plait.modalities.inputs import inputs_of
from plait.modalities.media import Checker
from plait.search.adding import OWN, TIMES, Adding, Progress, checksums
from plait.search.embedding import Begun, Embedder
from plait.search.entries import Entry, entries

EXACT = 100_000  # entries up to which all vectors are kept in memory and compared
BATCH = 256  # entries that are embedded at a time, at most
TABLE = "entries"
ENGINES = ("local", "ray")  # that embed
PROBES, REFINE = 14, 2  # of an approximate search: partitions looked at, and candidates per result compared exactly
MOMENTS = 8  # hits that are looked at for each result where videos stand in the index moment by moment
FUSE = 60  # reciprocal rank fusion: 1 / (FUSE + rank), Cormack, Clarke and Buettcher 2009


@dataclass
class Hit:
    """Something found. `similarity` is the cosine with the query (nan where only words were asked for); `score` is
    what hits are ordered by; `preview` is a small image or the beginning of an audio clip, encoded. Of a video the hit
    is its best moment, from second `start` to second `stop`."""

    id: str
    source: str
    kind: str
    similarity: float
    score: float
    text: str | None
    columns: dict[str, str] = field(default_factory=dict)
    preview: bytes | None = None
    start: float | None = None
    stop: float | None = None


class Added(NamedTuple):
    """What `Index.add` did, in entries."""

    new: int
    changed: int
    same: int
    rejected: list[Rejected]


def identity(folder: Path) -> str:
    """The sha256 that stands for a model's weights: of its manifest of sha256, else of the files themselves."""
    if (folder / "manifest.json").is_file():
        return sha256_file(folder / "manifest.json")
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".json", ".txt", ".model")]
    return hashlib.sha256("".join(f"{f.name} {sha256_file(f)}\n" for f in files).encode()).hexdigest()


class Index:
    """Images, audio clips and texts that can be found by any of them, and by words.

    `model` is a run, a checkpoint, a Hugging Face name, or a model that `plait.load` returned; an index that exists
    knows its own, which is loaded when it is first needed. One writer at a time, any number of readers.
    """

    def __init__(self, path: str | Path, model: str | Path | Model | None = None, device: str = "auto"):
        self.path: Location = location(path)
        self.device, self._lock = device, threading.Lock()
        self.exact = EXACT
        self._model: Model | None = None
        self.table: Any = None
        self._loaded: tuple[np.ndarray, np.ndarray] | None = None  # row ids (N,), vectors (N, E)
        self._version, self._words = 0, False  # what is loaded, and whether it has an index of words
        self._shown: list[str] = []  # the columns of a hit
        self.metadata: dict[str, Any] = {}
        if isinstance(self.path, Path) and self.path.exists() and not self.path.is_dir():
            raise PlaitError(f"{self.path} is a file. Name the folder of an index.")
        self._open()
        if model is not None:
            loaded = load(model, device) if isinstance(model, str | Path) else model
            self._take(loaded, str(model if isinstance(model, str | Path) else model.folder))
        elif self.table is None:
            raise PlaitError(f"{self.path} is no index. Make one: plait index add {self.path} FILES --model RUN")

    # --- the model ----------------------------------------------------------------------------------------------

    def _take(self, model: Model, name: str) -> None:
        if model.folder is None:
            raise PlaitError("The model of an index lies in a folder. Load it with plait.load(...).")
        if "embed" not in model.verbs:
            raise PlaitError(
                f"{name} has no embedding space, so nothing can be found by it. It can {', '.join(model.verbs)}."
            )
        digest = identity(model.folder)
        if self.table is not None and digest != self.metadata["sha256"]:
            raise PlaitError(
                f"{self.path} was made by the model {self.metadata['sha256'][:12]} ({self.metadata['model']}); "
                f"{name} is {digest[:12]}, and places of different models do not compare. "
                "Name that model, or make another index. This one is unchanged."
            )
        self._model = model
        if self.table is None:
            self.metadata = {"model": str(model.folder.resolve()), "sha256": digest}

    @property
    def model(self) -> Model:
        """The model of this index. Raises PlaitError where it is not there any more or has changed."""
        if self._model is None:
            where = self.metadata["model"]
            if not Path(where).exists():
                raise PlaitError(f"The model of {self.path} was {where}, which is gone. Name it: --model RUN.")
            self._take(load(where, self.device), where)
        assert self._model is not None
        return self._model

    # --- the store ----------------------------------------------------------------------------------------------

    def _connect(self) -> Any:
        os.environ.setdefault("LANCE_LOG", "error")
        return import_extra("lancedb", "search", "Search").connect(str(self.path))

    @contextlib.contextmanager
    def reading(self, what: str = "read") -> Iterator[None]:
        """LanceDB's errors as ours. Damage changes nothing of what is stored."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except PlaitError:
            raise
        except BaseException as error:
            # A panic of its core is no Exception.
            known = isinstance(error, ValueError | RuntimeError | OSError | LookupError | pa.ArrowException)
            if not known and type(error).__name__ != "PanicException":
                raise
            why = "; ".join(self._damaged()[:3]) or " ".join(str(error).split())[:300]
            raise PlaitError(
                f"{self.path} cannot be {what}: {why}. Nothing of it was changed. Put the file back from a copy, or "
                "make the index again."
            ) from None

    def _open(self) -> None:
        if isinstance(self.path, Path) and not self.path.exists():
            return
        with self.reading("opened"):
            base = self._connect()
            names = base.list_tables().tables
            if TABLE not in names:
                if isinstance(self.path, Path) and any(not f.name.startswith(".") for f in self.path.iterdir()):
                    raise PlaitError(f"{self.path} holds other files and is no index. Choose another folder.")
                return
            self.table = base.open_table(TABLE)
            self.metadata = json.loads((self.table.schema.metadata or {})[b"plait"])
            self.metadata["sha256"], self.metadata["model"], self.metadata["width"]

    def _create(self) -> None:
        width = int(self.model.embed_inputs(["."]).shape[1])
        self.metadata["width"] = width
        vector = pa.list_(pa.float32(), width)
        fields = [pa.field(name, pa.string()) for name in OWN]
        fields += [pa.field("_content", pa.binary(16)), pa.field("_vector", vector)]
        fields += [pa.field("_preview", pa.large_binary()), pa.field("_check", pa.uint32())]
        schema = pa.schema(fields, metadata={"plait": json.dumps(self.metadata)})
        with self.reading("written"):
            self.table = self._connect().create_table(TABLE, schema=schema)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """The only writer of a folder. An object store has no lock: there, whoever commits last is asked again."""
        if not isinstance(self.path, Path):
            yield
            return
        with only_writer(self.path):
            self.add_export_constraints()  # what a killed writer committed
            yield

    def __len__(self) -> int:
        with self.reading():
            return 0 if self.table is None else int(self.table.count_rows())

    @property
    def columns(self) -> list[str]:
        """The columns that `where` may name."""
        return [] if self.table is None else [name for name in self.table.schema.names if not name.startswith("_")]

    # --- adding -------------------------------------------------------------------------------------------------

    def add(
        self, sources: str | Path | Dataset | Iterable[str | Path | Dataset], columns: list[str] | None = None,
        progress: Progress = lambda *_: None, engine: str = "local", workers: int | None = None,
    ) -> Added:  # fmt: skip
        """Add whatever the sources hold: datasets, files, folders, tables, archives.

        What is there already with the same content is left as it is, what has changed takes its former place. Whatever
        `progress` was told of is on the disk: killed at any moment, the same call goes on from there, and embeds at
        most the last 15 seconds or 1,024 entries again. What cannot be used is in `Added.rejected`. `engine` is
        "local", or "ray" for `workers` of a Ray cluster, as many as it has processors where None. Raises PlaitError for
        a source that is missing.
        """
        if engine not in ENGINES:
            raise PlaitError(f"There is no engine '{engine}'. Known are {' and '.join(ENGINES)}.")
        several = [sources] if isinstance(sources, str | Path | Dataset) else list(sources)
        self.model  # noqa: B018 - whether it fits is seen before anything is written
        with self._writing():
            if self.table is None:
                self._create()
            adding = Adding(self, progress)
            entries_left = (item for source in several for item in entries(source, columns))
            batch_size = min(BATCH, self.model.embed_batch)
            chunks = (adding.numbered(chunk) for chunk in iter(lambda: list(islice(entries_left, batch_size)), []))
            (self._embed_by_ray if engine == "ray" else self._embed_here)(adding, chunks, workers)
            adding.commit()
            self._tidy(progress)
            self.add_export_constraints()
        return Added(adding.new, adding.changed, adding.same, adding.rejected)

    def _embed_here(self, adding: Adding, chunks: Iterator[list[Entry]], workers: int | None) -> None:
        """Embed a chunk while the next one is decoded."""
        with contextlib.closing(Checker()) as checker, ThreadPoolExecutor(2, "media") as pool:
            embedder = Embedder(self.model, checker, pool)
            before: tuple[list[Entry], list[Begun]] | None = None
            for chunk in chunks:
                begun = embedder.begin(chunk, adding.known)
                if before is not None:
                    adding.put(before[0], embedder.finish(before[1]))
                before = chunk, begun
            if before is not None:
                adding.put(before[0], embedder.finish(before[1]))

    def _embed_by_ray(self, adding: Adding, chunks: Iterator[list[Entry]], workers: int | None) -> None:
        """Embed chunks in the workers of a cluster, as many as there are at a time."""
        from plait.search.ray_engine import RayEmbedder

        with RayEmbedder(workers, str(self.model.folder), self.device) as embedder:
            for chunk in chunks:
                for items, outcomes in embedder.take(chunk, adding.known_of(chunk)):
                    adding.put(items, outcomes)
            for items, outcomes in embedder.rest():
                adding.put(items, outcomes)

    def _tidy(self, progress: Progress, cleanup: timedelta | None = None) -> None:
        """Few files, and indexes of words and, where there are many entries, of vectors, that know every entry."""
        from lancedb.index import FTS, IvfSq

        with self.reading("written"):
            count, fragments = self.table.count_rows(), self.table.stats()["fragment_stats"]["num_fragments"]
            there = {tuple(index.columns): index.name for index in self.table.list_indices()}
            missing = max((self.table.index_stats(name).num_unindexed_rows for name in there.values()), default=0)
            if cleanup is not None or fragments > 16 or missing > count // 20:
                progress("compact", 0, None)
                self.table.optimize(cleanup_older_than=cleanup)
            if ("text",) not in there and self.table.count_rows("text IS NOT NULL"):
                self.table.create_index("text", config=FTS(base_tokenizer="icu", with_position=False))
            if ("_vector",) not in there and count > self.exact:
                progress("index", 0, None)
                parts = max(int(count**0.5), 1)
                config = IvfSq(distance_type="cosine", num_partitions=parts, sample_rate=32, max_iterations=10)
                self.table.create_index("_vector", config=config)

    # --- searching ----------------------------------------------------------------------------------------------

    def search(
        self, query: Any, k: int = 10, where: str | None = None, by: str = "auto",
        least: float | Literal["auto"] | None = None,
    ) -> list[Hit]:  # fmt: skip
        """The k entries nearest to a text, an image, an audio clip or a media file, best first.

        `where` is an SQL condition on `columns`. `by` is "vector", "words" (full text), "hybrid" (both rankings joined,
        the vectors' weighed by what they were worth on the run's val, and without what is nearer by chance) or "auto":
        hybrid for a text where the index holds texts. `least` leaves out what is less similar than that; "auto" what is
        no nearer than 95 of 100 texts and media of the run's val that have nothing to do with each other, which is
        known for words alone. Raises PlaitError.
        """
        query = inputs_of(query).values[0] if by != "words" else query
        words = query if isinstance(query, str) else None
        if by == "words":
            return self.find(None, words, k, where, by)
        hits = self.find(self.model.embed_inputs([query])[0], words, k, where, by)
        if least is None:
            return hits
        cut = self._unrelated(words) if least == "auto" else float(least)
        return [hit for hit in hits if math.isnan(hit.similarity) or hit.similarity > cut]

    def _unrelated(self, words: str | None) -> float:
        """The similarity below which an entry has nothing to do with a query. Raises PlaitError where that is not
        known."""
        space = self._space() if words is not None else None
        if space is None:
            raise PlaitError(
                "How near an unrelated entry may be is known for words, where the run's val had texts and media. Give "
                "a number: --least 0.3."
            )
        return space.unrelated

    def find(
        self, vector: np.ndarray | None, words: str | None = None, k: int = 10, where: str | None = None,
        by: str = "auto",
    ) -> list[Hit]:  # fmt: skip
        """`search` for a query that is embedded already, (E,). Safe to call from threads."""
        if by not in ("auto", "vector", "words", "hybrid"):
            raise PlaitError(f"Results are ranked by auto, vector, words or hybrid, not by '{by}'.")
        if by in ("words", "hybrid") and words is None:
            raise PlaitError("Only a text can be searched for by its words. Leave --by out.")
        if k < 1:
            raise PlaitError(f"k must be 1 or more, not {k}.")
        if self.table is None:
            return []
        with self._lock:
            for again in (True, False):
                try:
                    self._refresh()
                    if "start" not in self._shown:
                        return self._find(vector, words, k, where, by)
                    return _best_moments(self._find(vector, words, MOMENTS * k, where, by))[:k]
                except _WhereError as error:
                    raise PlaitError(
                        f"--where {where!r} cannot be used: {error}. The columns are {', '.join(self.columns)}; "
                        "write for example --where \"kind = 'image'\"."
                    ) from None
                except Exception as error:
                    # Another process may have compacted: the files of the version that was open are gone.
                    if not again or isinstance(error, PlaitError):
                        with self.reading():
                            raise
                    self._version = 0
        raise AssertionError

    def _find(self, vector: np.ndarray | None, words: str | None, k: int, where: str | None, by: str) -> list[Hit]:
        if where is not None:
            try:
                self.table.count_rows(where)
            except (ValueError, RuntimeError) as error:
                raise _WhereError(_reason(error)) from None
        if by == "auto":
            by = "hybrid" if self._words and words and words.strip() else "vector"
        if by == "vector" and self._loaded is None:
            rows = self._approximate(vector, k, where, self._shown)
            return [self._hit(row, 1 - row["_distance"], None) for row in rows]
        pool = k if by in ("vector", "words") else max(10 * k, 1000 if self._loaded else 100)
        space = self._space() if by == "hybrid" else None
        rankings: list[tuple[float, dict[int, int]]] = []
        if by != "words" and (space is None or space.trust > 0):
            assert vector is not None
            near = self._nearest(np.asarray(vector, np.float32), pool, where)
            rankings.append((1.0 if space is None else space.trust, {row: n for n, row in enumerate(near)}))
        if by != "vector" and self._words:
            search = self.table.search(words, query_type="fts", fts_columns="text").with_row_id(True)
            search = search.where(where) if where else search
            ranked = search.limit(pool).select(["id", "_score"]).to_arrow()
            values = ranked["_score"].to_numpy()
            # Equal scores share a rank, so that among equal words the vectors decide.
            places = np.searchsorted(-values, -values) if len(values) else values
            rankings.append((1.0, dict(zip(ranked["_rowid"].to_pylist(), places.tolist(), strict=True))))
        scores: dict[int, float] = {}
        for weight, ranking in rankings:
            for row, place in ranking.items():
                scores[row] = scores.get(row, 0.0) + weight / (FUSE + 1 + place)
        by_words = rankings[-1][1] if by != "vector" and self._words else {}
        best = sorted(scores, key=lambda row: -scores[row])[:k]
        if not best:
            return []
        table = self.table.take_row_ids(best).select([*self._shown, "_vector"]).with_row_id().to_arrow()
        found_rows = {row["_rowid"]: row for row in table.to_pylist()}
        hits = []
        for number in best:
            row = found_rows[number]
            near_by = float("nan") if vector is None else float(np.dot(row["_vector"], vector))
            if space is not None and number not in by_words and near_by <= space.unrelated:
                continue  # as near as what has nothing to do with it
            hits.append(self._hit(row, near_by, None if by == "vector" else scores[number]))
        return hits

    def _space(self) -> SpaceQuality | None:
        """What the model's space is worth, as its training measured; None where that is not known."""
        loaded = self.model.plait_model
        return loaded.checkpoint.space if loaded is not None else None

    def _hit(self, row: dict[str, Any], near: float, score: float | None) -> Hit:
        own = (*OWN, *TIMES)
        shown = {n: str(v) for n, v in row.items() if v is not None and not n.startswith("_") and n not in own}
        return Hit(row["id"], row["source"], row["kind"], near, near if score is None else score, row["text"], shown,
                   row["_preview"], row.get("start"), row.get("stop"))  # fmt: skip

    def _refresh(self) -> None:
        """See what other processes have committed; keep all vectors at hand while they are few."""
        self.table.checkout_latest()
        version = self.table.version
        if self._version != version:
            self._loaded = self._vectors() if self.table.count_rows() <= self.exact else None
            self._words = any(tuple(index.columns) == ("text",) for index in self.table.list_indices())
            self._shown = [n for n in self.table.schema.names if n not in ("_content", "_check", "_vector")]
            self._version = version

    def _vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """(row ids (N,), vectors (N, E)), each compared with its checksum."""
        chosen = ["id", "_content", "_vector", "_check"]
        rows, vectors = [np.zeros(0, np.uint64)], [np.zeros((0, self.metadata["width"]), np.float32)]
        for batch in self.table.search().select(chosen).with_row_id(True).limit(None).to_batches(8192):
            if not batch.num_rows:
                continue
            part = batch["_vector"].flatten().to_numpy().reshape(batch.num_rows, -1)
            sums = checksums(batch["id"].to_pylist(), batch["_content"].to_pylist(), part)
            wrong = np.flatnonzero(sums != batch["_check"].to_numpy())
            if len(wrong):
                first = batch["id"][int(wrong[0])]
                raise PlaitError(
                    f"{self.path} is damaged: {len(wrong)} entries, {first} the first, do not match their checksums. "
                    f"`plait index verify {self.path}` names the file: put it back from a copy."
                )
            vectors.append(part)
            rows.append(batch["_rowid"].to_numpy())
        return np.concatenate(rows), np.concatenate(vectors)

    def _approximate(
        self, vector: np.ndarray | None, k: int, where: str | None, columns: list[str]
    ) -> list[dict[str, Any]]:
        """The k nearest as the index of vectors finds them, best first, with "_distance", 1 - cosine."""
        query = self.table.search(np.asarray(vector, np.float32), vector_column_name="_vector").distance_type("cosine")
        # Without a bound LanceDB looks at all partitions, as it has to where a condition leaves few entries in each.
        query = query.minimum_nprobes(PROBES).maximum_nprobes(0 if where else PROBES)
        query = query.refine_factor(REFINE).with_row_id(True).limit(k)
        query = query.where(where, prefilter=True) if where else query
        return list(query.select([*columns, "_distance"]).to_arrow().to_pylist())

    def _nearest(self, vector: np.ndarray, k: int, where: str | None) -> list[int]:
        """The row ids of the k nearest vectors, best first."""
        if self._loaded is None:
            return [row["_rowid"] for row in self._approximate(vector, k, where, ["id"])]
        rows, vectors = self._loaded
        if where is not None:
            allowed = self.table.search().where(where).select(["id"]).with_row_id(True).limit(None).to_arrow()
            keep = np.isin(rows, allowed["_rowid"].to_numpy())
            rows, vectors = rows[keep], vectors[keep]
        near = vectors @ vector
        best = np.argpartition(-near, k - 1)[:k] if k < len(near) else np.arange(len(near))
        return [int(row) for row in rows[best[np.lexsort((rows[best], -near[best]))]]]

    # --- upkeep -------------------------------------------------------------------------------------------------

    def delete(self, where: str) -> int:
        """Delete the entries of which an SQL condition on `columns` is true; how many they were."""
        with self._writing():
            if self.table is None:
                return 0
            with self.reading():
                self.table.checkout_latest()
            try:
                count = int(self.table.count_rows(where))
            except (ValueError, RuntimeError) as error:
                raise PlaitError(
                    f"--where {where!r} cannot be used: {_reason(error)}. The columns are {', '.join(self.columns)}. "
                    "Nothing was deleted."
                ) from None
            if count:
                with self.reading("written"):
                    self.table.delete(where)
            self.add_export_constraints()
        return count

    def compact(self, progress: Progress = lambda *_: None) -> None:
        """Join small files, bring the indexes of words and vectors up to date, and remove what was deleted."""
        with self._writing():
            if self.table is not None:
                with self.reading():
                    self.table.checkout_latest()
                self._tidy(progress, timedelta(0))
                self.add_export_constraints()

    def verify(self) -> list[str]:
        """What is wrong with the index, a line a fault; empty where it is whole. Every file is compared with its sha256
        and every entry with its checksum."""
        wrong = self._damaged()
        try:
            with self.reading():
                self.table.checkout_latest()
                rows, _ = self._vectors()
                if len(rows) != self.table.count_rows():
                    wrong.append(f"{self.path}: {len(rows)} of {self.table.count_rows()} entries can be read")
                ids = self.table.search().select(["id"]).limit(None).to_arrow()["id"]
                if len(ids) != len(ids.unique()):
                    wrong.append(f"{self.path}: {len(ids) - len(ids.unique())} entries are there twice")
                for _ in self.table.search().select(self.table.schema.names).limit(None).to_batches(1024):
                    pass  # every page of every file is read once
        except PlaitError as error:
            wrong = wrong or [str(error)]
        return wrong

    def _damaged(self) -> list[str]:
        """The files that do not match their sha256."""
        wrong = []
        for name, (size, digest) in self._sums().items():
            file = Path(str(self.path)) / name
            # One that is gone was removed by a compaction; where that was not so, reading shows it.
            if file.is_file() and (file.stat().st_size != size or sha256_file(file) != digest):
                wrong.append(f"{file} does not match its sha256")
        return wrong

    def _sums(self) -> dict[str, tuple[int, str]]:
        """File -> bytes and sha256, as `settle` wrote them."""
        sums: dict[str, tuple[int, str]] = {}
        if isinstance(self.path, Path) and (self.path / "sums.jsonl").is_file():
            for line in (self.path / "sums.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):  # the last line may be cut
                    fact = json.loads(line)
                    sums[fact["file"]] = fact["bytes"], fact["sha256"]
        return sums

    def add_export_constraints(self) -> None:
        """Bring what was committed to the disk and note its sha256. LanceDB itself does not call fsync."""
        if not isinstance(self.path, Path):
            return
        known, there, folders = self._sums(), dict[str, tuple[int, str]](), {self.path}
        for folder, _, names in os.walk(self.path / f"{TABLE}.lance"):
            for name in names:
                file = Path(folder) / name
                short = file.relative_to(self.path).as_posix()
                if name.endswith("_hint.json"):  # written anew with every version, and never needed
                    continue
                if short in known:  # files are written once
                    there[short] = known[short]
                    continue
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
                there[short] = file.stat().st_size, sha256_file(file)
                folders.add(file.parent)
        if there != known:
            for changed in folders:
                fsync_folder(changed)
            facts = ({"file": name, "bytes": size, "sha256": digest} for name, (size, digest) in there.items())
            write_atomic(self.path / "sums.jsonl", "".join(json.dumps(fact) + "\n" for fact in facts))


def _best_moments(hits: list[Hit]) -> list[Hit]:
    """The hits, best first, of each video the best moment alone."""
    kept: dict[tuple[str, str], Hit] = {}
    for hit in hits:
        kept.setdefault((hit.source, "" if hit.start is not None else hit.id), hit)
    return list(kept.values())


class _WhereError(Exception):
    """A condition that cannot be understood; the message is its reason."""


def _reason(error: Exception) -> str:
    """What LanceDB says of a condition, without the places in its code."""
    return str(error).removeprefix("Invalid input, ").split(", /")[0].rstrip(".")[:200]
