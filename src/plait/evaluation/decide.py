"""After training: the classifier of each column of labels is fitted and stored with the checkpoint.

Simple features with a linear model are fitted on train; then all opinions (see `classifiers.classifier`) are weighed
and calibrated on val. So what the network does not add is not asked, and a simple model that does better answers in its
place, behind the same verbs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from plait.classifiers.classifier import PORTABLE, Classifier, Features
from plait.classifiers.linear import Linear, choose_linear, fit_linear
from plait.classifiers.mixture import Mixture, fit_mixture
from plait.classifiers.novelty import MOST, fit_novelty
from plait.classifiers.space import SpaceQuality, measure_space
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.evaluation.examples import RNG_STREAM, Examples, feature_rows, read_examples
from plait.evaluation.few_records import fit_few
from plait.evaluation.predictors import describe_predictor, fit_predictors
from plait.inference.model import PlaitModel, load
from plait.inference.opinions import available, novelty_scores, opinion_scores, view_of
from plait.model.checkpoint import add_classifiers
from plait.training.parts import training_seconds

MOST_MEDIA, MOST_TEXTS = 20_000, 100_000  # training records that the linear model sees
MOST_VALIDATION, MOST_VALIDATION_TEXTS = 1000, 3000  # records that opinions are weighed on
FEWEST_VALIDATION = 20  # below which folds take their place
FEW = 50  # held-out records below which a small lead over guessing says nothing
LINEAR_SHARE, LINEAR_SECONDS = 0.1, 20.0  # of the run's time, and seconds at least, that linear models may take
POSITIONS = 100_000  # tokens that likelihoods of validation may take, contexts and labels together
MOST_PAIRS = 400  # of val, that say what the embedding space is worth


def directions(model: PlaitModel, dataset: Dataset) -> list[tuple[str, str]]:
    """(source, target) of what can be recognised: labels, from media, or where there are none from texts."""
    media = [c for c, kind in dataset.columns.items() if kind in model.checkpoint.model.media and c in model.columns]
    hidden = {*dataset.manifest.chats, *dataset.manifest.multi_label, *dataset.manifest.numbers}
    texts = [
        c
        for c, kind in dataset.columns.items()
        if kind == "text" and c in model.columns and c not in model.labels and c not in hidden
    ]
    return [(source, target) for target in model.labels if target in dataset.columns for source in media or texts]


def fit_classifiers(
    model: PlaitModel, dataset: Dataset, seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
    seconds: float = math.inf,
) -> list[Classifier]:  # fmt: skip
    """A classifier for each direction of the dataset, in the order of its columns. Their linear models, which are the
    simple alternatives too, take so many `seconds` of a processor together."""
    classifiers, pairs = [], directions(model, dataset)
    for source, target in pairs:
        if progress:
            progress(f"classifier {source}-{target}", 0, 1)
        one = _fit(model, dataset, source, target, seed, seconds / len(pairs))
        if one is not None:
            classifiers.append(one)
        if progress:
            progress(f"classifier {source}-{target}", 1, 1)
    return classifiers


def finish(
    run: Path, dataset: Dataset, device: str = "auto", progress: Callable[[str, int, int], None] | None = None
) -> list[str]:
    """Fit the classifiers of a run and store them with its best checkpoint; returns what to tell of each, a line. A run
    that has them keeps them."""
    model = load(run, device).plait_model
    if model is None or model.folder is None:
        raise PlaitError(f"{run} is no model that plait trained.")
    checkpoint = model.checkpoint
    if not checkpoint.classifiers and not checkpoint.predictors and checkpoint.space is None:
        seed = int(checkpoint.training.get("seed", 0))
        seconds = max(LINEAR_SHARE * training_seconds(read_json(run / "run.json")), LINEAR_SECONDS)
        checkpoint.classifiers = fit_classifiers(model, dataset, seed, progress, seconds)
        checkpoint.space = space_quality(model, dataset, seed)
        checkpoint.predictors = fit_predictors(model, dataset, seed, progress)
        if checkpoint.classifiers or checkpoint.space or checkpoint.predictors:
            add_classifiers(model.folder.resolve(), checkpoint.classifiers, checkpoint.space, checkpoint.predictors)
    lines = [line for one in checkpoint.classifiers for line in (describe(one), *one.fitting)]
    lines += [describe_predictor(one) for one in checkpoint.predictors]
    if checkpoint.space is not None and (checkpoint.space.trust or not lines):  # a run that recognises need not search
        lines.append(describe_space(checkpoint.space))
    return lines


def describe_space(space: SpaceQuality) -> str:
    """What an embedding space is worth for searching by words."""
    if not space.trust:
        return (
            f"Search by words: nothing was learnt ({space.n} texts of val find their records no more often than by "
            "chance); search asks words alone. Train longer, give more captions, or start from a pretrained encoder."
        )
    return (
        f"Search by words: {space.trust:.0%} of the way from chance to perfect among ten, on val ({space.n} texts); a "
        "hybrid search weighs vectors by that."
    )


def space_quality(model: PlaitModel, dataset: Dataset, seed: int) -> SpaceQuality | None:
    """How well texts of val find the media of their records; None where val has too few, or there is no space."""
    if not model.checkpoint.model.config.embed_dim:
        return None
    media = [c for c, kind in dataset.columns.items() if kind in model.checkpoint.model.media]
    texts = [c for c, kind in dataset.columns.items() if kind == "text" and c not in dataset.manifest.chats]
    if not media or not texts:
        return None
    chosen = dataset.indices("val")
    chosen = np.sort(chosen[np.argsort(uniform(seed, RNG_STREAM, chosen), kind="stable")[:MOST_PAIRS]])
    pairs = []
    for record in dataset.iterate(chosen, [media[0], *texts]):
        caption = next((record.parts[c] for c in texts if c in record.parts), None)
        if caption is not None and media[0] in record.parts:
            pairs.append((str(caption), model.modality(media[0]).windows(record.parts[media[0]])[0]))
    if len(pairs) < FEWEST_VALIDATION:
        return None
    distinct, place = np.unique([caption for caption, _ in pairs], return_inverse=True)
    if len(distinct) < 2:
        return None
    queries = model.embed_inputs([str(text) for text in distinct])
    embeddings = model.embed_sequences([model.context([(media[0], sample)]) for _, sample in pairs])
    return measure_space(queries, embeddings, place[None] == np.arange(len(distinct))[:, None])


def describe(classifier: Classifier) -> str:
    """What a classifier goes by, and how right that is on validation records."""
    if not classifier.records:
        return (
            f"{classifier.target} from {classifier.source}: learnt from a single record of each label, which cannot "
            "show how right that is. Give at least two of each, better ten."
        )
    measured = ", ".join(
        f"{name} {share:.1%}{'' if classifier.mixture.weights.get(name) else ' (not used)'}"
        for name, share in classifier.measured.items()
        if name not in ("mixed", "portable")
    )
    mixed, count = classifier.measured.get("mixed", 0.0), classifier.records
    noise = 2 * (classifier.guess * (1 - classifier.guess) / count) ** 0.5
    start = f"{classifier.target} from {classifier.source}: {mixed:.1%} of {count:,} validation records right"
    if mixed > classifier.guess + noise:
        return (
            f"{start}, by {measured}. These records also chose what answers, so this is rather too "
            "high: believe the figure of plait evaluate."
        )
    guessing = f"always saying the most frequent label has {classifier.guess:.1%}"
    if mixed > classifier.guess and count < FEW:
        return f"{start}, where {guessing}: so few cannot tell whether anything was learnt. Give more records."
    return (
        f"{start}: nothing was learnt ({guessing}). Train longer, give more records, or look at whether inputs and "
        "labels belong together."
    )


def _fit(model: PlaitModel, dataset: Dataset, source: str, target: str, seed: int, seconds: float) -> Classifier | None:
    """The classifier of one direction; None where train has a single label."""
    labels = model.labels[target]
    kind = dataset.columns[source]
    max_records = MOST_TEXTS if kind == "text" else MOST_MEDIA
    train = read_examples(model, dataset, source, target, "train", max_records, seed)
    max_records = MOST_VALIDATION_TEXTS if kind == "text" else MOST_VALIDATION
    held = read_examples(model, dataset, source, target, "val", max_records, seed)
    if len(np.unique(train.classes)) < 2:
        return None
    settings = model.checkpoint.model.config.modalities.get(kind, {})
    nothing, unweighed = Linear(np.zeros((0, 0), np.float32), np.zeros(0)), Mixture({}, {}, {}, [])
    classifier = Classifier(source, target, labels, Features(kind), nothing, unweighed, bool(settings.get("flip")))
    bands = int(str(settings.get("bands", 0)))
    if len(held) < FEWEST_VALIDATION:
        return fit_few(classifier, train + held, bands, seed)
    _fit_weighed(model, classifier, train, held, bands, seconds)
    return classifier


def _fit_weighed(
    model: PlaitModel, classifier: Classifier, train: Examples, held: Examples, bands: int, seconds: float
) -> None:
    """All opinions, weighed and calibrated on val; the linear one in so many seconds of a processor."""
    kind, labels, mirrored = classifier.features.kind, classifier.labels, classifier.mirrored
    begun = time.process_time()
    classifier.features = Features.fit(kind, train.inputs, bands)
    rows, classes = feature_rows(classifier.features, train, mirrored)
    held_rows = classifier.features(held.inputs)
    reading = time.process_time() - begun  # which texts take once more in the end
    left = seconds - (2 if kind == "text" else 1) * reading
    choice = choose_linear(rows, classes, held_rows, held.classes, len(labels), kind == "text", left)
    strength, balanced = choice.strength, choice.balanced
    if choice.untried:
        untried = ", ".join(f"{one:g}" for one in choice.untried)
        classifier.fitting.append(
            f"{classifier.target} from {classifier.source}: the linear model's strengths {untried} were not tried: it "
            f"takes at most a tenth of the run's time, or {LINEAR_SECONDS:.0f} s. A longer run (--minutes) tries more."
        )
    classifier.linear = choice.linear
    names = available(model.checkpoint, classifier.source, classifier.target)
    weighed = _affordable(model, held, labels, kind)
    if len(weighed) < min(FEWEST_VALIDATION, len(held)):  # likelihoods of so many labels cost too much
        names, weighed = [name for name in names if name != "likelihood"], held
    scores = opinion_scores(model, classifier, weighed.inputs, names)
    _weigh(classifier, scores, weighed.classes)
    if len(weighed) < len(held) and "likelihood" not in classifier.mixture.used:
        # What is left costs little: more records tell more about it.
        assert classifier.portable is not None
        cheap = list(dict.fromkeys([*classifier.mixture.used, *classifier.portable.used]))
        weighed, scores = held, opinion_scores(model, classifier, held.inputs, cheap)
        _weigh(classifier, scores, held.classes)
    classifier.measured |= {name: float((one.argmax(1) == weighed.classes).mean()) for name, one in scores.items()}
    mixed = classifier.mixture.log_probabilities(scores)
    frequent = int(np.bincount(train.classes).argmax())
    classifier.guess, classifier.records = float((weighed.classes == frequent).mean()), len(weighed)
    classifier.measured["mixed"] = float((mixed.argmax(1) == weighed.classes).mean())
    if kind != "text":
        _fit_novelty(model, classifier, train, weighed, scores)
    # What was chosen on val holds; the linear model then learns from val too.
    both = train + held
    if kind == "text":
        classifier.features = Features.fit(kind, both.inputs)
    rows, classes = feature_rows(classifier.features, both, mirrored)
    classifier.linear = fit_linear(rows, classes, len(labels), strength, balanced)
    if classifier.features.grams is not None:
        classifier.features.grams, classifier.linear = classifier.features.grams.pruned(classifier.linear)


def _weigh(classifier: Classifier, scores: dict[str, np.ndarray], truth: np.ndarray) -> None:
    """Fit the mixture of all opinions, and that of those that need no backbone; where the first is on no more records
    right, the second answers: it is quicker, and the same elsewhere."""
    classifier.mixture = fit_mixture(scores, truth)
    plain = {name: one for name, one in scores.items() if name in PORTABLE}
    classifier.portable = fit_mixture(plain, truth)
    by_all = classifier.mixture.log_probabilities(scores).argmax(1) == truth
    by_plain = classifier.portable.log_probabilities(plain).argmax(1) == truth
    classifier.measured["portable"] = float(by_plain.mean())
    if by_plain.sum() >= by_all.sum():
        classifier.mixture = replace(classifier.portable)


def _fit_novelty(
    model: PlaitModel, classifier: Classifier, fitting: Examples, held: Examples, scores: dict[str, np.ndarray]
) -> None:
    """Views of what is unlike, fitted on train, and the familiarity of validation records by them."""
    views = ["features", "network"] if "network" in scores else ["features"]
    sample = fitting.only(np.arange(len(fitting))[:: max(-(-len(fitting) // MOST), 1)])
    for view in views:
        rows = view_of(model, classifier, view, sample.inputs)
        classifier.novelty[view] = fit_novelty(rows, sample.classes, view_of(model, classifier, view, held.inputs))
    classifier.mixture.fit_quantiles(scores, novelty_scores(model, classifier, held.inputs))


def _affordable(model: PlaitModel, held: Examples, labels: list[str], kind: str) -> Examples:
    """As many validation records as likelihoods of all labels can be had for."""
    encode = model.checkpoint.text.encode_batch
    each = sum(len(ids) for ids in encode(labels)) + (16 if kind != "text" else 0)
    return held.only(np.arange(min(len(held), max(POSITIONS // max(each, 1), 1))))
