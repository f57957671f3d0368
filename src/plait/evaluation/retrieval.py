"""Search in the embedding space: every ordered pair of columns with a medium in it, trained together or not."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from plait.evaluation import metrics
from plait.evaluation.context import EvalContext, Media
from plait.evaluation.findings import Gallery, GalleryKind
from plait.evaluation.keys import Direction
from plait.evaluation.outcome import Outcome

SHOWN_QUERIES = 3


@dataclass(frozen=True)
class Cutoff:
    """A figure of the first `depth` that are found: recall or precision."""

    metric: str
    depth: int
    recall: bool = True


CUTOFFS = (Cutoff("r_at_1", 1), Cutoff("r_at_5", 5), Cutoff("r_at_10", 10), Cutoff("p_at_10", 10, recall=False))
VERDICT = CUTOFFS[2]  # by which it is said whether a search by words has learnt anything


@dataclass
class Embedded:
    """The records of one column in the embedding space.

    Attributes:
        records: Their numbers (N,).
        places: Their embeddings (N, E), of unit length.
        media: The samples; of a column of texts the records alone.
    """

    records: np.ndarray
    places: np.ndarray
    media: Media


class Relevance:
    """Which records are related: those that are one, or share an equal text in some column."""

    def __init__(self, eval_context: EvalContext) -> None:
        self.columns = eval_context.text_columns
        self.keys = np.zeros((len(eval_context.dataset), max(len(self.columns), 1)), np.int64)  # 0: no text
        for i, column in enumerate(self.columns):
            number: dict[str, int] = {}
            texts = eval_context.texts[column]
            self.keys[:, i] = [0 if text is None else number.setdefault(text, len(number) + 1) for text in texts]

    def texts(self, records: np.ndarray) -> np.ndarray:
        """How many texts each record has, (N,)."""
        return (self.keys[records] > 0).sum(1)

    def of(self, queries: np.ndarray, records: np.ndarray, column: str) -> np.ndarray:
        """Which of a column's records (N,) each query's record (Q,) should find, (Q, N)."""
        first, second = self.keys[queries][:, None], self.keys[records][None]
        related = ((first == second) & (first > 0)).any(-1) | (queries[:, None] == records[None])
        if column not in self.columns:
            return related
        # Equal texts are one thing to find, whichever record they stand in.
        _, same = np.unique(self.keys[records, self.columns.index(column)], return_inverse=True)
        texts = related.astype(np.float32) @ np.eye(same.max() + 1, dtype=np.float32)[same]
        return texts[:, same] > 0


def evaluate_retrieval(eval_context: EvalContext) -> None:
    """Measure every ordered pair of columns with a medium in it."""
    by_column = {
        column: embedded for column in eval_context.columns if (embedded := _embed(eval_context, column)) is not None
    }
    relevance = Relevance(eval_context)
    for source, target in permutations(by_column, 2):
        if source in eval_context.media_columns or target in eval_context.media_columns:
            _search(eval_context, Direction(source, target), by_column[source], by_column[target], relevance)


def _embed(eval_context: EvalContext, column: str) -> Embedded | None:
    """The records of the split that have something in this column; None where none has."""
    if column in eval_context.media_columns:
        media = eval_context.samples(column, eval_context.split)
        return Embedded(media.indices, eval_context.embedded(column, media), media) if len(media) else None
    texts = eval_context.texts[column]
    present = np.array([i for i in eval_context.dataset.indices(eval_context.split) if texts[i]], np.int64)
    present = eval_context.draw(present, eval_context.limits.records)
    if not len(present):
        return None
    distinct, place = np.unique([texts[i] for i in present], return_inverse=True)
    places = eval_context.model.embed_sequences([eval_context.text_sequence(str(text)) for text in distinct])
    return Embedded(present, places[place], Media(present, []))


def _queries(eval_context: EvalContext, source: str, queries_embedded: Embedded, relevance: Relevance) -> np.ndarray:
    """Places of what is asked, ascending. An equal text is an equal query: it counts once, by the record that says
    most."""
    if source in eval_context.media_columns:
        chosen = np.arange(len(queries_embedded.records))
    else:
        best_place: dict[str, int] = {}
        for place in np.argsort(-relevance.texts(queries_embedded.records), kind="stable"):
            best_place.setdefault(eval_context.texts[source][queries_embedded.records[place]], int(place))
        chosen = np.sort(np.array(list(best_place.values())))
    return eval_context.draw(chosen, eval_context.limits.queries)


def _search(
    eval_context: EvalContext, direction: Direction, queries_embedded: Embedded, gallery: Embedded, relevance: Relevance
) -> None:
    """Recall and precision at some depths, and some queries for the report."""
    if len(gallery.records) < 2:  # what is found of one is always right
        return
    chosen, target = _queries(eval_context, direction.source, queries_embedded, relevance), direction.target
    chosen = chosen[relevance.of(queries_embedded.records[chosen], gallery.records, target).any(1)]
    if not len(chosen):
        return
    queries = queries_embedded.records[chosen]
    result = metrics.retrieval(
        queries_embedded.places[chosen],
        gallery.places,
        lambda a, b: relevance.of(queries[a:b], gallery.records, target),
    )
    _keep(eval_context, direction, result, queries, len(gallery.records))
    if target not in eval_context.media_columns:
        return
    rows = []
    for i in eval_context.draw(np.arange(len(chosen)), SHOWN_QUERIES):
        related = relevance.of(queries[i : i + 1], gallery.records, target)[0]
        items = [
            eval_context.preview_sample(target, gallery.media.samples[j], f"{rank + 1}", bool(related[j]))
            for rank, j in enumerate(result["top"][i][: eval_context.modality(target).shown])
        ]
        rows.append((eval_context.preview_input(direction.source, queries_embedded.media, int(chosen[i])), items))
    note = (
        f"Three queries drawn by the seed among {len(gallery.records):,} records; green ones share a text with the "
        "query."
    )
    title = f"Retrieval: {direction.arrow}"
    eval_context.findings.galleries.append(Gallery(title, note, rows, GalleryKind.RETRIEVAL))


def _keep(
    eval_context: EvalContext, direction: Direction, result: dict[str, np.ndarray], queries: np.ndarray, size: int
) -> None:
    """The figures of a search for these queries' records (Q,) among `size` ones."""
    clean, seed = eval_context.clean(queries), eval_context.seed
    for cutoff in CUTOFFS:
        values = result[cutoff.metric]
        if clean is not None:
            value, error = metrics.mean_with_error(values[clean], seed=seed)
            eval_context.keep(
                "retrieval", direction, cutoff.metric, value, stderr=error, n=int(clean.sum()), clean=True
            )
        value, error = metrics.mean_with_error(values, seed=seed)
        recall, precision = metrics.retrieval_chance(result["relevant"], size, cutoff.depth)
        blind = recall if cutoff.recall else precision
        eval_context.keep(
            "retrieval", direction, cutoff.metric, value, stderr=error, chance=blind, baseline=blind, n=len(queries)
        )
        if cutoff == VERDICT and direction.source in eval_context.text_columns:
            subject = f"{direction.target} by {direction.source}, among {size:,}"
            eval_context.findings.outcomes.append(
                Outcome("retrieval", subject, "found among the first ten", value, error, len(queries), blind)
            )
