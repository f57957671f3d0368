"""What a model knows by heart: texts that it writes beside those it was trained on, and planted canaries."""

from __future__ import annotations

import math

import numpy as np

from plait.evaluation import metrics
from plait.evaluation.context import EvalContext
from plait.evaluation.findings import Gallery, GalleryKind, ReportItem
from plait.evaluation.keys import Direction
from plait.inference import scoring
from plait.modalities.text import words
from plait.model.multimodal import Sequence
from plait.training.canaries import LETTERS, TIMES, canary, times

RUN = 8  # words in a run that counts as verbatim
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of runs that are looked for
PIECE = 64  # words of a text that are compared at a time
MOST = 2_000_000  # words of training texts that are kept
WRITTEN = 24  # texts that a language model writes for this
OTHERS = 1000  # canaries that were never planted, beside which one that was is seen


class Runs:
    """Which runs of words occur in texts: a hash for each, by length."""

    def __init__(self, texts: list[str]) -> None:
        self.numbers: dict[str, int] = {}
        numbers: list[int] = []
        for text in texts:
            if len(numbers) > MOST:
                break
            # No run crosses the end of a text: each end is a number of its own.
            numbers += [self.numbers.setdefault(word.strip(), len(self.numbers) + 1) for word in words(text)]
            numbers.append(-len(numbers) - 2)
        values = np.array(numbers, np.int64)
        self.known = {length: np.unique(_hashes(values, length)) for length in LENGTHS}

    def seen(self, text: str, length: int) -> np.ndarray:
        """Whether each run of so many words of a text occurs, (words - length + 1,)."""
        values = np.array([self.numbers.get(word.strip(), -1) for word in words(text)], np.int64)
        return np.isin(_hashes(values, length), self.known[length])

    def longest(self, text: str) -> float:
        """The longest run that occurs, as a share of the text's words."""
        count = len(words(text))
        lengths = [length for length in LENGTHS if length <= count and self.seen(text, length).any()]
        return max(lengths, default=0) / max(count, 1)


def _hashes(values: np.ndarray, length: int) -> np.ndarray:
    """A hash of each window of so many numbers, (N - length + 1,) uint64."""
    count = len(values) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for place in range(length):
        mixed = (values[place : place + count].astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        hashes = (hashes * np.uint64(0x100000001B3)) ^ (mixed ^ (mixed >> np.uint64(29)))
    return hashes


def pieces(texts: list[str]) -> list[str]:
    """Texts cut into pieces of at most `PIECE` words; a last piece of less than half of that is left out."""
    cut_texts = []
    for text in texts:
        split = words(text)
        cut = ["".join(split[at : at + PIECE]) for at in range(0, len(split), PIECE)]
        cut_texts += [piece for i, piece in enumerate(cut) if i == 0 or len(words(piece)) >= PIECE // 2]
    return [piece for piece in cut_texts if piece.strip()]


def evaluate_texts(
    eval_context: EvalContext, direction: Direction, column: str, written: list[str], real: list[str]
) -> None:
    """How much of what was written stands word for word in train, beside the same of real texts of the split.

    Keeps the share of runs of `RUN` words, and the share of texts whose longest run out of train is longer than in 99 %
    of the real ones.
    """
    train = [eval_context.texts[column][i] for i in eval_context.shuffled(eval_context.dataset.indices("train"))]
    runs = Runs([text for text in train if text])
    own, real_pieces = pieces(written), pieces(real)
    if not own or not real_pieces:
        return
    flags, ground = ([runs.seen(piece, RUN) for piece in group] for group in (own, real_pieces))
    if sum(map(len, flags)) and sum(map(len, ground)):
        value, error = metrics.ratio_with_error(
            np.array([f.sum() for f in flags]), np.array([len(f) for f in flags]), seed=eval_context.seed
        )
        eval_context.keep(
            "memorising", direction, "verbatim", value, stderr=error, baseline=float(np.concatenate(ground).mean()),
            n=sum(map(len, flags)),
        )  # fmt: skip
    longest_runs, other = (np.array([runs.longest(piece) for piece in group]) for group in (own, real_pieces))
    bound = np.quantile(other, 0.99)
    value, error = metrics.mean_with_error(longest_runs > bound, seed=eval_context.seed)
    base = float((other > bound).mean())
    eval_context.keep("memorising", direction, "near_texts", value, stderr=error, baseline=base, n=len(longest_runs))
    worst = np.argsort(-longest_runs, kind="stable")[:4]
    rows = [(ReportItem(text=f"{longest_runs[i] * 100:.0f} % in one run"), [ReportItem(text=own[i])]) for i in worst]
    note = "The written texts that share the longest run of words with a training text, as a share of their words."
    eval_context.findings.galleries.append(Gallery(f"Memorised: {direction}", note, rows, GalleryKind.MEMORISED))


def evaluate_canaries(eval_context: EvalContext) -> None:
    """Exposure of the canaries planted in training, in bits: -log2 of the share of all random canaries that are
    likelier, by a normal distribution fitted to the log-likelihoods of some that were never planted, and at most
    log2 of how many there are. The chance line is the mean of those."""
    checkpoint = eval_context.model.checkpoint
    planted = checkpoint.training.get("canaries")
    if not planted or planted["column"] not in eval_context.model.columns:
        return
    count, seed, column = planted["count"], planted["seed"], planted["column"]
    others = [canary(seed, 1_000_000 + i) for i in range(OTHERS)]
    likelihoods = _log_likelihoods(eval_context, [canary(seed, number) for number in range(count)] + others, column)
    own, reference = likelihoods[:count], likelihoods[count:]

    center, spread = float(reference.mean()), float(reference.std(ddof=1))

    def exposure(score: float) -> float:
        return min(_bits_beyond((score - center) / max(spread, 1e-9)), LETTERS * math.log2(26))

    blank = float(np.mean([exposure(score) for score in reference]))
    for often in TIMES:
        exposures = [exposure(own[number]) for number in range(count) if times(number) == often]
        if exposures:
            value, error = metrics.mean_with_error(np.array(exposures), seed=eval_context.seed)
            direction, n = Direction(f"canaries planted {often} times"), len(exposures)
            eval_context.keep("memorising", direction, "exposure", value, stderr=error, chance=blank, n=n)


def _bits_beyond(z: float) -> float:
    """-log2 of the share of a standard normal distribution that lies beyond z."""
    if z < 8:
        return -math.log2(math.erfc(z / math.sqrt(2)) / 2)
    return (z * z / 2 + math.log(z * math.sqrt(2 * math.pi))) / math.log(2)  # erfc underflows


def _log_likelihoods(eval_context: EvalContext, texts: list[str], column: str) -> np.ndarray:
    """log P of each text alone in its column, in nats, (N,)."""
    model = eval_context.model
    vocabulary = model.checkpoint.model.vocabulary
    sequences = [
        Sequence().read_ids([vocabulary.opener(column)]).write([*model.checkpoint.text.encode(text), vocabulary.end])
        for text in texts
    ]
    return np.array([log_probs.sum() for log_probs in scoring.token_log_probs(model.engine, sequences, "text")])
