"""Inputs mean what they look like: files, folders, batches, arrays, waveforms; a text over a network opens no file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plait.core.errors import PlaitError
from plait.modalities.audio_files import encode_wav
from plait.modalities.inputs import as_audio, as_image, inputs_of, media_or_text, medium_of

RED = np.zeros((4, 6, 3), np.uint8) + np.array([200, 10, 20], np.uint8)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in ("b.png", "a.png", "more/c.JPG", ".hidden.png"):
        Image.fromarray(RED).save(tmp_path / "photos" / name, "PNG")
    (tmp_path / "photos" / "notes.txt").write_text("no medium")
    (tmp_path / "plain").write_text("a file without an ending")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_texts_files_and_folders(files: Path) -> None:
    assert media_or_text("photos/a.png") == Path("photos/a.png")
    assert media_or_text(str(files / "photos/b.png")) == files / "photos/b.png"
    for text in (
        "three",
        "runs",
        "either/or",
        "I like photos/a.png",
        "see e.g. this.png",
        "x" * 5000,
        "a\nb.png",
        "",
    ):
        assert media_or_text(text) == text
    (files / "runs").mkdir()  # a folder without media is no input: its name is a word
    assert media_or_text("runs") == "runs"
    assert media_or_text("photos") == Path("photos") and inputs_of("photos").values == inputs_of("photos/").values
    for missing in ("nothing.png", "./nothing.txt", "/tmp/no/such.wav", "photos/z.mp3"):
        with pytest.raises(PlaitError, match="does not exist"):
            media_or_text(missing)
    folder = inputs_of("photos/")
    assert [str(path) for path in folder.values] == [
        f"photos{os.sep}{n}" for n in ("a.png", "b.png", f"more{os.sep}c.JPG")
    ]
    assert folder.several and not inputs_of("three").several and inputs_of(["three"]).several
    assert inputs_of(["three", "photos/"]).values == ["three", *folder.values]
    (files / "empty").mkdir()
    with pytest.raises(PlaitError, match="holds no images or audio"):
        inputs_of(files / "empty")
    assert medium_of("three") == Path("three")


@pytest.mark.parametrize(
    "value",
    [
        RED,
        RED / 255.0,
        torch.from_numpy(RED).movedim(-1, 0),
        torch.from_numpy(RED).movedim(-1, 0) / 255,
        RED.astype(int),
    ],
    ids=["uint8", "floats", "tensor", "float tensor", "integers"],
)
def test_arrays_and_tensors_are_images(value: object) -> None:
    np.testing.assert_array_equal(np.asarray(as_image(value)), RED)


@pytest.mark.parametrize(
    "value,words",
    [
        (np.zeros(9), "needs its rate"),
        (np.full((2, 2), -1.0), "0 to 1 as floats"),
        (np.full((2, 2), 300), "0 to 255 as integers"),
        (np.full((2, 2), np.nan), "no finite numbers"),
        (np.zeros((3, 4, 6)), r"shape \(3, 4, 6\)"),
        ((np.zeros(9), "8000"), r"A tuple \(ndarray, str\) is no input"),
        ((1, 2, 3), "A tuple"),
    ],
)
def test_what_is_no_input_is_refused(value: object, words: str) -> None:
    with pytest.raises(PlaitError, match=words):
        inputs_of(value)


def test_waveforms_in_either_order() -> None:
    wave = np.sin(np.arange(800) / 7).astype(np.float32) * 0.5
    for value in (
        (wave, 8000), (8000, wave), (torch.from_numpy(wave), np.int64(8000)), (np.stack([wave, wave]), 8000.0),
        (8000, np.stack([wave, wave], 1)), {"array": wave, "sampling_rate": 8000},
    ):  # fmt: skip
        found = as_audio(value)
        assert found is not None and found[1] == 8000
        np.testing.assert_allclose(found[0], wave, atol=1e-6)
    integers = as_audio((8000, (wave * 32768).astype(np.int16)))
    assert integers is not None and np.allclose(integers[0], wave, atol=1e-4)
    assert as_audio(("audio", wave)) is None and as_audio("text") is None


def test_verbs_take_them(files: Path, trained: Path) -> None:
    import plait

    model = plait.load(trained, "cpu")
    image = Image.fromarray(RED)
    image.save(files / "x.png")
    one = model.classify("x.png")
    assert one == model.classify(Path("x.png")) == model.classify(np.asarray(image)) == model.classify([image])[0]
    many = model.classify("photos/", top=None)
    assert [answer[0].label for answer in many] == [one[0].label] * 3
    assert abs(sum(p.probability for p in many[0]) - 1) < 1e-6
    with pytest.raises(PlaitError, match=r"y\.png does not exist"):
        model.classify("y.png")
    vector = model.embed("red disc")
    assert vector.ndim == 1 and np.allclose(vector, model.embed(["red disc", "x.png"])[0], atol=1e-6)
    assert np.allclose(model.embed("x.png"), model.embed([image])[0], atol=1e-6)
    # What comes over the network is a text, and opens no file.
    assert np.allclose(model.embed_inputs(["x.png"])[0], model.embed_inputs(["x.png"])[0])
    assert not np.allclose(model.embed_inputs(["x.png"])[0], model.embed("x.png"), atol=1e-3)
    wave = np.sin(np.arange(2000) / 3).astype(np.float32)
    assert np.allclose(model.embed((wave, 8000)), model.embed((8000, wave)), atol=1e-6)
    (files / "clip.wav").write_bytes(encode_wav(wave, 8000))
    assert model.transcribe("clip.wav") == model.transcribe(Path("clip.wav"))
    with pytest.raises(PlaitError, match="cannot be read"):
        model.describe("three")
