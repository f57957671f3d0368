"""Every direction that the data allows, measured: recognition, transcription, language, retrieval, and what is made."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import numpy as np

from plait.classifiers.classifier import Classifier
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.record import SPLITS
from plait.evaluation import metrics
from plait.evaluation.alternatives import MOST, GramModel, alternative_name, fit_alternative, paired_error
from plait.evaluation.answers import evaluate_predictors
from plait.evaluation.context import EVALUATIONS, RECORD_EVALUATIONS, EvalContext, Limits, Media, Progress, Timer
from plait.evaluation.findings import Confusion, Findings, Gallery, Metrics, Reliability, ReportItem
from plait.evaluation.folds import OutOfFold
from plait.evaluation.generative import evaluate_codec, evaluate_making
from plait.evaluation.language import sequence_nats
from plait.evaluation.memorising import WRITTEN, evaluate_canaries, evaluate_texts
from plait.evaluation.outcome import Outcome
from plait.evaluation.verdict import make_verdict
from plait.inference.model import PlaitModel
from plait.inference.opinions import opinion_scores
from plait.modalities.media import MEDIA
from plait.model.multimodal import IGNORE, Sequence
from plait.training.batches import lm_windows

__all__ = ["Limits", "evaluate"]


def evaluate(
    model: PlaitModel,
    dataset: Dataset,
    split: str = "test",
    *,
    seed: int = 0,
    limit: int | None = None,
    limits: Limits | None = None,
    reference_seconds: float = 15.0,
    progress: Progress | None = None,
    out_of_fold: dict[tuple[str, str], OutOfFold] | None = None,
) -> tuple[Metrics, Findings]:
    """Measure a model on a split of a dataset; all columns that both have, in every direction.

    Returns the figures under "TASK/FROM-TO/METRIC" (`write_metrics` and `write_report` take them), each with value,
    stderr, chance, baseline and n, and what the report shows beside them. `judge_seconds` is what the judge of one
    media column gets, which is also the baseline of recognition. `limit` is the most records a direction takes;
    `limits` says it for each kind of task. Directions (source, target) that `out_of_fold` has are measured by that, on
    all records.

    Raises PlaitError where the split is empty or the columns do not match.
    """
    if dataset.manifest.kind != "records":
        measure = EVALUATIONS.by_feature()[dataset.manifest.kind]
        most = limit or (limits.records if limits else None)
        return measure(model, dataset, split, seed=seed, limit=most, progress=progress or (lambda *_: None))
    out_of_fold = out_of_fold or {}
    if not len(dataset.indices(split)) and not out_of_fold:
        others = [name for name in ("test", "val", "train") if len(dataset.indices(name))]
        raise PlaitError(
            f"{dataset.path} has no records in {split}. Evaluate with --split {' or '.join(others)}, or add data."
        )
    limits = limits or Limits()
    if limit is not None:
        written, queries = min(limit, limits.written), min(limit, limits.queries)
        limits = replace(limits, records=limit, written=written, queries=queries)
    eval_context = EvalContext(model, dataset, split, seed, limits, reference_seconds, progress or (lambda *_: None))
    whole, timer = Timer(eval_context), Timer(eval_context)
    recognised = [
        (source, target)
        for source in eval_context.columns
        for target in eval_context.labels
        if target in eval_context.written
        if source != target and (source in eval_context.media_columns or not eval_context.media_columns)
    ]
    for source, target in recognised:
        _recognition(eval_context, source, target, out_of_fold.get((source, target)))
    answered = {one.target for one in model.checkpoint.predictors}
    evaluate_predictors(eval_context)
    if recognised or answered:
        timer.lap("recognition")
    for source in eval_context.columns:
        for target in eval_context.text_columns:
            learnt = source in eval_context.media_columns or not eval_context.media_columns
            if (
                source != target
                and target not in eval_context.labels
                and target not in answered
                and target in eval_context.written
                and learnt
            ):
                _transcription(eval_context, source, target)
    for column in eval_context.text_columns:
        if column not in answered:
            _language(eval_context, column)
    for evaluate_more in RECORD_EVALUATIONS.all():
        evaluate_more(eval_context)
    evaluate_canaries(eval_context)
    if any(name.startswith(("transcription", "language", "chat")) for name in eval_context.metrics):
        timer.lap("text")
    if eval_context.media_columns and model.checkpoint.model.config.embed_dim:
        _retrieval(eval_context)
        timer.lap("retrieval")
    for column in eval_context.media_columns:
        if eval_context.columns[column] in model.checkpoint.model.config.read_only:
            continue
        evaluate_codec(eval_context, column)
        asking = [c for c in eval_context.labels if len(eval_context.with_text(eval_context.samples(column, split), c))]
        for target in asking:
            evaluate_making(eval_context, target, column, max(eval_context.limits.made // len(asking), 1))
        timer.lap(eval_context.modality(column).making_task)
    order = ("Drawing", "Speaking", "Written", "Memorised", "Retrieval", "Mistakes", "Codec")
    eval_context.findings.galleries.sort(key=lambda gallery: order.index(gallery.title.split(":")[0]))
    whole.lap("evaluation")
    eval_context.findings.verdict = make_verdict(eval_context.findings.outcomes)
    return eval_context.metrics, eval_context.findings


# --- recognition ------------------------------------------------------------------------------------------------


def _pairs(eval_context: EvalContext, source: str, target: str, split: str) -> Media:
    """Inputs of a column whose record has a text in the other; texts are kept as their record's number alone."""
    if source in eval_context.media_columns:
        return eval_context.with_text(eval_context.samples(source, split), target)
    present = [i for i in eval_context.dataset.indices(split) if eval_context.texts[source][i] is not None]
    media = eval_context.with_text(Media(np.array(present, np.int64), [np.empty(0)] * len(present)), target)
    return media.only(eval_context.chosen(np.arange(len(media)), eval_context.limits.records))


def _inputs(eval_context: EvalContext, source: str, media: Media) -> list[Sequence]:
    if source in eval_context.media_columns:
        return eval_context.contexts(source, media)
    return [eval_context.text_sequence(eval_context.texts[source][i]) for i in media.indices]


def _scores(eval_context: EvalContext, source: str, target: str, media: Media, labels: list[str]) -> np.ndarray:
    found = []
    for start in range(0, len(media), 256):
        eval_context.progress(f"recognition {source}-{target}", start, len(media))
        contexts = _inputs(eval_context, source, media.only(np.arange(start, min(start + 256, len(media)))))
        found.append(eval_context.model.score(contexts, target, labels))
    return np.concatenate(found)


@dataclass
class Recognised:
    """The records of a direction of recognition, with the right and the given answers.

    Attributes:
        source, target: Columns: what is read, and whose labels are answered.
        media: The records (N,) that are asked about.
        train: The training records that have both columns.
        labels: The labels that the model knows.
        names: These, and those of the split that it does not know.
        truth, predicted: Places in `names`, (N,).
        scores: Log-probabilities (N, labels).
        chance: The share that is right where train's most frequent label is always said; None without training records.
        by_folds: Whether all records are asked about, each by a model that has not learnt it.
    """

    source: str
    target: str
    media: Media
    train: Media
    labels: list[str]
    names: list[str]
    truth: np.ndarray
    predicted: np.ndarray
    scores: np.ndarray
    chance: float | None
    by_folds: bool = False

    @property
    def direction(self) -> str:
        """FROM-TO, as metric keys have it."""
        return f"{self.source}-{self.target}"

    @property
    def right(self) -> np.ndarray:
        """(N,) whether the answer is the right one."""
        return self.truth == self.predicted


@dataclass(frozen=True)
class SimpleAnswers:
    """What the best simple alternative answers (N,), and what it is called."""

    predicted: np.ndarray
    name: str


def _recognition(eval_context: EvalContext, source: str, target: str, out_of_fold: OutOfFold | None = None) -> None:
    """Which of the labels is likeliest: by likelihood, and by nearness in the embedding space."""
    if out_of_fold is not None:
        found = _recognised_by_folds(eval_context, source, target, out_of_fold)
        simple: SimpleAnswers | None = SimpleAnswers(out_of_fold.simple, alternative_name(eval_context.columns[source]))
    else:
        whole = _recognised(eval_context, source, target)
        if whole is None:
            return
        found, simple = whole, _simple_answers(eval_context, whole)
    plain = metrics.classification(found.truth, simple.predicted, len(found.names)) if simple else None
    result = metrics.classification(found.truth, found.predicted, len(found.names))
    _keep_accuracy(eval_context, found, simple, plain.accuracy if plain else None)
    _calibration(eval_context, found.direction, found.scores, found.right)
    _keep_classes(eval_context, found, result, plain)
    confusion = Confusion(f"{source} → {target}", found.names, result.confusion, result.f1)
    eval_context.findings.confusions.append(confusion)
    said = np.array(found.names, object)[found.predicted]
    _show_mistakes(eval_context, source, target, found.media, said, found.right)


def _recognised(eval_context: EvalContext, source: str, target: str) -> Recognised | None:
    """The answers for the records of the split; None where it has none with both columns."""
    labels = eval_context.labels[target]
    most = max(eval_context.limits.scores // len(labels), 1)
    media = _pairs(eval_context, source, target, eval_context.split)
    media = media.only(eval_context.chosen(np.arange(len(media)), most))
    if not len(media):
        return None
    truth_texts = list(eval_context.texts[target][media.indices])
    unseen = sorted(set(truth_texts) - set(labels))
    if unseen:
        eval_context.note(
            f"{source}-{target}: {len(unseen)} labels of {eval_context.split} do not occur in train, and count as "
            "wrong."
        )
    names = [*labels, *unseen]
    number = {name: i for i, name in enumerate(names)}
    truth = np.array([number[text] for text in truth_texts])
    scores = _answers(eval_context, source, target, media, labels)
    train = _pairs(eval_context, source, target, "train")
    prior = Counter(eval_context.texts[target][i] for i in train.indices)
    frequent = prior.most_common(1)[0][0] if prior else None  # a label that the model may not know
    chance = float(np.mean([text == frequent for text in truth_texts])) if prior else None
    return Recognised(source, target, media, train, labels, names, truth, scores.argmax(1), scores, chance)


def _recognised_by_folds(eval_context: EvalContext, source: str, target: str, by: OutOfFold) -> Recognised:
    """The answers for all records, each by a model that has not learnt it."""
    labels = eval_context.labels[target]
    if source in eval_context.media_columns:
        parts = [eval_context.samples(source, split) for split in SPLITS]
        media = Media(
            np.concatenate([part.indices for part in parts]), [sample for part in parts for sample in part.samples]
        )
    else:
        media = Media(by.indices, [np.empty(0)] * len(by.indices))
    media = media.only(np.isin(media.indices, by.indices))
    number = {name: i for i, name in enumerate(labels)}
    truth = np.array([number[eval_context.texts[target][i]] for i in media.indices])
    counts = np.bincount(truth)
    how = (
        f"{by.folds} runs in a share of the time, each asked about what it has not learnt: rather too low than too high"
        if by.trained
        else f"{by.folds} folds; what answers, a linear model, learnt from the others each time"
    )
    eval_context.note(f"{source}-{target}: all {len(truth)} labelled records are asked about once, by {how}.")
    return Recognised(
        source, target, media, _pairs(eval_context, source, target, "train"), labels, labels, truth,
        by.scores.argmax(1), by.scores, float(counts.max() / counts.sum()), by_folds=True,
    )  # fmt: skip


def _simple_answers(eval_context: EvalContext, found: Recognised) -> SimpleAnswers | None:
    """The better of the simple alternatives; None where train has a single label and there is no judge."""
    source, target = found.source, found.target
    kind = eval_context.columns[source]
    simple = None
    if len({eval_context.texts[target][i] for i in found.train.indices} & set(found.labels)) > 1:
        classifier = _classifier(eval_context, source, target)
        guess = _simple(eval_context, classifier, source, target, found.train, found.media, found.labels)
        simple = SimpleAnswers(guess, alternative_name(kind))
    made = source in eval_context.media_columns and kind not in eval_context.model.checkpoint.model.config.read_only
    critic = eval_context.critic(source, target) if made else None
    if critic is not None:  # trained in any case, as the judge of what is drawn
        by_critic = critic.among(eval_context.features(source, found.media.samples), target, found.labels)
        if simple is None or (by_critic == found.truth).mean() > (simple.predicted == found.truth).mean():
            simple = SimpleAnswers(by_critic, "a small CNN")
    return simple


def _keep_accuracy(
    eval_context: EvalContext, found: Recognised, simple: SimpleAnswers | None, baseline: float | None
) -> None:
    """The share of right answers: of all records, of those that train does not have too, of train's, and by nearness
    alone."""
    direction, seed, n = found.direction, eval_context.seed, len(found.truth)
    truth, predicted, right, names = found.truth, found.predicted, found.right, found.names
    value, error = metrics.mean_with_error(right, seed=seed)
    wrong = Counter(zip(truth[~right].tolist(), predicted[~right].tolist(), strict=True))
    eval_context.findings.outcomes.append(
        Outcome(
            "recognition", f"{found.target} from {found.source}", "right", value, error, n, found.chance,
            simple.name if simple else None, baseline,
            paired_error(right, simple.predicted == truth) if simple else None,
            is_alternative=bool(simple and np.array_equal(simple.predicted, predicted)),
            confused=[(names[a], names[b]) for (a, b), _ in wrong.most_common(3)],
        )
    )  # fmt: skip
    beside = {"chance": found.chance, "baseline": baseline}
    eval_context.keep("recognition", direction, "accuracy", value, stderr=error, n=n, **beside)
    clean = None if found.by_folds else eval_context.clean(found.media.indices)
    if clean is not None:
        value, error = metrics.mean_with_error(right[clean], seed=seed)
        eval_context.keep("recognition", direction, "accuracy_clean", value, stderr=error, n=int(clean.sum()))
        value = metrics.classification(truth[clean], predicted[clean], len(names)).macro_f1
        eval_context.keep("recognition", direction, "f1_clean", value, n=int(clean.sum()))
    some = found.train.only(eval_context.chosen(np.arange(len(found.train)), n))
    if len(some):
        number = {name: i for i, name in enumerate(names)}
        known = np.array([number.get(text, -1) for text in eval_context.texts[found.target][some.indices]])
        learnt = known == _answers(eval_context, found.source, found.target, some, found.labels).argmax(1)
        value, error = metrics.mean_with_error(learnt, seed=seed)
        eval_context.keep("recognition", direction, "train_accuracy", value, stderr=error, n=len(some))
    embeds = eval_context.model.checkpoint.model.config.embed_dim and not found.by_folds
    if embeds and found.source in eval_context.media_columns:
        places = eval_context.embedded(found.source, found.media)
        texts = [eval_context.text_sequence(label) for label in found.labels]
        near = places @ eval_context.model.embed_sequences(texts).T
        value, error = metrics.mean_with_error(near.argmax(1) == truth, seed=seed)
        eval_context.keep("recognition", direction, "zero_shot_accuracy", value, stderr=error, n=n, **beside)


def _keep_classes(
    eval_context: EvalContext, found: Recognised, result: metrics.Classification, plain: metrics.Classification | None
) -> None:
    """Precision, recall and F1: their means over the classes, and of each class where there are at most 100."""
    direction, n = found.direction, len(found.truth)
    errors = metrics.macro_errors(found.truth, found.predicted, len(found.names), seed=eval_context.seed)
    for name in ("precision", "recall", "f1"):
        baseline = getattr(plain, f"macro_{name}") if plain else None
        value = getattr(result, f"macro_{name}")
        eval_context.keep("recognition", direction, name, value, stderr=errors[name], baseline=baseline, n=n)
    if len(found.names) > 100:
        return
    counts = result.confusion.sum(1)
    for i, label in enumerate(found.names):
        for name in ("precision", "recall", "f1"):
            value = float(getattr(result, name)[i])
            eval_context.keep("recognition", direction, f"{name}[{label}]", value, n=int(counts[i]))


def _calibration(eval_context: EvalContext, direction: str, scores: np.ndarray, right: np.ndarray) -> None:
    """Whether answers are as often right as their probabilities among the labels say."""
    chances = np.exp(scores - scores.max(1, keepdims=True))
    believed = (chances / chances.sum(1, keepdims=True)).max(1)
    value, mean, share, counts = metrics.calibration(believed, right)
    error = metrics.bootstrap(
        lambda rows: np.array([metrics.calibration(believed[row], right[row])[0] for row in rows]),
        len(right), draws=50, seed=eval_context.seed,
    )  # fmt: skip
    eval_context.keep("recognition", direction, "ece", value, stderr=error, n=len(right))
    coverage, accuracy = metrics.risk_coverage(believed, right)
    for percent in (90, 80):
        place = max(round(percent / 100 * len(right)), 1) - 1
        at = float(accuracy[place])
        eval_context.keep("recognition", direction, f"accuracy_at_{percent}", at, n=place + 1)
    eval_context.findings.reliabilities.append(Reliability(direction, value, mean, share, counts, coverage, accuracy))


def _classifier(eval_context: EvalContext, source: str, target: str) -> Classifier | None:
    """What `classify` goes by for these columns, if anything was fitted."""
    found = eval_context.model.checkpoint.classifiers
    return next((one for one in found if (one.source, one.target) == (source, target)), None)


def _answers(eval_context: EvalContext, source: str, target: str, media: Media, labels: list[str]) -> np.ndarray:
    """What `classify` says, as log-probabilities (N, labels): the classifier's, else by likelihood alone."""
    classifier = _classifier(eval_context, source, target)
    if classifier is None:
        return _scores(eval_context, source, target, media, labels)
    eval_context.progress(f"recognition {source}-{target}", 0, len(media))
    inputs = _raw(eval_context, source, media)
    return classifier.mixture.log_probabilities(
        opinion_scores(eval_context.model, classifier, inputs, classifier.mixture.used)
    )


def _raw(eval_context: EvalContext, source: str, media: Media) -> list[Any]:
    """Samples, or texts."""
    if source in eval_context.media_columns:
        return list(media.samples)
    return [eval_context.texts[source][i] for i in media.indices]


def _simple(
    eval_context: EvalContext, classifier: Classifier | None, source: str, target: str, train: Media, media: Media,
    labels: list[str],
) -> np.ndarray:  # fmt: skip
    """The classes (N,) by the simple alternative: the linear part of the run's classifier, else one fitted now."""
    if classifier is None:
        number = {label: i for i, label in enumerate(labels)}
        some = train.only(eval_context.chosen(np.arange(len(train)), MOST))
        some = some.only(np.array([eval_context.texts[target][i] in number for i in some.indices], bool))
        classes = np.array([number[eval_context.texts[target][i]] for i in some.indices])
        kind = eval_context.columns[source]
        bands = int(getattr(eval_context.modality(source).settings, "bands", 0)) if kind in MEDIA else 0
        classifier = fit_alternative(kind, _raw(eval_context, source, some), classes, labels, bands)
    return classifier.linear_scores(_raw(eval_context, source, media)).argmax(1)


def _shown(eval_context: EvalContext, source: str, media: Media, place: int) -> ReportItem:
    if source in eval_context.media_columns:
        return eval_context.exhibit(source, media.samples[place])
    return ReportItem(text=eval_context.texts[source][media.indices[place]])


def _show_mistakes(
    eval_context: EvalContext, source: str, target: str, media: Media, said: np.ndarray, right: np.ndarray
) -> None:
    wrong = np.flatnonzero(~right)[:8]
    rows = [
        (
            _shown(eval_context, source, media, i),
            [
                ReportItem("truth", text=eval_context.texts[target][media.indices[i]]),
                ReportItem("answer", text=said[i], right=False),
            ],
        )
        for i in wrong
    ]
    if rows:
        note = f"The first {len(rows)} of {int((~right).sum())} in {len(right)}."
        eval_context.findings.galleries.append(Gallery(f"Mistakes: {source} → {target}", note, rows))


# --- free text --------------------------------------------------------------------------------------------------


def _transcription(eval_context: EvalContext, source: str, target: str) -> None:
    """Greedy writing of a text that is not one of few labels; the baseline always writes train's most common one."""
    media = _pairs(eval_context, source, target, eval_context.split)
    media = media.only(eval_context.chosen(np.arange(len(media)), eval_context.limits.written))
    if not len(media):
        return
    direction, seed = f"{source}-{target}", eval_context.seed
    written: list[str] = []
    for start in range(0, len(media), 64):
        eval_context.progress(f"transcription {direction}", start, len(media))
        part = media.only(np.arange(start, min(start + 64, len(media))))
        written += [texts[0] for texts in eval_context.model.write(_inputs(eval_context, source, part), target)]
    truth = [unicodedata.normalize("NFC", text) for text in eval_context.texts[target][media.indices]]
    everyday = Counter(eval_context.texts[target][i] for i in _pairs(eval_context, source, target, "train").indices)
    constant = [everyday.most_common(1)[0][0] if everyday else ""] * len(truth)
    same = np.array([a == b for a, b in zip(truth, written, strict=True)])
    value, error = metrics.mean_with_error(same, seed=seed)
    fixed = float(np.mean([a == b for a, b in zip(truth, constant, strict=True)]))
    eval_context.keep("transcription", direction, "exact", value, stderr=error, baseline=fixed, n=len(truth))
    clean = eval_context.clean(media.indices)
    if clean is not None:
        value, error = metrics.mean_with_error(same[clean], seed=seed)
        eval_context.keep("transcription", direction, "exact_clean", value, stderr=error, n=int(clean.sum()))
    others = metrics.error_rates(truth, constant)
    for name, (wrong, lengths) in metrics.error_rates(truth, written).items():
        value, error = metrics.ratio_with_error(wrong, lengths, seed=seed)
        other = others[name][0].sum() / max(others[name][1].sum(), 1)
        eval_context.keep("transcription", direction, name, value, stderr=error, baseline=float(other), n=len(truth))
        if clean is not None:
            value, error = metrics.ratio_with_error(wrong[clean], lengths[clean], seed=seed)
            eval_context.keep("transcription", direction, f"{name}_clean", value, stderr=error, n=int(clean.sum()))
    evaluate_texts(eval_context, direction, target, written, truth)
    rows = [
        (
            _shown(eval_context, source, media, i),
            [ReportItem("truth", text=truth[i]), ReportItem("written", text=written[i], right=bool(same[i]) or None)],
        )
        for i in range(min(8, len(truth)))
    ]
    note = "The first of the test, none chosen."
    eval_context.findings.galleries.append(Gallery(f"Written: {source} → {target}", note, rows))


@dataclass
class Texts:
    """Texts of a column that stand alone in their records, and what is predicted of them.

    Attributes:
        texts: The texts (N,), NFC.
        records: Their records (N,).
        sequences: Windows of them, each token and the end predicted once.
        owners: Which text each window is of.
        available: How many texts there were to choose from.
    """

    texts: list[str] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    available: int = 0


def _language(eval_context: EvalContext, column: str) -> None:
    """Likelihood of texts that stand alone in their records, each token and the end predicted once."""
    if eval_context.media_columns or column in eval_context.labels or column not in eval_context.written:
        return
    alone = _alone(eval_context, column)
    chosen = _predicted_texts(eval_context, column, alone)
    if not chosen.texts:
        return
    if len(chosen.texts) < chosen.available:
        eval_context.note(
            f"{column}: {len(chosen.texts):,} of {chosen.available:,} texts were predicted, drawn by the seed."
        )
    eval_context.progress(f"memorising {column}", 0, 1)
    empty = eval_context.model.context([], column)
    made = eval_context.model.write([empty], column, n=WRITTEN, seed=eval_context.seed)[0]
    evaluate_texts(eval_context, column, column, made, chosen.texts)
    eval_context.progress(f"language {column}", 0, len(chosen.sequences))
    past = [eval_context.texts[column][i] for i in eval_context.dataset.indices("train") if alone[i]]
    _keep_likelihood(eval_context, column, chosen, past)


def _alone(eval_context: EvalContext, column: str) -> np.ndarray:
    """(records,) whether a text of the column stands alone in its record."""
    alone = np.array([bool(text) for text in eval_context.texts[column]], bool)
    for other in eval_context.text_columns:
        if other != column:
            alone &= np.array([text is None for text in eval_context.texts[other]], bool)
    return alone


def _predicted_texts(eval_context: EvalContext, column: str, alone: np.ndarray) -> Texts:
    """Texts drawn by the seed, as many as the limits of records and tokens allow."""
    checkpoint = eval_context.model.checkpoint
    vocabulary, longest = checkpoint.model.vocabulary, checkpoint.model.config.backbone.max_length
    order = [i for i in eval_context.shuffled(eval_context.dataset.indices(eval_context.split)) if alone[i]]
    chosen, room = Texts(available=len(order)), eval_context.limits.tokens
    for i in order[: eval_context.limits.records]:
        text = unicodedata.normalize("NFC", eval_context.texts[column][i])
        ids = checkpoint.text.encode(text)
        if len(ids) >= room and chosen.texts:
            break
        if len(ids) > room:  # one text longer than all that may be taken: its beginning
            ids = ids[:room]
            text = checkpoint.text.decode(ids)
        room -= len(ids) + 1
        windows = lm_windows(ids, vocabulary.opener(column), vocabulary.end, longest)
        chosen.sequences += windows
        chosen.owners += [len(chosen.texts)] * len(windows)
        chosen.texts.append(text)
        chosen.records.append(int(i))
    return chosen


def _unigram_nats(eval_context: EvalContext, past: list[str], sequences: list[Sequence]) -> float:
    """-log P of all that the sequences write, by how often each token stands in training texts, one added to each."""
    checkpoint = eval_context.model.checkpoint
    vocabulary = checkpoint.model.vocabulary
    counts = np.zeros(vocabulary.id_ranges["text"][1])
    for text in past:
        if counts.sum() >= 10 * eval_context.limits.tokens:
            break
        np.add.at(counts, [*checkpoint.text.encode(text), vocabulary.end], 1)
    surprise = -np.log((counts + 1) / (counts + 1).sum())
    return float(surprise[[id for sequence in sequences for id in sequence.targets if id != IGNORE]].sum())


def _keep_likelihood(eval_context: EvalContext, column: str, chosen: Texts, past: list[str]) -> None:
    """Nats a token and a character, and bits a byte, beside equal chances and a unigram; `past` are training texts."""
    nats, tokens = np.zeros(len(chosen.texts)), np.zeros(len(chosen.texts))
    each, count = sequence_nats(eval_context.model, chosen.sequences)
    np.add.at(nats, chosen.owners, each)
    np.add.at(tokens, chosen.owners, count)
    plain = _unigram_nats(eval_context, past, chosen.sequences)
    even = tokens.sum() * math.log(len(eval_context.model.checkpoint.model.output_embedding.of_type("text")))
    sizes = {
        "nats_per_token": (tokens, 1.0),
        "nats_per_character": (np.array([len(text) for text in chosen.texts]), 1.0),
        "bits_per_byte": (np.array([len(text.encode()) for text in chosen.texts]), math.log(2)),
    }
    clean = eval_context.clean(np.array(chosen.records))
    for name, (size, unit) in sizes.items():
        value, error = metrics.ratio_with_error(nats / unit, size, seed=eval_context.seed)
        chance, baseline = (float(total / unit / size.sum()) for total in (even, plain))
        if len(chosen.texts) == 1:
            error = math.nan  # one text cannot say how much texts differ
        if clean is not None:
            fresh, fresh_error = metrics.ratio_with_error(nats[clean] / unit, size[clean], seed=eval_context.seed)
            eval_context.keep("language", column, f"{name}_clean", fresh, stderr=fresh_error, n=int(size[clean].sum()))
        eval_context.keep(
            "language", column, name, value, stderr=error, chance=chance, baseline=baseline, n=int(size.sum())
        )
    _beside_grams(eval_context, column, chosen, past, nats, (value, error, chance))


def _beside_grams(
    eval_context: EvalContext, column: str, chosen: Texts, past: list[str], nats: np.ndarray,
    bits: tuple[float, float, float],
) -> None:  # fmt: skip
    """An n-gram model of the training texts beside the model's bits a byte: value, standard error and chance."""
    value, error, chance = bits
    size, unit = np.array([len(text.encode()) for text in chosen.texts]), math.log(2)
    grams = GramModel("\n".join(past).encode())
    simple = np.array([grams.nats(text.encode()) for text in chosen.texts])
    simple_value, _ = metrics.ratio_with_error(simple / unit, size, seed=eval_context.seed)
    _, lead_error = metrics.ratio_with_error((nats - simple) / unit, size, seed=eval_context.seed)
    eval_context.keep("language", column, "bits_per_byte_ngrams", simple_value, n=int(size.sum()))
    eval_context.findings.outcomes.append(
        Outcome(
            "language", column, "bits a byte", value, error, int(size.sum()), chance,
            "an n-gram model of six characters", simple_value, 0.0 if len(chosen.texts) == 1 else lead_error,
            higher_is_better=False, share=False,
        )
    )  # fmt: skip


# --- retrieval --------------------------------------------------------------------------------------------------


def _retrieval(eval_context: EvalContext) -> None:
    """Every ordered pair of columns with a medium in it, trained together or not, in the embedding space.

    Two records are related when they are one, or share an equal text in some column.
    """
    by_column: dict[str, tuple[np.ndarray, np.ndarray, Media]] = {}
    for column in eval_context.columns:
        if column in eval_context.media_columns:
            media = eval_context.samples(column, eval_context.split)
            if len(media):
                by_column[column] = media.indices, eval_context.embedded(column, media), media
            continue
        texts = eval_context.texts[column]
        present = np.array([i for i in eval_context.dataset.indices(eval_context.split) if texts[i]], np.int64)
        present = eval_context.chosen(present, eval_context.limits.records)
        if len(present):
            distinct, place = np.unique([texts[i] for i in present], return_inverse=True)
            places = eval_context.model.embed_sequences([eval_context.text_sequence(str(text)) for text in distinct])
            by_column[column] = present, places[place], Media(present, [])
    keys = np.zeros((len(eval_context.dataset), max(len(eval_context.text_columns), 1)), np.int64)
    for i, column in enumerate(eval_context.text_columns):
        number: dict[str, int] = {}
        keys[:, i] = [0 if t is None else number.setdefault(t, len(number) + 1) for t in eval_context.texts[column]]
    for source, target in permutations(by_column, 2):
        if source in eval_context.media_columns or target in eval_context.media_columns:
            _search(eval_context, source, target, by_column, keys)


def _search(
    eval_context: EvalContext,
    source: str,
    target: str,
    by_column: dict[str, tuple[np.ndarray, np.ndarray, Media]],
    keys: np.ndarray,
) -> None:
    asked, queries, media = by_column[source]
    found, gallery, shelf = by_column[target]
    if len(found) < 2:  # what is found of one is always right
        return
    if source in eval_context.text_columns:
        # An equal text is an equal query: it counts once, by the record that says most.
        most: dict[str, int] = {}
        for place in np.argsort(-(keys[asked] > 0).sum(1), kind="stable"):
            most.setdefault(eval_context.texts[source][asked[place]], int(place))
        chosen = np.sort(np.array(list(most.values())))
    else:
        chosen = np.arange(len(asked))
    chosen = eval_context.chosen(chosen, eval_context.limits.queries)

    same: np.ndarray | None = None
    if target in eval_context.text_columns:
        _, same = np.unique(keys[found, eval_context.text_columns.index(target)], return_inverse=True)

    def relevant(rows: np.ndarray) -> np.ndarray:
        first, second = keys[rows][:, None], keys[found][None]
        related = ((first == second) & (first > 0)).any(-1) | (rows[:, None] == found[None])
        if same is None:
            return related
        # Equal texts are one thing to find, whichever record they stand in.
        texts = related.astype(np.float32) @ np.eye(same.max() + 1, dtype=np.float32)[same]
        return texts[:, same] > 0

    chosen = chosen[relevant(asked[chosen]).any(1)]
    if not len(chosen):
        return
    rows = asked[chosen]
    result = metrics.retrieval(queries[chosen], gallery, lambda a, b: relevant(rows[a:b]))
    clean = eval_context.clean(rows)
    for name in ("r_at_1", "r_at_5", "r_at_10", "p_at_10"):
        if clean is not None:
            value, error = metrics.mean_with_error(result[name][clean], seed=eval_context.seed)
            eval_context.keep(
                "retrieval", f"{source}-{target}", f"{name}_clean", value, stderr=error, n=int(clean.sum())
            )
        value, error = metrics.mean_with_error(result[name], seed=eval_context.seed)
        recall, precision = metrics.retrieval_chance(result["relevant"], len(found), int(name.rsplit("_", 1)[1]))
        blind = recall if name.startswith("r") else precision
        direction = f"{source}-{target}"
        eval_context.keep("retrieval", direction, name, value, stderr=error, chance=blind, baseline=blind, n=len(rows))
    if target not in eval_context.media_columns:
        return
    shown = []
    for i in eval_context.chosen(np.arange(len(chosen)), 3):
        related = relevant(rows[i : i + 1])[0]
        items = [
            eval_context.exhibit(target, shelf.samples[j], f"{rank + 1}", bool(related[j]))
            for rank, j in enumerate(result["top"][i][: eval_context.modality(target).shown])
        ]
        head = _shown(eval_context, source, media, int(chosen[i]))
        shown.append((head, items))
    note = f"Three queries drawn by the seed among {len(found):,} records; green ones share a text with the query."
    eval_context.findings.galleries.append(Gallery(f"Retrieval: {source} → {target}", note, shown))
