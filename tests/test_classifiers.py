"""What decides about labels: opinions and their mixture, what is stored, what the commands make of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import log_loss

import plait as package
from plait.classifiers.classifier import Classifier, Features, load_classifiers, save_classifiers
from plait.classifiers.linear import STRENGTHS, NgramFeatures, choose_linear, fit_linear
from plait.classifiers.mixture import fit_mixture, log_softmax
from plait.classifiers.space import SpaceQuality, measure_space
from plait.core.config import Recipe
from plait.data.dataset import Dataset
from plait.evaluation.alternatives import GramModel
from plait.evaluation.decide import describe, describe_space
from plait.evaluation.learnt import ByHeart
from plait.evaluation.metrics import calibration
from plait.evaluation.outcome import Outcome
from plait.evaluation.verdict import make_verdict
from plait.recommend.ranking import HR_10
from plait.server.mcp import Toolbox
from plait.studio.use import Models
from plait.training.expectation import expectation
from plait.training.tasks import derive
from server import Server

Plait = Callable[..., int]
RNG = np.random.default_rng(5)


def opinions(n: int = 600, classes: int = 4) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One opinion that knows, one that knows in part, one that says anything; all of other scales."""
    truth = RNG.integers(0, classes, n)
    right = np.eye(classes)[truth]
    noise = RNG.normal(size=(3, n, classes))
    scores = {"good": 30 * (right + noise[0] * 0.5), "weak": right + noise[1], "none": 5 * noise[2]}
    return scores, truth


def test_opinions_are_weighed_and_calibrated() -> None:
    scores, truth = opinions()
    mixture = fit_mixture(scores, truth)
    assert mixture.weights["none"] * 5 < 0.1 * mixture.weights["good"] * 30
    fresh, wanted = opinions()
    logs = mixture.log_probabilities(fresh)
    np.testing.assert_allclose(np.exp(logs).sum(1), 1, atol=1e-9)
    believed = np.exp(logs).max(1)
    right = logs.argmax(1) == wanted
    assert right.mean() >= max((one.argmax(1) == wanted).mean() for one in fresh.values())
    assert abs(believed.mean() - right.mean()) < 0.05
    # Inputs that every opinion is unsure of are less familiar than nearly all of validation.
    flat = {name: np.full((1, 4), -100.0) for name in fresh}
    assert mixture.ood_scores(flat)[0] > 0.99 and 0.3 < np.median(mixture.ood_scores(fresh)) < 0.7


def test_the_likeliest_of_many_classes_is_calibrated() -> None:
    """Scores of one class against the rest, as linear models have them, of 60 classes."""

    def draw(n: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        truth = RNG.integers(0, 60, n)
        scores = RNG.normal(-1.0, 0.25, (n, 60))
        scores[np.arange(n), truth] += RNG.choice([1.6, 0.5], n, p=[0.8, 0.2])
        return {"linear": scores}, truth

    mixture = fit_mixture(*draw(1000))
    scores, truth = draw(4000)
    logs = mixture.log_probabilities(scores)
    np.testing.assert_allclose(np.exp(logs).sum(1), 1)
    assert (logs.argmax(1) == scores["linear"].argmax(1)).all()
    right = logs.argmax(1) == truth
    plain = log_softmax(mixture.weights["linear"] * scores["linear"])
    before, after = (calibration(np.exp(one.max(1)), right)[0] for one in (plain, logs))
    assert after < 0.03 and after < before


@pytest.mark.parametrize("kind", ["image", "audio", "text"])
def test_what_was_stored_decides_alike(kind: str, tmp_path: Path) -> None:
    labels = ["red", "green", "blue"]
    classes = np.arange(60) % 3
    if kind == "text":
        inputs = [f"{labels[c]} things number {i}" for i, c in enumerate(classes)]
    elif kind == "image":
        inputs = [(RNG.integers(0, 99, (32, 32, 3)) + 120 * np.eye(3, dtype=int)[c]).astype(np.uint8) for c in classes]
    else:
        inputs = [RNG.normal(size=(40, 64)).astype(np.float16) + np.sin(np.arange(64) * (c + 1) / 9) for c in classes]
    features = Features.fit(kind, inputs, 64)  # type: ignore[arg-type]
    linear = fit_linear(features(inputs), classes, 3, 0.1, False)
    if features.grams is not None:
        features.grams, linear = features.grams.pruned(linear)
    mixture = fit_mixture({"linear": linear(features(inputs))}, classes)
    made = Classifier("a", "b", labels, features, linear, mixture)
    assert (made.linear_scores(inputs).argmax(1) == classes).mean() > 0.9
    save_classifiers([made], tmp_path)
    (again,) = load_classifiers(tmp_path)
    np.testing.assert_allclose(again.linear_scores(inputs), made.linear_scores(inputs), atol=0.02)
    assert again.mixture == mixture and again.labels == labels
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_log_softmax_agrees_with_scipy() -> None:
    from scipy.special import log_softmax as theirs

    scores = RNG.normal(size=(5, 7)) * 50
    np.testing.assert_allclose(log_softmax(scores), theirs(scores, axis=1))


def test_chances_of_an_n_gram_model_sum_to_one() -> None:
    model = GramModel(b"the cat sat on the mat and the rat sat on the cat " * 3)
    before = b"the rat sat"
    chances = [np.exp(model.nats(before) - model.nats(before + bytes([byte]))) for byte in range(256)]
    assert sum(chances) == pytest.approx(1)
    assert int(np.argmax(chances)) == ord(" ")


def test_a_space_that_learnt_nothing_is_not_trusted() -> None:
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    media, related = unit(RNG.normal(size=(300, 16))), np.eye(300, dtype=bool)
    assert measure_space(unit(RNG.normal(size=(300, 16))), media, related).trust < 0.03
    good = measure_space(unit(media + RNG.normal(size=media.shape) * 0.05), media, related)
    assert good.trust > 0.9 and good.unrelated < 0.6


def test_the_verdict_says_what_counts() -> None:
    def verdict(value: float, other: float, guess: float = 0.1) -> str:
        outcome = Outcome("recognition", "label from image", "right", value, 0.02, 500, guess, "an SVM", other, 0.02,
                          confused=[("cat", "dog")])  # fmt: skip
        found = make_verdict([outcome])
        assert found is not None
        return f"{found.learnt} {found.better} {found}"

    assert verdict(0.61, 0.5) == (
        "True True 61.0% right (label from image, 500 records, likely 57.0% to 64.8%), against 50.0% of an SVM: "
        "worth it. Next: more records of what is confused most (cat taken for dog), or train longer (--minutes)."
    )
    assert verdict(0.61, 0.6).startswith("True None 61.0% right") and "cannot tell" in verdict(0.61, 0.6)
    assert "which is better" in verdict(0.5, 0.6) and verdict(0.5, 0.6).startswith("True False")
    assert verdict(0.11, 0.6).startswith("False False Nothing was learnt")
    assert make_verdict([]) is None
    heart = ByHeart(0.03, 6.1)
    outcome = Outcome("language", "text", "bits a byte", 8.2, 0.1, 150, 8.0, higher_is_better=False, share=False,
                      unit="bytes", by_heart=heart)  # fmt: skip
    found = make_verdict([outcome])
    assert found is not None and not found.learnt
    assert "learnt by heart: 0.03 nats a token" in str(found) and "--init-from" in str(found)
    assert "--minutes" not in str(found) and "--init-from" not in ByHeart(0.03, 6.1, pretrained=True).advice


def test_a_classifier_that_learnt_nothing_says_so() -> None:
    labels, classes = ["a", "b"], np.arange(200) % 2
    texts = [f"word{RNG.integers(0, 50)} word{RNG.integers(0, 50)}" for _ in classes]
    features = Features.fit("text", texts)
    linear = fit_linear(features(texts), classes, 2, 0.1, False)
    mixture = fit_mixture({"linear": linear(features(texts))}, classes)
    for accuracy, words in ((0.52, "nothing was learnt"), (0.7, "70.0% of 200 validation records right")):
        made = Classifier("x", "y", labels, features, linear, mixture, False, {"mixed": accuracy}, 0.5, 200)
        assert words in describe(made)


@pytest.mark.parametrize("each", [1, 2, 5])
def test_few_examples_of_each_label_are_enough_to_answer_and_to_be_measured(
    each: int, plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"tea": "a warm cup of tea", "bus": "the late bus to town", "rain": "heavy rain all day"}
    rows = [
        f"{text} {n},{label}\n" for label, text in words.items() for n in ("one", "two", "three", "four", "five")[:each]
    ]
    (tmp_path / "few.csv").write_text("text,label\n" + "".join(rows))
    run = tmp_path / "run"
    assert plait("train", tmp_path / "few.csv", "-o", run, "--steps", 2) == 0
    model = package.load(run)
    found = model.classify("the bus comes late again")
    assert found[0].label == "bus" and sum(one.probability for one in found) == pytest.approx(1)
    assert not found.none_of_these  # so few records cannot say what is unlike all of them
    capsys.readouterr()
    assert plait("evaluate", run) == 0
    shown = " ".join(capsys.readouterr().out.split())
    accuracy = package.Run(run).evaluate(progress=False)["recognition/text-label/accuracy"]
    assert accuracy.n == 3 * each  # every record, by folds
    assert accuracy.value == (0 if each == 1 else 1)
    assert accuracy.low is not None and accuracy.high is not None and accuracy.high - accuracy.low > 0.2
    assert "which is what answers here" in shown or each == 1


def write_arrows(folder: Path, count: int = 240) -> None:
    """Arrows that point left or right, and up: mirrored, two of the three mean something else."""
    for number in range(count):
        kind = ("left", "right", "up")[number % 3]
        pixels = RNG.integers(0, 60, (16, 16), dtype=np.uint8)
        top, side = RNG.integers(0, 6, 2)
        for k in range(5):
            pixels[top + 4 - k : top + 6 + k, side + k] = 255
        value = {"left": pixels, "right": pixels[:, ::-1], "up": pixels.T}[kind]
        path = folder / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(value)).save(path)


def test_labelled_images_are_recognised_and_evaluated(
    plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_arrows(tmp_path / "arrows")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {backbone: {width: 32, layers: 1, heads: 2, context: 64}, image: {stem: 8}}\n"
        "training: {task: recognise, steps: 12, recogniser_steps: 60}\n"
    )
    run = tmp_path / "run"
    assert plait("train", tmp_path / "arrows", "-o", run, "--recipe", recipe) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Task: recognise" in told and "mirrored images mean something else" in told
    assert "label from image:" in told and "validation records right" in told
    assert not (run / "codecs").exists()  # nothing is drawn

    model = package.load(run)
    found = model.classify(tmp_path / "arrows" / "left" / "0.png")
    assert found[0].label == "left" and sum(one.probability for one in found) == pytest.approx(1)
    assert 0 <= (found.ood_score or 0) <= 1
    noise = model.classify(Image.fromarray(RNG.integers(0, 255, (16, 16), dtype=np.uint8)))
    assert noise.ood_score is not None and noise.ood_score >= found.ood_score - 0.5

    assert plait("evaluate", run) == 0
    out, err = (" ".join(text.split()) for text in capsys.readouterr())
    assert "right (label from image" in out and "plait export --to html" in err
    metrics = json.loads((run / "metrics.json").read_text())
    dataset = Dataset.open(run / "data")
    test = [dataset.record(int(i)) for i in dataset.indices("test")]
    right = [model.classify(one.parts["image"])[0].label == one.parts["label"] for one in test]
    assert metrics["recognition/image-label/accuracy"]["value"] == pytest.approx(np.mean(right))
    assert np.mean(right) > 0.8

    explained = model.explain(tmp_path / "arrows" / "left" / "0.png")  # the answer of `classify`, and how likely it is
    assert explained.answer == "left" and explained.chance == pytest.approx(found[0].probability, abs=1e-4)
    assert not any("none of these" in warning for warning in explained.warnings)
    model.checkpoint.classifiers[0].mixture.threshold = -1.0  # whatever is asked about is unlike all labels
    explained = model.explain(tmp_path / "arrows" / "left" / "0.png")
    assert "none of these" in explained.warnings[0] and explained.answer == "left"

    check_served_for_labels_alone(run, (tmp_path / "arrows" / "left" / "0.png").read_bytes())


def check_served_for_labels_alone(run: Path, image: bytes) -> None:
    """A run that names images refuses what it can only answer with nonsense, and says what to send instead."""
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}}
    with Server.start(run.parent / "log", run) as server:
        for path, body, told in (
            ("plait/classify", {"input": "rain"}, "send the content, as a part of type image_url"),
            ("plait/classify", {"input": [{"type": "text", "text": "left/0.png"}]}, "not texts"),
            ("plait/classify", {"inputs": [part, "left/0.png"]}, "not texts"),
            ("plait/classify", {"input": [part, part]}, "as `inputs`"),
            ("chat/completions", {"messages": [{"role": "user", "content": [part]}]}, "/v1/plait/classify"),
            ("completions", {"prompt": "left"}, "/v1/plait/classify"),
            ("responses", {"input": "left"}, "/v1/plait/classify"),
        ):
            status, answer = server.post(f"/v1/{path}", body)
            assert status == 400 and told in answer["error"]["message"], answer
        status, answer = server.post("/v1/plait/classify", {"inputs": [part, part]})
        assert status == 200 and [one["data"][0]["label"] for one in answer["results"]] == ["left", "left"]
        (card,) = json.loads(server.ask("GET", "/v1/models")[2])["data"]
    words = {"generate", "describe", "transcribe"}
    toolbox = Toolbox({"run": package.load(run)})
    assert toolbox.models_with("classify") and not any(toolbox.models_with(verb) for verb in words)
    toolbox.close()
    for verbs in (card["verbs"], Models().verbs(run)):  # of the server, and of the studio
        assert "classify" in verbs and not words & set(verbs)


def test_the_task_is_seen_in_the_data(plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = "question,reply\n" + "".join(f"how is number {i},it is {i * 7}\n" for i in range(30))
    labelled = "said,wish\n" + "".join(f"number {i} please,{('tea', 'milk')[i % 2]}\n" for i in range(40))
    for name, content, task in (("pairs", pairs, "reply"), ("wishes", labelled, "recognise")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.csv").write_text(content)
        assert plait("prepare", tmp_path / name, "-o", tmp_path / f"{name}.data", "--workers", 0) == 0
        derived = derive(Dataset.open(tmp_path / f"{name}.data"), Recipe())
        assert derived.task == task == derived.recipe.training.task
        assert derive(Dataset.open(tmp_path / f"{name}.data"), derived.recipe).recipe == derived.recipe
    assert derived.recipe.training.weights == {"said": 0}
    assert plait("train", tmp_path / "pairs.data", "-o", tmp_path / "run", "--task", "recognise") == 1
    assert "no column of labels" in " ".join(capsys.readouterr().err.split())
    assert plait("train", tmp_path / "pairs.data", "-o", tmp_path / "run", "--minutes", 1, "--steps", 2) == 1
    assert "exclude each other" in " ".join(capsys.readouterr().err.split())


def test_a_cap_ends_training_before_its_steps(plait: Plait, tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text("text\n" + "".join(f"line {i} of a text\n" for i in range(60)))
    recipe = tmp_path / "recipe.yaml"
    for minutes, kept in ((0.02, False), (60, True)):
        steps = 100_000 if not kept else 5
        recipe.write_text(f"training: {{task: language, steps: {steps}, max_minutes: {minutes}}}\n")
        run = tmp_path / f"run-{minutes}"
        assert plait("train", tmp_path / "text.csv", "-o", run, "--recipe", recipe) == 0
        facts = json.loads((run / "run.json").read_text())
        ended = (facts.get("revisions") or [facts])[-1]["steps"]
        assert (ended == steps) is kept and ended <= steps


def test_what_to_expect_is_of_the_most_similar_data() -> None:
    assert "63% right after 4 minutes" in (expectation("image", 900, 10) or "")
    short = expectation("image", 900, 10, seconds=5) or ""
    assert "58% right after 20 s" in short and "5 s are less" in short and "4 minutes gave 63% right there" in short
    enough = expectation("image", 900, 10, seconds=240) or ""
    assert "63% right after 4 minutes" in enough and "there." not in enough
    language = expectation("language", 1, 1, seconds=60) or ""
    assert "1.84 nats a character after 60 s" in language and "6 minutes gave 1.68" in language
    few = expectation("image", 90, 10) or ""
    assert "far fewer" in few
    assert "77 intents" in (expectation("text", 9000, 60) or "")
    assert expectation("video", 100, 2) is None


def test_guessing_among_fewer_items_than_are_named_is_always_right() -> None:
    assert HR_10.chance(np.array([4, 4])) == 1.0
    assert HR_10.chance(np.array([20, 100])) == pytest.approx((10 / 20 + 10 / 100) / 2)


def test_a_text_run_that_learnt_nothing_says_so_when_it_ends(
    plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (f"the {('cat', 'dog', 'cow')[i % 3]} number {i % 7} sits on the mat\n" for i in range(120))
    (tmp_path / "text.csv").write_text("text\n" + "".join(lines))
    for steps, told in ((1, True), (60, False)):
        assert plait("train", tmp_path / "text.csv", "-o", tmp_path / f"run{steps}", "--steps", steps) == 0
        assert ("Nothing was learnt" in " ".join(capsys.readouterr().out.split())) is told
    assert "nothing was learnt" in describe_space(SpaceQuality(0.0, 0.1, 30))
    assert "40%" in describe_space(SpaceQuality(0.4, 0.1, 30))


def test_the_strength_of_texts_is_the_likeliest_and_keeps_its_time() -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(400) % 4
    words = [[f"w{kind}{n}" for n in range(6)] + [f"x{n}" for n in range(20)] for kind in range(4)]
    texts = [" ".join(rng.choice(words[kind], 6)) for kind in classes]
    train, held = np.arange(400) < 280, np.arange(400) >= 280
    features = NgramFeatures.fit([text for text, here in zip(texts, train, strict=True) if here])
    rows, held_rows = (features([texts[i] for i in np.flatnonzero(part)]) for part in (train, held))
    arguments = (rows, classes[train], held_rows, classes[held], 4, True)
    choice = choose_linear(*arguments)
    truth, losses = classes[held], {}
    for strength in STRENGTHS:  # an independent likelihood: the best of many factors of the scores
        scores = fit_linear(rows, classes[train], 4, strength, False)(held_rows)
        losses[strength] = min(log_loss(truth, softmax(scores * factor, 1)) for factor in np.geomspace(0.1, 30, 200))
    best = min(losses, key=losses.__getitem__)
    assert choice.strength <= best and losses[choice.strength] < losses[best] + 0.02 and not choice.balanced
    assert not choice.untried
    hurried = choose_linear(*arguments, seconds=0.0)
    assert hurried.strength == STRENGTHS[0] and hurried.untried == STRENGTHS[1:]
