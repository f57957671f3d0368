"""How near texts lie to a message: by n-grams of characters, by words, and by a text encoder where one is at hand."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

Embed = Callable[[list[str]], np.ndarray]  # texts to unit vectors (N, E)
SATURATION, LENGTH = 1.2, 0.75  # of BM25 (Robertson et al., 1994)
STEM = 5  # letters of a word that count, so that "renew" and "renewal" are one
COMMON = 0.25  # weight of the words that say little
_STOP = {word[:STEM] for word in ENGLISH_STOP_WORDS}


def words(text: str) -> list[str]:
    """The words of a text without their endings, in lower case; characters alone where words are not parted."""
    return [word[:STEM] for word in re.findall(r"\w+", text.lower())]


class Bm25:
    """Okapi BM25 over texts, divided by what the message would score with itself: from 0 to about 1."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.counts = [Counter(words(text)) for text in texts]
        self.lengths = np.array([sum(count.values()) for count in self.counts], float)
        document_counts = Counter(word for count in self.counts for word in count)
        # Few texts cannot show how common a word is: those that say little in English weigh less from the start.
        self.weights = {
            w: (COMMON if w in _STOP else 1.0) * math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            for w, n in document_counts.items()
        }
        self.unknown = math.log(1 + (len(texts) + 0.5) / 0.5)
        self.places: dict[str, list[int]] = {}
        for place, count in enumerate(self.counts):
            for word in count:
                self.places.setdefault(word, []).append(place)

    def rarity(self, word: str) -> float:
        """How much a word says, from 0 to 1: near 1 for what stands in one text, or in none."""
        return self.weights.get(word, self.unknown) / self.unknown

    def shared(self, message: str, place: int) -> tuple[float, float]:
        """Of the words that a message shares with a text: the rarity of the rarest, and their share of all that the
        text says."""
        both = [self.rarity(word) for word in set(words(message)) if word in self.counts[place]]
        total = sum(self.rarity(word) for word in self.counts[place])
        return max(both, default=0.0), sum(both) / max(total, 1e-9)

    def __call__(self, message: str) -> np.ndarray:
        """(texts,)"""
        scores = np.zeros(len(self.counts))
        terms = set(words(message))
        norm = SATURATION * (1 - LENGTH + LENGTH * self.lengths / max(self.lengths.mean(), 1))
        for word in terms:
            for place in self.places.get(word, ()):
                count = self.counts[place][word]
                scores[place] += self.weights[word] * count * (SATURATION + 1) / (count + norm[place])
        total = sum(self.weights.get(word, self.unknown) for word in terms)
        return scores / max(total, 1e-9)


class Nearness:
    """The kinds of nearness of messages to questions and their replies."""

    def __init__(self, questions: Sequence[str], replies: Sequence[str], embed: Embed | None = None) -> None:
        self.grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
        self.table = self.grams.fit_transform(questions)
        self.by_words = Bm25(questions)
        self.by_both = Bm25([f"{q} {r}" for q, r in zip(questions, replies, strict=True)])
        self.embed = embed
        self.vectors = None if embed is None else embed(list(questions))

    @property
    def kinds(self) -> list[str]:
        """What the columns of a call are."""
        return ["characters", "words", "words with the reply", *(["encoder"] if self.embed else [])]

    def __call__(self, messages: Sequence[str]) -> np.ndarray:
        """(messages, questions, kinds), from 0 to about 1."""
        grams = (self.grams.transform(messages) @ self.table.T).toarray()
        kinds = [grams, np.stack([self.by_words(m) for m in messages]), np.stack([self.by_both(m) for m in messages])]
        if self.embed is not None and self.vectors is not None:
            kinds.append(self.embed(list(messages)) @ self.vectors.T)
        return np.stack(kinds, 2).clip(0)
