"""The scikit-learn classifier: images, clips and texts through scikit-learn's own tools."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import estimator_checks_generator

from conftest import RECIPE, make_image, tone
from plait.core.errors import PlaitError
from plait.sklearn import PlaitClassifier

SMALL = yaml.safe_load(RECIPE)
SMALL["training"] |= {"codec_steps": 2, "recogniser_steps": 60, "batch_size": 12}


def classifier(steps: int = 12, **options: object) -> PlaitClassifier:
    return PlaitClassifier(steps=steps, recipe=SMALL, device="cpu", **options)  # type: ignore[arg-type]


def test_images_in_a_pipeline_and_by_cross_validation() -> None:
    rng = np.random.default_rng(0)
    images, labels = [make_image(i % 2, rng) for i in range(60)], np.array([3, 8] * 30)
    scores = cross_val_score(classifier(), images, labels, cv=2)
    assert scores.shape == (2,) and scores.mean() > 0.8  # red and blue discs
    shrink = FunctionTransformer(lambda X: [image.resize((12, 12)) for image in X])  # noqa: N803
    model = make_pipeline(shrink, classifier()).fit(images, labels)
    chances = model.predict_proba(images[:6])
    assert chances.shape == (6, 2) and np.allclose(chances.sum(1), 1, atol=1e-6)
    assert model.classes_.tolist() == [3, 8] and model.predict(images[:6]).dtype == labels.dtype
    np.testing.assert_array_equal(model.classes_[chances.argmax(1)], model.predict(images[:6]))


def test_paths_survive_pickling_and_a_folder_keeps_the_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for i in range(24):
        paths.append(str(tmp_path / f"{i}.png"))
        make_image(i % 2, rng).save(paths[-1])
    labels = ["red", "blue"] * 12
    model = classifier(folder=str(tmp_path / "kept")).fit(paths, labels)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(again.predict_proba(paths), model.predict_proba(paths), atol=1e-6)
    assert (tmp_path / "kept" / "run" / "run.json").is_file() and model.kind_ == "image"
    with pytest.raises(PlaitError, match=r"none\.png cannot be read"):
        model.predict([str(tmp_path / "none.png")])


def test_clips_and_texts() -> None:
    rng = np.random.default_rng(0)
    import io

    import soundfile

    clips = [soundfile.read(io.BytesIO(tone(i % 2, rng))) for i in range(24)]
    heard = classifier().fit(clips, [False, True] * 12)
    assert heard.kind_ == "audio" and set(heard.predict(clips[:4]).tolist()) <= {False, True}
    texts = [f"{word} number {i}.png" for i in range(12) for word in ("apple", "stone")]
    read = classifier().fit(texts, ["fruit", "thing"] * 12)
    assert read.kind_ == "text" and (read.predict(texts) == np.array(["fruit", "thing"] * 12)).mean() > 0.8


@pytest.mark.parametrize(
    "inputs,labels,error",
    [
        (["a", "b"], ["x"], "X has 2 inputs, y 1"),
        (["a", "b"], ["x", "x"], "two classes at least"),
        (["a", "b"], [["x"], ["y"]], "one label an input"),
    ],
)
def test_what_cannot_be_fitted_is_refused(inputs: list[str], labels: list[str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        classifier().fit(inputs, labels)


def test_scikit_learns_own_checks_where_they_apply() -> None:
    with pytest.raises(NotFittedError):
        PlaitClassifier().predict(["a"])
    assert clone(classifier()).get_params()["steps"] == 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that checks on numeric tables do not apply
        ran = 0
        for estimator, check in estimator_checks_generator(PlaitClassifier()):
            check(estimator)
            ran += 1
    assert ran
