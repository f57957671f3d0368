"""Which of the known labels a record has, beside the best simple alternative."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from plait.classifiers.classifier import Classifier
from plait.data.record import SPLITS
from plait.evaluation import metrics
from plait.evaluation.alternatives import MOST, alternative_name, fit_alternative, paired_error
from plait.evaluation.context import EvalContext, Media
from plait.evaluation.findings import AnsweredRecord, Confusion, Gallery, GalleryKind, Reliability, ReportItem
from plait.evaluation.folds import OutOfFold
from plait.evaluation.keys import Direction
from plait.evaluation.outcome import Outcome
from plait.inference.opinions import opinion_scores
from plait.modalities.media import MEDIA
from plait.modalities.recogniser import ImageRecogniser

MISTAKES_SHOWN = 12
RIGHT_SHOWN = 6  # of each label
LABELS_SHOWN = 10


def _scores(eval_context: EvalContext, source: str, target: str, media: Media, labels: list[str]) -> np.ndarray:
    scores = []
    for start in range(0, len(media), 256):
        eval_context.progress(f"recognition {source}-{target}", start, len(media))
        contexts = eval_context.inputs(source, media.only(np.arange(start, min(start + 256, len(media)))))
        scores.append(eval_context.model.score(contexts, target, labels))
    eval_context.progress(f"recognition {source}-{target}", len(media), len(media))
    return np.concatenate(scores)


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
    def direction(self) -> Direction:
        """As metric keys have it."""
        return Direction(self.source, self.target)

    @property
    def right(self) -> np.ndarray:
        """(N,) whether the answer is the right one."""
        return self.truth == self.predicted

    @property
    def confidence(self) -> np.ndarray:
        """(N,) the probability of each answer among the labels."""
        chances = np.exp(self.scores - self.scores.max(1, keepdims=True))
        return (chances / chances.sum(1, keepdims=True)).max(1)


@dataclass(frozen=True)
class SimpleAnswers:
    """What the best simple alternative answers (N,), and what it is called."""

    predicted: np.ndarray
    name: str


def evaluate_recognition(
    eval_context: EvalContext, source: str, target: str, out_of_fold: OutOfFold | None = None
) -> None:
    """Which of the labels is likeliest: by likelihood, and by nearness in the embedding space."""
    simple: SimpleAnswers | None
    if out_of_fold is not None:
        recognised = _recognised_by_folds(eval_context, source, target, out_of_fold)
        simple = SimpleAnswers(out_of_fold.simple, alternative_name(eval_context.columns[source]))
        if eval_context.alternative_seconds is not None:
            eval_context.note(f"{source}-{target}: by folds no small CNN is fitted. To have one beside it: --folds 0")
    else:
        held_out = _recognised(eval_context, source, target)
        if held_out is None:
            return
        recognised, simple = held_out, _simple_answers(eval_context, held_out)
    plain = metrics.classification(recognised.truth, simple.predicted, len(recognised.names)) if simple else None
    result = metrics.classification(recognised.truth, recognised.predicted, len(recognised.names))
    _keep_accuracy(eval_context, recognised, simple, plain.accuracy if plain else None)
    _calibration(eval_context, recognised)
    _keep_classes(eval_context, recognised, result, plain)
    confusion = Confusion(recognised.direction.arrow, recognised.names, result.confusion, result.f1)
    eval_context.findings.confusions.append(confusion)
    _show_answers(eval_context, recognised)
    _tell_which_figure(eval_context, recognised)


def _tell_which_figure(eval_context: EvalContext, recognised: Recognised) -> None:
    """Say how the figure of this evaluation stands to that which training told, and which one to believe."""
    classifier = _classifier(eval_context, recognised.source, recognised.target)
    if classifier is None or not classifier.records or "mixed" not in classifier.measured:
        return
    if eval_context.split != "test" and not recognised.by_folds:
        return
    own, earlier = float(recognised.right.mean()), classifier.measured["mixed"]
    asked = "records that had not been learnt" if recognised.by_folds else f"records of {eval_context.split}"
    page = " A page of plait export --to html asks the network alone, and names a figure of that."
    eval_context.note(
        f"{recognised.source}-{recognised.target}: believe this figure, {own:.1%} on {len(recognised.truth):,} "
        f"{asked}. Training told {earlier:.1%} on {classifier.records:,} records by which it also chose what answers"
        f"{', which is rather too high' * (earlier > own)}.{page * _fits_a_page(eval_context, classifier)}"
    )


def _fits_a_page(eval_context: EvalContext, classifier: Classifier) -> bool:
    """Whether an offline page can compute a classifier: of images, by a recogniser that the run trained."""
    if classifier.features.kind not in MEDIA:
        return False
    return isinstance(eval_context.modality(classifier.source).encoder, ImageRecogniser)


def _recognised(eval_context: EvalContext, source: str, target: str) -> Recognised | None:
    """The answers for the records of the split; None where it has none with both columns."""
    labels = eval_context.labels[target]
    most = max(eval_context.limits.scores // len(labels), 1)
    media = eval_context.pairs(source, target, eval_context.split)
    media = media.only(eval_context.draw(np.arange(len(media)), most))
    if not len(media):
        return None
    truth_texts = list(eval_context.texts[target][media.indices])
    unseen = sorted(set(truth_texts) - set(labels))
    if unseen:
        eval_context.note(
            f"{source}-{target}: {len(unseen)} labels of {eval_context.split} do not occur in train, and count as "
            "wrong."
        )
    if eval_context.dataset.manifest.groups:
        eval_context.note(f"{source}-{target}: {_asked_whose(eval_context)}")
    names = [*labels, *unseen]
    number = {name: i for i, name in enumerate(names)}
    truth = np.array([number[text] for text in truth_texts])
    scores = _answers(eval_context, source, target, media, labels)
    train = eval_context.pairs(source, target, "train")
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
    eval_context.note(f"{source}-{target}: {_asked_how(by, len(truth))} {_asked_whose(eval_context)}")
    return Recognised(
        source, target, media, eval_context.pairs(source, target, "train"), labels, labels, truth,
        by.scores.argmax(1), by.scores, float(counts.max() / counts.sum()), by_folds=True,
    )  # fmt: skip


def _asked_how(by: OutOfFold, count: int) -> str:
    """How records were asked about by folds."""
    if not by.seconds:
        return (
            f"all {count} labelled records are asked about once, by {by.folds} folds; what answers, a linear model, "
            "learnt from the others each time."
        )
    which = f"all {count} labelled records" if by.folds == by.of else f"{count} records, those of {by.folds} folds,"
    return (
        f"{which} are asked about once, by {by.folds} runs of {by.seconds:.0f} s that had not learnt them: less time "
        "and fewer records than this run had, so rather too low than too high."
    )


def _asked_whose(eval_context: EvalContext) -> str:
    """Which records the figures of folds hold for."""
    manifest = eval_context.dataset.manifest
    if not manifest.groups:
        return (
            "This is of more from the same sources; for others (new speakers, another camera) see --group-by of plait "
            "prepare."
        )
    learnt, all_groups = manifest.groups.get("train", 0), sum(manifest.groups.values())
    return (
        f"Groups ({manifest.group_by}) are left out whole, so this is of groups that were not learnt. This run itself "
        f"learnt from {learnt} of {all_groups} groups. A model to use may learn from all: train it on the same files "
        "without --group-by into another folder, and keep this figure for it."
    )


def _simple_answers(eval_context: EvalContext, recognised: Recognised) -> SimpleAnswers | None:
    """The better of the simple alternatives; None where train has a single label and there is no judge."""
    source, target = recognised.source, recognised.target
    kind = eval_context.columns[source]
    simple = None
    if len({eval_context.texts[target][i] for i in recognised.train.indices} & set(recognised.labels)) > 1:
        classifier = _classifier(eval_context, source, target)
        guess = _simple(eval_context, classifier, source, target, recognised.train, recognised.media, recognised.labels)
        simple = SimpleAnswers(guess, alternative_name(kind))
    is_generated = (
        source in eval_context.media_columns and kind not in eval_context.model.checkpoint.model.config.read_only
    )
    critic = eval_context.label_classifier(source, target) if is_generated else None
    if critic is not None:  # trained in any case, as the judge of what is drawn
        by_critic = critic.predict_among(
            eval_context.features(source, recognised.media.samples), target, recognised.labels
        )
        if simple is None or (by_critic == recognised.truth).mean() > (simple.predicted == recognised.truth).mean():
            simple = SimpleAnswers(by_critic, "a small CNN")
    if eval_context.alternative_seconds is None or source not in eval_context.media_columns:
        return simple
    network = eval_context.small_cnn(source, target)
    if network is None:
        return simple
    by_network = network.predict_among(
        eval_context.features(source, recognised.media.samples), target, recognised.labels
    )
    right = by_network == recognised.truth
    value, error = metrics.mean_with_error(right, seed=eval_context.seed)
    eval_context.keep("recognition", recognised.direction, "small_cnn_accuracy", value, stderr=error, n=len(right))
    if simple is None or right.mean() > (simple.predicted == recognised.truth).mean():
        simple = SimpleAnswers(by_network, "a small CNN in the same time")
    return simple


def _keep_accuracy(
    eval_context: EvalContext, recognised: Recognised, simple: SimpleAnswers | None, baseline: float | None
) -> None:
    """The share of right answers: of all records, of those that train does not have too, of train's, and by nearness
    alone."""
    direction, seed, n = recognised.direction, eval_context.seed, len(recognised.truth)
    truth, predicted, right, names = recognised.truth, recognised.predicted, recognised.right, recognised.names
    value, error = metrics.mean_with_error(right, seed=seed)
    wrong = Counter(zip(truth[~right].tolist(), predicted[~right].tolist(), strict=True))
    eval_context.findings.outcomes.append(
        Outcome(
            "recognition", f"{recognised.target} from {recognised.source}", "right", value, error, n, recognised.chance,
            simple.name if simple else None, baseline,
            paired_error(right, simple.predicted == truth) if simple else None,
            is_alternative=bool(simple and np.array_equal(simple.predicted, predicted)),
            confused=[(names[a], names[b]) for (a, b), _ in wrong.most_common(3)],
        )
    )  # fmt: skip
    chance = recognised.chance
    eval_context.keep("recognition", direction, "accuracy", value, stderr=error, n=n, chance=chance, baseline=baseline)
    clean = None if recognised.by_folds else eval_context.clean(recognised.media.indices)
    if clean is not None:
        value, error = metrics.mean_with_error(right[clean], seed=seed)
        eval_context.keep("recognition", direction, "accuracy", value, stderr=error, n=int(clean.sum()), clean=True)
        value = metrics.classification(truth[clean], predicted[clean], len(names)).macro_f1
        eval_context.keep("recognition", direction, "f1", value, n=int(clean.sum()), clean=True)
    train = recognised.train.only(eval_context.draw(np.arange(len(recognised.train)), n))
    if len(train):
        number = {name: i for i, name in enumerate(names)}
        known = np.array([number.get(text, -1) for text in eval_context.texts[recognised.target][train.indices]])
        learnt = known == _answers(eval_context, recognised.source, recognised.target, train, recognised.labels).argmax(
            1
        )
        value, error = metrics.mean_with_error(learnt, seed=seed)
        eval_context.keep("recognition", direction, "train_accuracy", value, stderr=error, n=len(train))
    embeds = eval_context.model.checkpoint.model.config.embed_dim and not recognised.by_folds
    if embeds and recognised.source in eval_context.media_columns:
        places = eval_context.embedded(recognised.source, recognised.media)
        texts = [eval_context.text_sequence(label) for label in recognised.labels]
        near = places @ eval_context.model.embed_sequences(texts).T
        value, error = metrics.mean_with_error(near.argmax(1) == truth, seed=seed)
        eval_context.keep(
            "recognition", direction, "zero_shot_accuracy", value, stderr=error, n=n, chance=chance, baseline=baseline
        )


def _keep_classes(
    eval_context: EvalContext,
    recognised: Recognised,
    result: metrics.Classification,
    plain: metrics.Classification | None,
) -> None:
    """Precision, recall and F1: their means over the classes, and of each class where there are at most 100."""
    direction, n = recognised.direction, len(recognised.truth)
    errors = metrics.macro_errors(recognised.truth, recognised.predicted, len(recognised.names), seed=eval_context.seed)
    for name in ("precision", "recall", "f1"):
        baseline = getattr(plain, f"macro_{name}") if plain else None
        value = getattr(result, f"macro_{name}")
        eval_context.keep("recognition", direction, name, value, stderr=errors[name], baseline=baseline, n=n)
    if len(recognised.names) > 100:
        return
    counts = result.confusion.sum(1)
    for i, label in enumerate(recognised.names):
        for name in ("precision", "recall", "f1"):
            value = float(getattr(result, name)[i])
            eval_context.keep("recognition", direction, name, value, n=int(counts[i]), label=label)


def _calibration(eval_context: EvalContext, recognised: Recognised) -> None:
    """Whether answers are as often right as their probabilities among the labels say."""
    direction, right, believed = recognised.direction, recognised.right, recognised.confidence
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
    eval_context.findings.reliabilities.append(
        Reliability(str(direction), value, mean, share, counts, coverage, accuracy)
    )


def _classifier(eval_context: EvalContext, source: str, target: str) -> Classifier | None:
    """What `classify` goes by for these columns, if anything was fitted."""
    classifiers = eval_context.model.checkpoint.classifiers
    return next((one for one in classifiers if (one.source, one.target) == (source, target)), None)


def _answers(eval_context: EvalContext, source: str, target: str, media: Media, labels: list[str]) -> np.ndarray:
    """What `classify` says, as log-probabilities (N, labels): the classifier's, else by likelihood alone."""
    classifier = _classifier(eval_context, source, target)
    if classifier is None:
        return _scores(eval_context, source, target, media, labels)
    eval_context.progress(f"recognition {source}-{target}", 0, len(media))
    inputs = eval_context.raw_inputs(source, media)
    scores = opinion_scores(eval_context.model, classifier, inputs, classifier.mixture.used)
    eval_context.progress(f"recognition {source}-{target}", len(media), len(media))
    return classifier.mixture.log_probabilities(scores)


def _simple(
    eval_context: EvalContext, classifier: Classifier | None, source: str, target: str, train: Media, media: Media,
    labels: list[str],
) -> np.ndarray:  # fmt: skip
    """The classes (N,) by the simple alternative: the linear part of the run's classifier, else one fitted now."""
    if classifier is None:
        number = {label: i for i, label in enumerate(labels)}
        fitting = train.only(eval_context.draw(np.arange(len(train)), MOST))
        fitting = fitting.only(np.array([eval_context.texts[target][i] in number for i in fitting.indices], bool))
        classes = np.array([number[eval_context.texts[target][i]] for i in fitting.indices])
        kind = eval_context.columns[source]
        bands = int(getattr(eval_context.modality(source).settings, "bands", 0)) if kind in MEDIA else 0
        classifier = fit_alternative(kind, eval_context.raw_inputs(source, fitting), classes, labels, bands)
    return classifier.linear_scores(eval_context.raw_inputs(source, media)).argmax(1)


def _show_answers(eval_context: EvalContext, recognised: Recognised) -> None:
    """All answers, and galleries of wrong and of right ones, the labels in turn."""
    names, ids = recognised.names, eval_context.dataset.ids
    eval_context.findings.answers += [
        AnsweredRecord(str(recognised.direction), ids[index], names[truth], names[said], float(probability))
        for index, truth, said, probability in zip(
            recognised.media.indices, recognised.truth, recognised.predicted, recognised.confidence, strict=True
        )
    ]
    _show_mistakes(eval_context, recognised)
    _show_right(eval_context, recognised)


def _show_mistakes(eval_context: EvalContext, recognised: Recognised) -> None:
    """Mistakes of each label in turn, of a label the surest first."""
    wrong = np.flatnonzero(~recognised.right)
    if not len(wrong):
        return
    confidence = recognised.confidence
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")]
    rows = [
        (
            eval_context.preview_input(recognised.source, recognised.media, i),
            [
                ReportItem("truth", text=recognised.names[recognised.truth[i]]),
                ReportItem(
                    f"answer, {confidence[i]:.0%} sure",
                    text=recognised.names[recognised.predicted[i]],
                    right=False,
                ),
            ],
        )
        for i in in_turn(surest, recognised.truth[surest], MISTAKES_SHOWN)
    ]
    note = (
        f"{len(rows)} of the {len(wrong):,} wrong answers to {len(recognised.right):,} records: the labels in turn, of "
        "each the surest first."
    )
    title = f"Wrong answers: {recognised.direction.arrow}"
    eval_context.findings.galleries.append(Gallery(title, note, rows, GalleryKind.MISTAKES))


def _show_right(eval_context: EvalContext, recognised: Recognised) -> None:
    """Some right answers of each label, drawn by the seed."""
    right = eval_context.shuffled(np.flatnonzero(recognised.right))
    rows = []
    for number in np.unique(recognised.truth[right])[:LABELS_SHOWN]:
        places = right[recognised.truth[right] == number][:RIGHT_SHOWN]
        shown = [eval_context.preview_input(recognised.source, recognised.media, i) for i in places]
        rows.append((ReportItem(text=recognised.names[number]), [replace(one, right=True) for one in shown]))
    if rows:
        note = f"Some of the {int(recognised.right.sum()):,} right answers, by label."
        title = f"Right answers: {recognised.direction.arrow}"
        eval_context.findings.galleries.append(Gallery(title, note, rows, GalleryKind.RIGHT))


def in_turn(places: np.ndarray, groups: np.ndarray, most: int) -> list[int]:
    """At most so many of `places` (N,), one of each of `groups` (N,) in turn, each group in the order given."""
    rank = np.zeros(len(places), np.int64)
    for group in np.unique(groups):
        members = groups == group
        rank[members] = np.arange(members.sum())
    return [int(i) for i in places[np.argsort(rank, kind="stable")][:most]]
