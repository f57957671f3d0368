"""Auto-reply: new messages answered from past questions and their replies, or met with silence.

A model that was trained on the pairs writes the reply. Beside it stand the past pairs whose questions are nearest, as
its sources; how sure the answer is comes from both, by a logistic regression on the pairs of val, which also sets how
sure it must be. What was fitted lies in the run's folder as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from plait.core.errors import PlaitError
from plait.core.files import read_json, write_json
from plait.data.dataset import Dataset
from plait.data.stores import read_place
from plait.inference.model import PlaitModel

FILE = "replies.json"
VERSION = 1
CANDIDATES = 32  # distinct past replies, of the nearest questions, whose likelihoods are compared
FEATURES = ("nearness of the nearest past question", "likelihood of the likeliest past reply",
            "its lead over the second", "whether the nearest question got it")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A past question and its reply; `nearness` to a message is from 0 to 1."""

    question: str
    reply: str
    nearness: float


@dataclass(frozen=True)
class Answer:
    """A reply, None for silence; how sure it is, the least that is asked for, and the nearest past pairs."""

    reply: str | None
    confidence: float
    threshold: float
    sources: list[Pair]


@dataclass(frozen=True)
class _Evidence:
    """What is known of a message before it is answered."""

    near: np.ndarray  # (P,) the nearness of each past question
    places: np.ndarray  # (C,) the candidates among the distinct replies, the nearest first
    likely: np.ndarray  # (C,) their mean log-likelihoods a token


@dataclass
class Confidence:
    """A logistic regression on `FEATURES`, scaled, and the least confidence at which an answer is given. `answered` and
    `silent` are the shares of val's questions with and without an answer that were treated right."""

    mean: list[float]
    scale: list[float]
    weights: list[float]
    bias: float
    threshold: float
    answered: float
    silent: float
    measured: int  # questions of val that have no reply; where there are none, replies were taken away from others

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(N, features) to (N,) in [0, 1]."""
        scaled = (features - np.array(self.mean)) / np.array(self.scale)
        return np.asarray(1 / (1 + np.exp(-(scaled @ np.array(self.weights) + self.bias))))


class Replies:
    """Answers from the past pairs of a dataset, by a model that was trained on it."""

    def __init__(
        self, model: PlaitModel, dataset: Dataset, question: str | None = None, reply: str | None = None
    ) -> None:
        """`question` and `reply` are the columns; by default the one that is never written, and the first other text.

        Raises PlaitError where there are no such columns or no pairs."""
        self.model, self.dataset = model, dataset
        self.question, self.reply = _columns(model, dataset, question, reply)
        questions, replies = dataset.texts(self.question), dataset.texts(self.reply)
        train = [i for i in dataset.indices("train") if questions[i] and replies[i]]
        if not train:
            raise PlaitError(f"{dataset.path} has no record in train with both {self.question} and {self.reply}.")
        self.questions = [str(questions[i]) for i in train]
        self.replies = [str(replies[i]) for i in train]
        self.distinct = list(dict.fromkeys(self.replies))
        self.place = {text: i for i, text in enumerate(self.distinct)}
        self.owner = np.array([self.place[text] for text in self.replies])  # pair -> distinct reply
        self.words = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
        self.table = self.words.fit_transform(self.questions)
        self.confidence: Confidence | None = None

    # --- answers ----------------------------------------------------------------------------------------------

    def answer(self, messages: list[str], sources: int = 3) -> list[Answer]:
        """An answer to each message, with so many past pairs. Needs `fit`, or what an earlier one left."""
        if self.confidence is None:
            raise PlaitError("How sure is sure enough has not been found yet. Call fit() first.")
        if not messages:
            return []
        known = [self._evidence(message) for message in messages]
        sure = self.confidence(np.array([self._features(one) for one in known]))
        written = [rows[0] for rows in self.model.write([self.model.context(text) for text in messages], self.reply)]
        found = []
        for one, reply, chance in zip(known, written, sure, strict=True):
            best = np.argsort(-one.near, kind="stable")[:sources]
            pairs = [Pair(self.questions[i], self.replies[i], float(one.near[i])) for i in best]
            given = reply if chance >= self.confidence.threshold and reply.strip() else None
            found.append(Answer(given, float(chance), self.confidence.threshold, pairs))
        return found

    def _evidence(self, message: str) -> _Evidence:
        near = (self.words.transform([message]) @ self.table.T).toarray()[0]
        order = self.owner[np.argsort(-near, kind="stable")]
        places = np.array(list(dict.fromkeys(order.tolist()))[: CANDIDATES + 1])
        texts = [self.distinct[i] for i in places]
        lengths = [len(ids) + 1 for ids in self.model.checkpoint.text.encode_batch(texts)]
        scores = self.model.score([self.model.context(message)], self.reply, texts)[0]
        return _Evidence(near, places, scores / np.array(lengths))

    def _features(self, one: _Evidence, without: int = -1) -> list[float]:
        """As `FEATURES` names them; `without` is a distinct reply that is treated as never given."""
        near = np.where(self.owner == without, -1.0, one.near)
        places, likely = one.places[one.places != without], one.likely[one.places != without]
        if not len(places):
            return [0.0, -20.0, 0.0, 0.0]
        order = np.argsort(-likely, kind="stable")
        lead = likely[order[0]] - likely[order[1]] if len(order) > 1 else 0.0
        nearest = int(near.argmax())
        agree = self.owner[nearest] == places[order[0]]
        return [
            max(float(near[nearest]), 0.0),
            max(float(likely[order[0]]), -20.0),
            min(float(lead), 20.0),
            float(agree),
        ]

    # --- how sure is sure enough ------------------------------------------------------------------------------

    def fit(self) -> Confidence:
        """Fit the confidence on val: its questions whose reply the model writes right are to be answered; others, those
        without a reply, and all once more with their reply taken away from the past are to meet silence.

        Raises PlaitError where val has too few of them."""
        questions, replies = self.dataset.texts(self.question), self.dataset.texts(self.reply)
        val = [i for i in self.dataset.indices("val") if questions[i]]
        asked = [i for i in val if replies[i]]
        never = [i for i in val if not replies[i]]
        if len(asked) < 8:
            raise PlaitError(
                f"{self.dataset.path} has {len(asked)} questions with replies in val; at least 8 are needed to tell "
                "how sure an answer must be. Give more of them the split val."
            )
        known = [self._evidence(str(questions[i])) for i in asked]
        contexts = [self.model.context(str(questions[i])) for i in asked]
        written = [rows[0] for rows in self.model.write(contexts, self.reply)]
        right = np.array([same(text, str(replies[i])) for text, i in zip(written, asked, strict=True)])
        inside = np.array([self._features(one) for one in known])
        true = [self.place.get(str(replies[i]), -1) for i in asked]
        outside = np.array([self._features(one, gone) for one, gone in zip(known, true, strict=True) if gone >= 0])
        real = np.array([self._features(self._evidence(str(questions[i]))) for i in never])
        real, outside = real.reshape(-1, len(FEATURES)), outside.reshape(-1, len(FEATURES))
        features = np.concatenate([inside, outside, real])
        labels = np.concatenate([right, np.zeros(len(outside) + len(real))]).astype(int)
        if labels.min() == labels.max():
            raise PlaitError(
                "The model writes none of val's replies. Train it longer, or with more pairs: plait evaluate shows how "
                "far it is."
            )
        mean, scale = features.mean(0), features.std(0) + 1e-6
        model = LogisticRegression(class_weight="balanced", max_iter=1000).fit((features - mean) / scale, labels)
        fitted = mean.tolist(), scale.tolist(), model.coef_[0].tolist(), float(model.intercept_[0])
        found = Confidence(*fitted, threshold=0.5, answered=0, silent=0, measured=len(never))
        good = found(inside)
        bad = found(real) if len(real) else found(outside)
        found.threshold = _threshold(good[right], bad)
        found.answered = float(((good >= found.threshold) & right).mean())
        found.silent = float((bad < found.threshold).mean())
        self.confidence = found
        return found

    def save(self, folder: Path) -> None:
        """Write down what was fitted, for runs of this data."""
        assert self.confidence is not None
        facts = {"question": self.question, "reply": self.reply, "confidence": asdict(self.confidence)}
        write_json(folder / FILE, {"version": VERSION, "pairs": len(self.questions), **facts})

    def restore(self, folder: Path) -> bool:
        """Take up what `save` wrote; False where there is nothing that fits this data."""
        path = folder / FILE
        if not path.is_file() or (path.stat().st_mtime < (folder / "checkpoints" / "best").stat().st_mtime):
            return False
        known: dict[str, Any] = read_json(path)
        if known.get("version") != VERSION or known.get("pairs") != len(self.questions):
            return False
        if (known["question"], known["reply"]) != (self.question, self.reply):
            return False
        self.confidence = Confidence(**known["confidence"])
        return True


def same(a: str, b: str) -> bool:
    """Whether two replies say the same, but for white space."""
    return " ".join(a.split()) == " ".join(b.split())


def _threshold(good: np.ndarray, bad: np.ndarray) -> float:
    """The confidence that parts answers from silence best: the mean of the shares on the right side is largest, and
    where several are, in their middle."""
    edges = np.unique(np.concatenate([good, bad, [0.0, 1.0]]))
    cuts = (edges[1:] + edges[:-1]) / 2
    shares = np.array([(good >= cut).mean() + (bad < cut).mean() for cut in cuts])
    best = np.flatnonzero(shares >= shares.max() - 1e-9)
    return float((cuts[best[0]] + cuts[best[-1]]) / 2)


def _columns(model: PlaitModel, dataset: Dataset, question: str | None, reply: str | None) -> tuple[str, str]:
    texts = [c for c, kind in model.columns.items() if kind == "text" and dataset.columns.get(c) == "text"]
    unwritten = [c for c in texts if c in model.checkpoint.model.config.read_only]
    first = question or next(iter(unwritten or texts), None)
    second = reply or next((c for c in texts if c != first and c not in unwritten), None)
    for name in (first, second):
        if name is None or name not in texts:
            raise PlaitError(
                f"Auto-reply needs a column of questions and one of replies that the model writes; there is "
                f"{'no ' + repr(name) if name else 'none'} among {', '.join(texts) or 'no texts'}. Name them with "
                "--question and --answer."
            )
    assert first is not None and second is not None
    return first, second


def open_replies(
    model: PlaitModel, run: Path, dataset: Path | None, question: str | None, reply: str | None
) -> Replies:
    """The replies of a run, fitted now or before; `dataset` is where the run's pairs lie by default.

    Raises PlaitError where the run or its data are not there."""
    if dataset is None:
        facts = run / "run.json"
        if not facts.is_file():
            raise PlaitError(f"{run} is no run, so its past replies are not known. Name them with --data.")
        place = read_place(read_json(facts)["dataset"], run)
    else:
        place = dataset
    replies = Replies(model, Dataset.open(place), question, reply)
    if not replies.restore(run):
        replies.fit()
        if (run / "run.json").is_file():
            replies.save(run)
    return replies
