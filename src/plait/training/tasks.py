"""What a dataset is wanted for, and what of a recipe follows from that. Whatever a recipe says itself is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np

from plait.classifiers.linear import fit_linear
from plait.core.config import SIZES, Recipe
from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.core.files import read_json
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.data.record import LABEL_NAMES
from plait.modalities.media import MEDIA
from plait.modalities.registry import MODALITIES, SETTINGS
from plait.modalities.text import words
from plait.model.checkpoint import find_checkpoint
from plait.training.build import fit_settings, label_columns
from plait.training.expectation import Measured, describe_expected, expectation

MIRROR_RECORDS = 1500  # images that say whether a mirrored one means the same
MIRROR_LOSS = 0.9  # share of the accuracy that mirrored images must keep
MIRROR_STRENGTH = 3e-4  # of the linear model that finds out
LABELLED = 0.5  # share of the records with media that must have a label for it to be the task
LOOKED_AT = 1000  # cells of a column that say whether it holds ids
RNG_STREAM = 321  # of the random numbers of `uniform`

QUESTIONS, REPLIES = ("question", "message", "prompt", "query"), ("reply", "answer", "response")  # names of columns

MEANINGS = {
    "recognise": "say which label an input has",
    "describe": "find media by words and words by media, and describe them",
    "draw": "recognise, describe, and make images and audio",
    "language": "continue texts",
    "chat": "reply in conversations",
    "reply": "answer questions from past pairs",
}


class FeatureTask(Protocol):
    """What a feature's own data are wanted for; the task has the feature's name."""

    meaning: str  # what a model does then, for people
    needs: str  # what a source must hold
    source: Mapping[str, Any]  # of a recipe's section data, where a source is to be read for this task
    measured: Measured  # what was had on a public set

    def recipe(self, recipe: Recipe) -> Recipe:
        """A recipe with what follows from the task where it says nothing itself."""
        ...


FEATURE_TASKS: ExtensionPoint[FeatureTask] = ExtensionPoint("task")


@dataclass
class Derived:
    """The task, the recipe with what follows from it, and what to tell of it, a line each."""

    task: str
    recipe: Recipe
    lines: list[str] = field(default_factory=list)


def find_task(dataset: Dataset, labels: dict[str, list[str]]) -> str:
    """What a dataset's columns are good for."""
    if dataset.manifest.kind != "records":
        return dataset.manifest.kind  # a feature's data have the task of its name
    if dataset.manifest.chats:
        return "chat"
    answers = [*dataset.manifest.multi_label, *dataset.manifest.numbers]
    media = [c for c, kind in dataset.columns.items() if kind != "text"]
    texts = [c for c, kind in dataset.columns.items() if kind == "text"]
    if media:
        train = dataset.indices("train")
        named = [c for c in [*labels, *answers] if _share(dataset, c, train) >= LABELLED]
        return "recognise" if named else "describe" if texts else "draw"
    others = [c for c in texts if c not in labels and c not in answers]
    if len(texts) == 2 and {c.lower() for c in texts} & set(REPLIES) and {c.lower() for c in texts} & set(QUESTIONS):
        return "reply"
    if (labels or answers) and others:
        return "recognise"
    return "reply" if len(texts) > 1 else "language"


def derive(dataset: Dataset, recipe: Recipe, kept: bool = False) -> Derived:
    """The recipe for a dataset. The same arguments give the same; `kept` says whether the run keeps what its base
    replies (`training/kept_replies.py`).

    Raises PlaitError where the recipe names a task that the data cannot serve.
    """
    context = recipe.model.backbone.context or SIZES[recipe.model.size].context
    labels = label_columns(dataset, context)
    task = recipe.training.task
    task_of_data = find_task(dataset, labels)
    if task == "auto":
        _raise_if_one_label(dataset, labels)
        if task_of_data == "reply":
            _raise_if_ids(dataset)
        task = task_of_data
    if task == "recognise" and task_of_data != "recognise":
        raise PlaitError(
            f"{dataset.path} has no column of labels (texts of at most {context // 2} tokens, each of which stands at "
            "several records), so nothing can be recognised. Put files into a folder for each label, or add a column."
        )
    _raise_if_unserved(dataset, task)
    training = {"task": task}
    feature = FEATURE_TASKS.by_feature().get(task)
    lines = [f"Task: {task} ({MEANINGS[task] if feature is None else feature.meaning})."]
    if task == "draw" and not labels and all(kind != "text" for kind in dataset.columns.values()):
        lines.append(
            "Without labels or captions nothing can be named. What can be had: near-duplicates (plait prepare), search "
            "by example (plait index), new images of the same kind (plait draw). To label: a folder for each label."
        )
    derived = Derived(task, recipe, lines)
    if task == "recognise":
        _recognise(dataset, derived, labels, training)
    elif task == "language" and recipe.model.init_from is None:
        _language(derived, training)
    elif feature is not None:
        derived.recipe = feature.recipe(recipe)
    if feature is not None:
        derived.lines.append(describe_expected(feature.measured, _seconds(recipe)))
    elif recipe.model.init_from is None and (line := expectation(task, 1, 1, _seconds(recipe))) is not None:
        derived.lines.append(line)
    _imported(derived, training, kept)
    derived.recipe = with_sections(derived.recipe, training=training)
    return derived


def _raise_if_unserved(dataset: Dataset, task: str) -> None:
    """Raise PlaitError where a dataset has nothing that a task can be learnt from."""
    feature = FEATURE_TASKS.by_feature().get(task)
    if feature is not None:
        if dataset.manifest.kind != task:
            raise PlaitError(f"{dataset.path} holds nothing for the task {task}. It takes {feature.needs}.")
        return
    texts = [c for c, kind in dataset.columns.items() if kind == "text"]
    media = len(texts) < len(dataset.columns)
    needs = {
        "describe": (media and bool(texts), "images, audio or video, and texts beside them"),
        "draw": (media, "images, audio or video"),
        "language": (bool(texts), "texts"),
        "chat": (bool(dataset.manifest.chats), "conversations: a list of messages with a role and a content each"),
        "reply": (
            bool(dataset.manifest.chats) or len(texts) > 1,
            "a column of questions and one of replies (or conversations)",
        ),
    }
    there, what = needs.get(task, (True, ""))
    if dataset.manifest.kind == "records" and not there:
        raise PlaitError(
            f"{dataset.path} holds nothing for the task {task}: that takes {what}. Its columns: "
            f"{', '.join(f'{column} ({kind})' for column, kind in dataset.columns.items())}."
        )


def source_settings(recipe: Recipe) -> Recipe:
    """The recipe with what reading a source takes for the task that is asked for."""
    feature = FEATURE_TASKS.by_feature().get(recipe.training.task)
    if feature is None:
        return recipe
    missing = {key: value for key, value in feature.source.items() if getattr(recipe.data, key) is None}
    return with_sections(recipe, data=missing) if missing else recipe


def _raise_if_one_label(dataset: Dataset, labels: dict[str, list[str]]) -> None:
    """Raise PlaitError where a column named as labels are has one label alone, and no other column has labels."""
    for column, kind in dataset.columns.items():
        if kind == "text" and column.lower() in LABEL_NAMES and not labels:
            distinct = {text for text in dataset.texts(column) if text is not None}
            if len(distinct) == 1:
                raise PlaitError(
                    f"All records of {dataset.path} have the {column} '{distinct.pop()}', so there is nothing to tell "
                    "apart. Add records of another, or say what else is wanted: --task language, reply or describe."
                )


def _raise_if_ids(dataset: Dataset) -> None:
    """Raise PlaitError where what looks like pairs of texts are columns of ids, numbers and dates, and is not called
    question and answer."""
    columns = [column for column, kind in dataset.columns.items() if kind == "text"]
    if {column.lower() for column in columns} & {*QUESTIONS, *REPLIES}:
        return
    ids = []
    for column in columns:
        cells = [text for text in islice(dataset.texts(column), LOOKED_AT) if text is not None]
        if any(len(words(text)) > 2 for text in cells):
            return
        if sum(any(c.isdigit() for c in text) for text in cells) >= LABELLED * max(len(cells), 1):
            ids.append(column)
    if len(ids) > 1:
        wanted = [f"--task {n} takes {task.needs}." for n, task in FEATURE_TASKS.by_feature().items()]
        raise PlaitError(
            " ".join([
                f"{dataset.path} holds ids, numbers or dates and no texts ({', '.join(ids)}).", *wanted,
                "To predict a number: plait prepare --number COLUMN.",
                "If they are pairs to answer from all the same: --task reply.",
            ])
        )  # fmt: skip


def _imported(derived: Derived, training: dict[str, Any], kept: bool) -> None:
    """Batch and learning rate for a pretrained language model, where the recipe says nothing."""
    recipe = derived.recipe
    name = recipe.model.init_from
    if name is None:
        return
    folder = find_checkpoint(name)
    if folder is not None and read_json(folder / "config.json").get("model_type") == "plait":
        return
    user_training, lora = recipe.training, recipe.training.lora
    rate = 5e-5
    if lora is not None:  # faster where what the base knows is kept
        rate = 5e-4 if kept else 3e-4
    chosen = {"batch_size": 4 if lora else 8, "learning_rate": rate}
    chosen = {key: value for key, value in chosen.items() if getattr(user_training, key) is None}
    if lora and user_training.full_softmax_prob == Recipe().training.full_softmax_prob:
        chosen["full_softmax_prob"] = 0.0
    training |= chosen
    if "learning_rate" in chosen:
        words = "low-rank updates of a pretrained model" if lora else "a pretrained model that is trained whole"
        derived.lines.append(f"For {words}: learning rate {chosen['learning_rate']:g}.")
    if not lora and not user_training.freeze:
        derived.lines.append("All of it is trained, which takes much memory and time: --lora trains a small part.")


def _recognise(dataset: Dataset, derived: Derived, labels: dict[str, list[str]], training: dict[str, Any]) -> None:
    """Media and texts that have labels are read and never written; encoders of media learn the labels directly."""
    recipe = derived.recipe
    media = [c for c, kind in dataset.columns.items() if kind != "text"]
    kinds = [kind for kind in MODALITIES if kind in {dataset.columns[c] for c in media}]
    sources = kinds or [c for c, kind in dataset.columns.items() if kind == "text" and c not in labels]
    sources = [c for c in sources if c not in (*dataset.manifest.multi_label, *dataset.manifest.numbers)]
    # A column called text has the name of the objective, and cannot be told apart from it: it is written, too.
    sources = [name for name in sources if name != "text"]
    training["weights"] = {**dict.fromkeys(sources, 0.0), **recipe.training.weights}
    training["validations"] = min(recipe.training.validations, 8)
    model: dict[str, Any] = {}
    for kind in kinds:
        settings: dict[str, Any] = getattr(recipe.model, kind)
        if recipe.model.init_from is not None or settings.get("encoder") or not labels:
            continue
        classes = {column: len(values) for column, values in labels.items()}
        chosen = SETTINGS[kind].for_recognition(settings, partial(mirrors, dataset, recipe, labels, kind))
        derived.lines += chosen.lines
        model[kind] = {"classes": classes, **chosen.settings, **settings}
    seconds = _seconds(recipe) or 60 * SIZES[recipe.model.size].minutes
    if model:
        share = recipe.training.recogniser_share
        derived.lines.append(
            f"Time: {seconds * share:.0f} s for encoders that learn the labels, {seconds * (0.9 - share):.0f} s for "
            f"the model, {seconds * 0.1:.0f} s to prepare, validate and calibrate. Media are read, not made; "
            "--task draw makes them."
        )
    else:
        derived.lines.append(f"Time: {seconds * 0.9:.0f} s for the model, the rest for n-grams and calibration.")
    if labels:
        column, values = next(iter(labels.items()))
        count = round(_share(dataset, column, train := dataset.indices("train")) * len(train))
        line = expectation(kinds[0] if kinds else "text", count, len(values), _seconds(recipe))
        derived.lines += [line] if line else []
    derived.recipe = with_sections(recipe, model=model)


def _seconds(recipe: Recipe) -> float | None:
    """What a run is given; None where steps are asked for, whose time nobody knows yet."""
    if recipe.training.steps is not None:
        return None
    return 60 * (recipe.training.minutes or SIZES[recipe.model.size].minutes)


def _language(derived: Derived, training: dict[str, Any]) -> None:
    """Short windows and small batches, so that hundreds of steps fit into minutes."""
    recipe = derived.recipe
    minutes = recipe.training.minutes or SIZES[recipe.model.size].minutes
    if recipe.model.size != "tiny" or minutes > 60:
        return
    user_training, defaults = recipe.training, Recipe().training
    backbone = recipe.model.backbone
    context = backbone.context or (128 if minutes <= 20 else 256)
    model = {"backbone": {"context": context}, "tied": True if recipe.model.tied is None else recipe.model.tied}
    chosen = {"batch_size": 8, "learning_rate": 4e-3, "weight_decay": 0.1, "betas": (0.9, 0.99),
              "full_softmax_prob": 0.0, "validations": 10}  # fmt: skip
    training |= {key: value for key, value in chosen.items() if getattr(user_training, key) == getattr(defaults, key)}
    derived.recipe = with_sections(recipe, model=model)
    derived.lines.append(f"For {minutes:g} minute{'s' * (minutes != 1)}: windows of {context} tokens, 8 in a batch.")


def with_sections(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """A recipe with these keys laid over it, validated again."""
    values = recipe.model_dump()
    for name, changes in sections.items():
        for key, value in changes.items():
            old = values[name].get(key)
            values[name][key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return Recipe.model_validate(values)


def _share(dataset: Dataset, column: str, indices: np.ndarray) -> float:
    present = sum(len(values) - values.null_count for values in dataset.cells(column, indices))
    return present / len(indices) if len(indices) else 0.0


def mirrors(dataset: Dataset, recipe: Recipe, labels: dict[str, list[str]], kind: str) -> bool:
    """Whether images mean the same when they are mirrored: a linear model on simple features, fitted on half of some
    training images, knows the other half as well when these are mirrored."""
    source = next(c for c, modality in dataset.columns.items() if modality == kind)
    target = next(iter(labels))
    answers = dataset.texts(target)
    indices = np.array([i for i in dataset.indices("train") if answers[i] is not None], np.int64)
    order = np.argsort(uniform(recipe.training.seed, RNG_STREAM, indices), kind="stable")
    indices = np.sort(indices[order[:MIRROR_RECORDS]])
    settings = dict(getattr(recipe.model, kind))
    modality = MODALITIES[kind](fit_settings(dataset, kind, SIZES[recipe.model.size], settings), 8)
    number = {label: place for place, label in enumerate(labels[target])}
    images, classes = [], []
    for index, record in zip(indices, dataset.iterate(indices, [source]), strict=True):
        if source in record.parts:
            images.append(modality.sample(record.parts[source]))
            classes.append(number[answers[index]])
    if len(images) < 40 or len(set(classes)) < 2:
        return False
    truth = np.array(classes)
    half = uniform(recipe.training.seed, RNG_STREAM, 1, np.arange(len(images))) < 0.5
    simple_features = MEDIA[kind].simple_features
    rows = simple_features(images, 0)
    scale = rows[half].std(0) + 1e-3
    model = fit_linear((rows[half] - rows[half].mean(0)) / scale, truth[half], len(number), MIRROR_STRENGTH, False)
    others = [image[:, ::-1] for image, first in zip(images, half, strict=True) if not first]
    straight = model((rows[~half] - rows[half].mean(0)) / scale).argmax(1) == truth[~half]
    mirrored = model((simple_features(others, 0) - rows[half].mean(0)) / scale).argmax(1) == truth[~half]
    return bool(mirrored.mean() >= MIRROR_LOSS * straight.mean())
