"""A whole classifier for other programs: the same answers from ONNX, from a folder, and in a browser."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import plait as package
from plait.hf.classifier_graph import AudioFeatures, ClassifierGraph, ImageFeatures
from plait.inference.opinions import novelty_scores, opinion_scores
from plait.modalities.simple_features import audio_features, image_features

Plait = Callable[..., int]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 200)}
RECIPE = {"model": {"backbone": {"width": 32, "layers": 1, "heads": 2, "context": 128}},
          "training": {"task": "recognise", "steps": 20, "recogniser_steps": 30}}  # fmt: skip


def make_images(folder: Path, each: int = 40) -> None:
    rng = np.random.default_rng(0)
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for n in range(each):
            pixels = np.clip(rng.normal(colour, 40, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{n}.png")


def make_audio(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for label, tone in (("low", 300), ("high", 1500)):
        (folder / label).mkdir(parents=True)
        for n in range(40):
            time = np.arange(int(8000 * rng.uniform(0.25, 0.5))) / 8000
            wave = np.sin(2 * np.pi * tone * rng.uniform(0.9, 1.1) * time) + rng.normal(0, 0.3, len(time))
            soundfile.write(folder / label / f"{n}.wav", 0.2 * wave, 8000)


@pytest.fixture(scope="module", params=["image", "audio"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    {"image": make_images, "audio": make_audio}[request.param](place / "files")
    package.train(place / "files", place / "run", recipe=RECIPE, progress=False)
    return place / "run"


def test_the_graph_looks_at_the_views_that_we_look_at(run: Path) -> None:
    model = package.load(run).plait_model
    assert model is not None
    modality = model.modality(model.checkpoint.classifiers[0].source)
    if modality.variable_length:
        pytest.skip("images alone have views")
    rng = np.random.default_rng(1)
    for mirrored in (False, True):
        classifier = dataclasses.replace(model.checkpoint.classifiers[0], mirrored=mirrored)
        graph = ClassifierGraph(classifier, modality).eval()
        for _ in range(3):
            pixels = rng.integers(0, 256, (24, 24, 3), np.uint8)
            sample = modality.windows(Image.fromarray(pixels))[0]
            with torch.inference_mode():
                views = graph._views(torch.from_numpy(sample)[None])
                found = {name: graph._opinion(name, views).numpy() for name in ("linear", "network")}
            for name, expected in opinion_scores(model, classifier, [sample], list(found)).items():
                np.testing.assert_allclose(found[name], expected, atol=1e-4)


def test_onnx_and_a_folder_answer_alike(run: Path, plait: Plait, capsys: pytest.CaptureFixture[str]) -> None:
    ort = pytest.importorskip("onnxruntime")
    place = run.parent
    assert plait("export", run, "--to", "onnx", "-o", place / "onnx") == 0
    assert plait("export", run, "--to", "folder", "-o", place / "folder") == 0
    model, copy = package.load(run), package.load(place / "folder")
    classifier = model.checkpoint.classifiers[0]
    facts = json.loads((place / "onnx" / "classifier.json").read_text())
    session = ort.InferenceSession(place / "onnx" / "classifier.onnx")
    classifier.mixture = copy.checkpoint.classifiers[0].mixture = classifier.portable
    for file in sorted((place / "files").rglob("*.*"))[::9]:
        if facts["kind"] == "image":
            given = {"pixels": np.asarray(Image.open(file), np.float32)[None]}
        else:
            wave, _ = soundfile.read(file, dtype="float32")
            filled = np.zeros((1, facts["samples"]), np.float32)
            filled[0, : len(wave)] = wave
            given = {"waveform": filled, "samples": np.array([len(wave)])}
        probabilities, ood_score = session.run(None, given)
        wanted = model.classify(file, top=None)
        by_label = dict(zip(facts["labels"], probabilities[0], strict=True))
        assert all(abs(by_label[one.label] - one.probability) < 1e-3 for one in wanted)
        assert 0 <= ood_score[0] <= 1
        assert [tuple(one) for one in copy.classify(file, top=None)] == [tuple(one) for one in wanted]
    for name in ("onnx", "folder"):
        card = (place / name / "README.md").read_text()
        for part in (
            "Splits: train ",
            "Labels of `label`: ",
            "## Figures",
            "validation records, by which it was also chosen and calibrated",
            "## Limits",
            "## Licences",
        ):
            assert part in card, part
    assert str(place) not in card  # folders of its owner's machine are nobody's business
    kept = {path.name for path in (place / "folder").iterdir()}
    assert "model.safetensors" in kept and not [name for name in kept if "optimizer" in name]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (place / "folder").iterdir())
    size = (place / "folder" / "model.safetensors").stat().st_size
    assert size < (run / "checkpoints" / "best" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("frames", [1, 3, 17, 41, 120])
@pytest.mark.parametrize("constant", [False, True])
def test_features_of_audio_are_those_of_the_graph(frames: int, constant: bool) -> None:
    """Of clips of one level too, which are nowhere louder, and of clips shorter than what is compared."""
    rng = np.random.default_rng(frames)
    sample = np.full((frames, 64), 0.37) if constant else rng.normal(size=(frames, 64))
    sample = sample.astype(np.float16)
    padded = torch.full((1, 160, 64), -1.4)
    padded[0, :frames] = torch.from_numpy(sample).float()
    found = audio_features([sample], 64)[0]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(AudioFeatures(64)(padded, torch.tensor([frames]))[0].numpy(), found, atol=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [24, 32, 96])
def test_features_do_not_hang_on_rounding(side: int, channels: int, tmp_path: Path) -> None:
    """Flat areas, equal gradients in several channels, single steps: where a choice could go either way."""
    ort = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(side)
    steps = rng.integers(0, 3, (12, side, side, channels)) + rng.integers(0, 250, (12, 1, 1, channels))
    steps[:4, : side // 2] = steps[:4, :1, :1]
    pixels = steps.astype(np.uint8)
    graph = ImageFeatures(side, side, channels).eval()
    torch.onnx.export(
        graph, (torch.zeros(1, side, side, channels),), str(tmp_path / "x.onnx"), dynamo=False, opset_version=17,
        input_names=["x"], output_names=["y"],
    )  # fmt: skip
    session = ort.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    found = np.concatenate([session.run(None, {"x": one[None].astype(np.float32)})[0] for one in pixels])
    assert np.abs(found - image_features(list(pixels))).max() < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.skipif("ORT_WEB" not in os.environ, reason="ORT_WEB names no folder with onnxruntime-web's dist")
def test_the_example_page_answers_alike_in_a_browser(run: Path, plait: Plait) -> None:
    api = pytest.importorskip("playwright.sync_api")
    place, site = run.parent, run.parent / "site"
    assert plait("export", run, "--to", "onnx", "-o", site) == 0
    assert (site / "classifier.onnx").stat().st_size < 5e6
    shutil.copytree(os.environ["ORT_WEB"], site / "ort")
    model = package.load(run)
    classifier = model.checkpoint.classifiers[0]
    classifier.mixture = classifier.portable
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
            times = []
            for file in sorted((place / "files").rglob("*.*"))[::13]:
                page.set_input_files("#file", file)
                page.wait_for_selector("#answer td", timeout=60_000)
                found = page.evaluate("window.classify(document.querySelector('#file').files[0])")
                wanted = {one.label: one.probability for one in model.classify(file, top=None)}
                differences = [abs(wanted[label] - p) for label, p in
                               zip(classifier.labels, found["probabilities"], strict=True)]  # fmt: skip
                assert max(differences) < 1e-3
                times.append(found["milliseconds"])
            (place / "figures.txt").write_text(f"{np.median(times):.1f} ms")
            browser.close()
    finally:
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_offline_page_tells_what_is_like_no_label_and_keeps_no_old_answer(tmp_path: Path, plait: Plait) -> None:
    api = pytest.importorskip("playwright.sync_api")
    make_images(tmp_path / "files", each=100)
    run = package.train(tmp_path / "files", tmp_path / "run", recipe=RECIPE, progress=False).folder
    model = package.load(run).plait_model
    assert model is not None
    classifier = model.checkpoint.classifiers[0]
    assert plait("export", run, "--to", "html", "-o", tmp_path / "page") == 0
    rng, new = np.random.default_rng(3), tmp_path / "new"
    new.mkdir()
    checks = (np.indices((24, 24)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(np.repeat(checks[..., None], 3, 2)).save(new / "checks.png")
    Image.fromarray(np.clip(rng.normal(COLOURS["red"], 40, (24, 24, 3)), 0, 255).astype(np.uint8)).save(new / "red.png")
    (new / "broken.png").write_bytes(b"no image")
    samples = [model.modality("image").windows(Image.open(new / name))[0] for name in ("red.png", "checks.png")]
    strange = novelty_scores(model, dataclasses.replace(classifier, novelty={"network": classifier.novelty["network"]}),
                             samples)[0]  # fmt: skip
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto((tmp_path / "page" / "classifier.html").as_uri())
        assert all(label in page.inner_text("body") for label in COLOURS)
        code = (
            "(p) => { const o = logits(Uint8ClampedArray.from(p)); "
            "return novelty(o.seen, o.after, FACTS.familiarity.novelty); }"
        )
        found = [page.evaluate(code, sample.ravel().tolist()) for sample in samples]
        assert found == pytest.approx(strange.tolist(), abs=1e-3)
        expected = (("red.png", "red", 3), ("broken.png", "is no image", 0), ("checks.png", "None of", 3))
        for name, answer, bars in expected:
            page.set_input_files("#file", new / name)
            api.expect(page.locator("#answer")).to_contain_text(answer)
            assert page.locator("#bars tr").count() == bars
        browser.close()
