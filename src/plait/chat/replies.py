"""Auto-reply: new messages answered from past questions and their replies, or met with silence.

An answer quotes the reply of the past question that is nearest. How near is near enough is found on messages that are
made of the questions: with some of their words, among words that mean nothing, they are to be answered, and must meet
silence once their pair is left out. So forty pairs suffice, and all of them stay in the past. What was fitted lies in
the run's folder as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from plait.chat.nearness import Embed, Nearness, words
from plait.core.errors import PlaitError
from plait.core.files import read_json, write_json
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.data.stores import read_place
from plait.inference.model import PlaitModel
from plait.training.tasks import QUESTIONS, REPLIES

FILE = "replies.json"
VERSION = 2
FEWEST = 8  # pairs
MOST = 2000  # pairs that are left out in turn
STRANGE, LEFT_OUT, MISTAKEN = 0.98, 0.8, 0.9  # shares of what must not be answered that meets silence; see `fit`
MADE = 4  # messages that are made of each question
SHARES = {"characters": 0.4, "words": 0.3, "words with the reply": 0.3, "encoder": 2.0}  # of the kinds of nearness
FEATURES = ("nearness of the nearest pair", "its lead over the nearest with another reply", "rarity of what is shared",
            "share of the question that is shared", "its nearness by meaning")  # fmt: skip
FILLERS = (2, 8)  # words that mean nothing in a message that is made
DRAW = 331  # key of `uniform`


@dataclass(frozen=True)
class Pair:
    """A past question and its reply; `nearness` to a message is from 0 to 1."""

    question: str
    reply: str
    nearness: float


@dataclass(frozen=True)
class Answer:
    """A reply, None for silence; how sure it is, the least that is asked for, and the nearest past pairs. `composed`
    says that the model wrote the reply, else it is quoted."""

    reply: str | None
    confidence: float
    threshold: float
    sources: list[Pair]
    composed: bool = False


@dataclass
class Confidence:
    """A logistic regression on `FEATURES`, scaled, and the least confidence at which an answer is given. `answered` and
    `silent` are the shares of questions with and without an answer that were treated right, each pair left out."""

    mean: list[float]
    scale: list[float]
    weights: list[float]
    bias: float
    threshold: float
    answered: float
    silent: float
    measured: int  # questions of the data that have no reply; pairs that were left out stand beside them

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(N, features) to (N,) in [0, 1]."""
        scaled = (features - np.array(self.mean)) / np.array(self.scale)
        return np.asarray(1 / (1 + np.exp(-(scaled @ np.array(self.weights) + self.bias))))


class Replies:
    """Answers from the past pairs of a dataset."""

    def __init__(
        self,
        dataset: Dataset,
        question: str | None = None,
        reply: str | None = None,
        embed: Embed | None = None,
        model: PlaitModel | None = None,
    ) -> None:
        """`question` and `reply` are the columns; found by their names, else the first two texts. `embed` is a text
        encoder that helps to find what is near; `model` writes replies where that is asked for.

        Raises PlaitError where there are no such columns or too few pairs."""
        self.dataset, self.model = dataset, model
        self.question, self.reply = _columns(dataset, question, reply)
        questions, replies = dataset.texts(self.question), dataset.texts(self.reply)
        known = [i for i in range(len(dataset)) if questions[i] and replies[i]]
        if len(known) < FEWEST:
            raise PlaitError(
                f"{dataset.path} has {len(known)} records with both {self.question} and {self.reply}; at least "
                f"{FEWEST} are needed."
            )
        self.questions = [str(questions[i]) for i in known]
        self.replies = [str(replies[i]) for i in known]
        self.never = [str(questions[i]) for i in range(len(dataset)) if questions[i] and not replies[i]]
        place = {text: i for i, text in enumerate(dict.fromkeys(self.replies))}
        self.owner = np.array([place[text] for text in self.replies])  # pair -> distinct reply
        self.nearness = Nearness(self.questions, self.replies, embed)
        shares = np.array([SHARES[kind] for kind in self.nearness.kinds])
        self.shares = shares / shares.sum()
        self.confidence: Confidence | None = None

    # --- answers ----------------------------------------------------------------------------------------------

    def answer(self, messages: list[str], sources: int = 3, compose: bool = False) -> list[Answer]:
        """An answer to each message, with so many past pairs: the reply of the nearest, or with `compose` one that the
        model writes. Needs `fit`, or what an earlier one left."""
        if self.confidence is None:
            raise PlaitError("How sure is sure enough has not been found yet. Call fit() first.")
        if compose and self.model is None:
            raise PlaitError("Replies are composed by a model that was trained on the pairs; here there is none.")
        found: list[Answer] = []
        for start in range(0, len(messages), 256):
            kinds = self.nearness(messages[start : start + 256])
            for message, each in zip(messages[start : start + 256], kinds, strict=True):
                found.append(self._answer(message, each, sources, compose))
        return found

    def _answer(self, message: str, kinds: np.ndarray, sources: int, compose: bool) -> Answer:
        assert self.confidence is not None
        near = kinds @ self.shares
        chance = float(self.confidence(np.array([self._features(message, kinds)]))[0])
        order = np.argsort(-near, kind="stable")
        pairs = [Pair(self.questions[i], self.replies[i], float(near[i].clip(0, 1))) for i in order[:sources]]
        said: str | None = self.replies[order[0]]
        if chance <= self.confidence.threshold:
            said = None
        elif compose:
            assert self.model is not None
            said = self.model.write([self.model.context(message)], self.reply)[0][0]
        return Answer(said, chance, self.confidence.threshold, pairs, compose and said is not None)

    def _features(self, message: str, kinds: np.ndarray, without: np.ndarray | None = None) -> list[float]:
        """As `FEATURES` names them, of a message and the kinds (pairs, kinds) of its nearness; pairs where `without` is
        true are treated as never seen."""
        near = kinds @ self.shares
        if without is not None:
            near = np.where(without, -1.0, near)
        best = int(near.argmax())
        others = near[self.owner != self.owner[best]]
        second = max(float(others.max()), 0.0) if len(others) else 0.0
        rarest, covered = self.nearness.by_words.shared(message, best)
        meaning = float(kinds[best, -1]) if self.nearness.embed is not None else 0.0
        top = max(float(near[best]), 0.0)
        return [top, max(top - second, 0.0), rarest, covered, meaning]

    def _right(self, kinds: np.ndarray, wanted: int, without: np.ndarray | None = None) -> bool:
        """Whether the nearest pair has the reply `wanted`."""
        near = kinds @ self.shares
        near = near if without is None else np.where(without, -1.0, near)
        return bool(self.owner[int(near.argmax())] == wanted)

    # --- how sure is sure enough ------------------------------------------------------------------------------

    def fit(self) -> Confidence:
        """Fit the confidence on messages made of the questions. To be answered: those whose nearest pair has their
        reply. To meet silence: those whose nearest has another, those whose pairs are left out, words that mean
        nothing, and the questions of the data that have no reply."""
        order = np.argsort(uniform(DRAW, np.arange(len(self.questions))), kind="stable")[:MOST]
        right: list[list[float]] = []
        mistaken: list[list[float]] = []
        left_out: list[list[float]] = []
        strange: list[list[float]] = []
        for i in order:
            messages = [self._made(int(i), number, number + 1 < MADE) for number in range(MADE)]
            alike = self.owner == self.owner[i]
            for number, (message, kinds) in enumerate(zip(messages, self.nearness(messages), strict=True)):
                if number + 1 == MADE:
                    strange.append(self._features(message, kinds))
                    continue
                fine = self._right(kinds, self.owner[i])
                (right if fine else mistaken).append(self._features(message, kinds))
                left_out.append(self._features(message, kinds, alike))
        real: list[list[float]] = []
        if self.never:
            pairs = zip(self.never, self.nearness(self.never), strict=True)
            real = [self._features(message, kinds) for message, kinds in pairs]
        groups = [(mistaken, MISTAKEN), (left_out, LEFT_OUT), (strange + real, STRANGE)]
        outside = [row for rows, _ in groups for row in rows]
        if not right:
            raise PlaitError("No question is nearer to its own pair than to others. Give pairs that differ more.")
        features = np.array(right + outside)
        labels = np.arange(len(features)) < len(right)
        mean, scale = features.mean(0), features.std(0) + 1e-6
        model = LogisticRegression(class_weight="balanced", max_iter=1000).fit((features - mean) / scale, labels)
        fitted = mean.tolist(), scale.tolist(), model.coef_[0].tolist(), float(model.intercept_[0])
        found = Confidence(*fitted, threshold=0.5, answered=0, silent=0, measured=len(real))
        found.threshold = max(float(np.quantile(found(np.array(rows)), share)) for rows, share in groups if rows)
        found.answered = float((found(np.array(right)) > found.threshold).sum() / (len(right) + len(mistaken)))
        found.silent = float((found(np.array(outside)) <= found.threshold).mean())
        self.confidence = found
        return found

    def _made(self, pair: int, number: int, asks: bool) -> str:
        """A message as somebody else might ask for a pair: some words of its question, those that say most being as
        likely to be missing as others, among words that mean nothing. Where it does not ask, the common words alone."""
        parts = self.questions[pair].split()
        draw = uniform(DRAW, pair, number, np.arange(len(parts) + 1))
        rare = [max((self.nearness.by_words.rarity(word) for word in words(part)), default=0.0) for part in parts]
        if asks:
            kept = [part for part, chance in zip(parts, draw, strict=False) if chance < 0.5]
            kept = kept or [parts[int(np.argmax(rare))]]
        else:
            kept = [part for part, value in zip(parts, rare, strict=True) if value < np.median(rare)]
        fillers = FILLERS[0] + int(draw[-1] * (FILLERS[1] - FILLERS[0] + 1))
        return " ".join([*kept, *(_nonsense(pair, number, k) for k in range(fillers))])

    def save(self, folder: Path) -> None:
        """Write down what was fitted, for runs of this data."""
        assert self.confidence is not None
        facts: dict[str, Any] = {"question": self.question, "reply": self.reply, "kinds": self.nearness.kinds}
        facts["confidence"] = asdict(self.confidence)
        write_json(folder / FILE, {"version": VERSION, "pairs": len(self.questions), **facts})

    def restore(self, folder: Path) -> bool:
        """Take up what `save` wrote; False where there is nothing that fits these pairs."""
        path = folder / FILE
        if not path.is_file():
            return False
        known: dict[str, Any] = read_json(path)
        if known.get("version") != VERSION or known.get("pairs") != len(self.questions):
            return False
        if (known["question"], known["reply"], known["kinds"]) != (self.question, self.reply, self.nearness.kinds):
            return False
        self.confidence = Confidence(**known["confidence"])
        return True


def _nonsense(*keys: int) -> str:
    """A word that no text holds, of two to eight letters."""
    draw = uniform(DRAW, *keys, np.arange(9))
    letters = np.array([*"aeiounrtslm"])
    return "".join(letters[(draw[: 2 + int(draw[8] * 7)] * len(letters)).astype(int)])


def same(a: str, b: str) -> bool:
    """Whether two replies say the same, but for white space."""
    return " ".join(a.split()) == " ".join(b.split())


def _columns(dataset: Dataset, question: str | None, reply: str | None) -> tuple[str, str]:
    texts = [c for c, kind in dataset.columns.items() if kind == "text" and c not in dataset.manifest.chats]
    second = reply or next((c for c in texts if c.lower() in REPLIES and c != question), None)
    first = question or next((c for c in texts if c.lower() in QUESTIONS), None)
    first = first or next((c for c in texts if c != second), None)
    second = second or next((c for c in texts if c != first), None)
    for name in (first, second):
        if name is None or name not in texts:
            raise PlaitError(
                f"Auto-reply needs a column of questions and one of replies; there is "
                f"{'no ' + repr(name) if name else 'none'} among {', '.join(texts) or 'no texts'}. Name them with "
                "--question and --answer."
            )
    assert first is not None and second is not None
    return first, second


def open_replies(
    run: Path, dataset: Path | None, question: str | None, reply: str | None, embed: Embed | None = None,
    model: PlaitModel | None = None, least: float | None = None,
) -> Replies:  # fmt: skip
    """The replies of a run, fitted now or before; `dataset` is where the pairs lie, by default the run's. `least` is
    the least confidence, in place of the one that was found.

    Raises PlaitError where the run or its data are not there."""
    if dataset is None:
        facts = run / "run.json"
        if not facts.is_file():
            raise PlaitError(f"{run} is no run, so its past replies are not known. Name them with --data.")
        place = read_place(read_json(facts)["dataset"], run)
    else:
        place = dataset
    replies = Replies(Dataset.open(place), question, reply, embed, model)
    if not replies.restore(run):
        replies.fit()
        if (run / "run.json").is_file():
            replies.save(run)
    if least is not None:
        assert replies.confidence is not None
        replies.confidence = replace(replies.confidence, threshold=least)
    return replies
