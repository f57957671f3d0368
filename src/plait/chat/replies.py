"""Auto-reply: new messages answered from past questions and their replies, or met with silence.

An answer quotes the reply of the past question that is nearest. Whether it is near enough is judged by its lead over
the nearest question with another reply, beside the leads that past questions themselves have where their own pairs are
left out: those are messages which nothing in the past answers, asked by the same people about the same things. So forty
pairs suffice, and all of them stay in the past. What was fitted lies in the run's folder as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from plait.chat.nearness import Embed, Nearness
from plait.core.config import Recipe
from plait.core.errors import PlaitError
from plait.core.files import read_json, write_json
from plait.core.rng import uniform
from plait.data.conversations import Turn, turns
from plait.data.dataset import Dataset
from plait.data.stores import read_place
from plait.inference.model import PlaitModel
from plait.training.tasks import QUESTIONS, REPLIES

FILE = "replies.json"
VERSION = 4
FEWEST = 8  # pairs
MOST = 2000  # pairs that are left out in turn
# Share of what must not be answered that an answer has to stand out from. Questions whose pairs are left out are harder
# to tell than what strangers ask, and words alone mislead seldom; an encoder finds likeness everywhere.
SURE, SURE_WITH_ENCODER = 0.85, 0.95
SHARES = {"characters": 0.2, "words": 0.2, "words with the reply": 0.6, "encoder": 4.0}  # of the kinds of nearness
RNG_STREAM = 331  # of the random numbers of `uniform`


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
    """How sure an answer is: the share of messages without an answer whose lead is smaller (a conformal p-value's
    complement). Those are questions whose pairs were left out, and the data's questions that have no reply.

    Attributes:
        leads: theirs, ascending.
        threshold: the least confidence at which an answer is given.
        measured: how many of them are the data's own.
    """

    leads: list[float]
    threshold: float
    measured: int

    def __call__(self, lead: float) -> float:
        """The confidence, in [0, 1), of an answer whose pair leads by so much."""
        return float(np.searchsorted(self.leads, lead, side="left") / (len(self.leads) + 1))


@dataclass(frozen=True)
class LeftOut:
    """What was answered where each past question's own pair was left out.

    Attributes:
        answerable: questions whose reply stands at another question too; `right` and `wrong` of them were answered so.
        unanswerable: questions whose reply stands nowhere else, so that silence is right; `silent` of them met it.
    """

    answerable: int
    right: int
    wrong: int
    unanswerable: int
    silent: int


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
        """`question` and `reply` are the columns; found by their names, else the first two texts; of conversations,
        each user's message and the reply to it are a pair. `embed` is a text encoder that helps to find what is near;
        `model` writes replies where that is asked for.

        Raises PlaitError where there are no such columns or too few pairs."""
        self.dataset, self.model = dataset, model
        self.question, self.reply = _columns(dataset, question, reply)
        pairs = _pairs(dataset, self.question, self.reply)
        known = [(asked, said) for asked, said in pairs if said]
        if len(known) < FEWEST:
            what = "replies in conversations" if self.question == self.reply else "records with both"
            columns = " and ".join(dict.fromkeys((self.question, self.reply)))
            raise PlaitError(f"{dataset.path} has {len(known)} {what} ({columns}); at least {FEWEST} are needed.")
        self.questions, self.replies = [asked for asked, _ in known], [said for _, said in known]
        self.never = [asked for asked, said in pairs if not said]
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
        answers: list[Answer] = []
        for start in range(0, len(messages), 256):
            kinds = self.nearness(messages[start : start + 256])
            for message, each in zip(messages[start : start + 256], kinds, strict=True):
                answers.append(self._answer(message, each, sources, compose))
        return answers

    def _answer(self, message: str, kinds: np.ndarray, sources: int, compose: bool) -> Answer:
        assert self.confidence is not None
        near = kinds @ self.shares
        chance = self.confidence(float(self._leads(near[None])[0]))
        order = np.argsort(-near, kind="stable")
        pairs = [Pair(self.questions[i], self.replies[i], float(near[i].clip(0, 1))) for i in order[:sources]]
        text: str | None = self.replies[order[0]]
        if chance < self.confidence.threshold:
            text = None
        elif compose:
            assert self.model is not None
            if self.question == self.reply:
                raise PlaitError("Replies from conversations are quoted alone. To have the model write: plait chat RUN")
            text = self.model.write([self.model.context(message)], self.reply)[0][0]
        return Answer(text, chance, self.confidence.threshold, pairs, compose and text is not None)

    def _leads(self, near: np.ndarray) -> np.ndarray:
        """From nearness (messages, pairs): by how much the nearest pair leads the nearest with another reply."""
        nearest = self.owner[near.argmax(1)]
        others = np.where(self.owner[None] == nearest[:, None], 0.0, near).max(1)
        return np.asarray(np.maximum(near.max(1) - others, 0.0))

    # --- how sure is sure enough ------------------------------------------------------------------------------

    def fit(self) -> Confidence:
        """Find what leads messages without an answer have."""
        order = np.argsort(uniform(RNG_STREAM, np.arange(len(self.questions))), kind="stable")[:MOST]
        leads = []
        for start in range(0, len(order), 256):
            chunk = order[start : start + 256]
            near = self.nearness([self.questions[i] for i in chunk]) @ self.shares
            own = self.owner[chunk][:, None] == self.owner[None]
            leads.append(self._leads(np.where(own, 0.0, near)))
        if self.never:
            leads.append(self._leads(self.nearness(self.never) @ self.shares))
        ascending = np.sort(np.concatenate(leads)).tolist()
        sure = SURE if self.nearness.embed is None else SURE_WITH_ENCODER
        least = sure * len(ascending) / (len(ascending) + 1)
        self.confidence = Confidence(ascending, least, len(self.never))
        return self.confidence

    def measure(self) -> LeftOut:
        """Ask each past question, at most MOST, without its own pair. Needs `fit`, or what an earlier one left."""
        if self.confidence is None:
            raise PlaitError("How sure is sure enough has not been found yet. Call fit() first.")
        order = np.argsort(uniform(RNG_STREAM, np.arange(len(self.questions))), kind="stable")[:MOST]
        with_others = np.bincount(self.owner)[self.owner] > 1
        answered, right = np.zeros(len(order), bool), np.zeros(len(order), bool)
        for start in range(0, len(order), 256):
            places = order[start : start + 256]
            near = self.nearness([self.questions[i] for i in places]) @ self.shares
            near[np.arange(len(places)), places] = 0.0
            leads = self._leads(near)
            here = slice(start, start + len(places))
            answered[here] = [self.confidence(float(lead)) >= self.confidence.threshold for lead in leads]
            right[here] = self.owner[near.argmax(1)] == self.owner[places]
        known = with_others[order]
        return LeftOut(
            int(known.sum()), int((known & answered & right).sum()), int((known & answered & ~right).sum()),
            int((~known).sum()), int((~known & ~answered).sum()),
        )  # fmt: skip

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


def are_pairs(dataset: Dataset) -> bool:
    """Whether a dataset holds questions and their replies, by the names of its columns, and nothing else."""
    names = {column.lower() for column, kind in dataset.columns.items() if kind == "text"}
    return len(dataset.columns) == 2 and bool(names & set(QUESTIONS)) and bool(names & set(REPLIES))


def answers_by_quoting(recipe: Recipe, dataset: Dataset) -> bool:
    """Whether a run's task is to answer from past pairs."""
    return recipe.training.task == "reply" or (recipe.training.task == "auto" and are_pairs(dataset))


def same(a: str, b: str) -> bool:
    """Whether two replies say the same, but for white space."""
    return " ".join(a.split()) == " ".join(b.split())


def _pairs(dataset: Dataset, question: str, reply: str) -> list[tuple[str, str]]:
    """Questions and their replies, "" where there is none; both of one column are those of its conversations."""
    if question != reply:
        both = zip(dataset.texts(question), dataset.texts(reply), strict=True)
        return [(asked, said or "") for asked, said in both if asked]
    pairs = []
    for text in dataset.texts(question):
        said = [(turn.role, _words(turn)) for turn in turns(text)] if text else []
        for (role, asked), (other, answer) in pairwise([*said, ("", "")]):
            if role == "user" and asked:
                pairs.append((asked, answer if other == "assistant" else ""))
    return pairs


def _words(turn: Turn) -> str:
    return " ".join(content for kind, content in turn.parts if kind == "text").strip()


def _columns(dataset: Dataset, question: str | None, reply: str | None) -> tuple[str, str]:
    texts = [c for c, kind in dataset.columns.items() if kind == "text" and c not in dataset.manifest.chats]
    if len(texts) < 2 and dataset.manifest.chats and question is None and reply is None:
        return dataset.manifest.chats[0], dataset.manifest.chats[0]
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
    run: str | Path, dataset: Path | None = None, question: str | None = None, reply: str | None = None,
    embed: Embed | None = None, model: PlaitModel | None = None, least: float | None = None,
) -> Replies:  # fmt: skip
    """The replies of a run, fitted now or before; `dataset` is where the pairs lie, by default the run's. `least` is
    the least confidence, in place of the one that was found.

    Raises PlaitError where the run or its data are not there."""
    run = Path(run).expanduser()
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
