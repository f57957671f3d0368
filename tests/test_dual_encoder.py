"""Two encoders joined in one space, with tiny random ones: what was learnt about images holds for texts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import plait as library
from conftest import make_image
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.hf.contrastive import Pairs
from plait.hf.dual_encoder import PairFeatures, _Sampler
from plait.hf.hub import encoder_names
from test_heads import bert, vit  # noqa: F401 (fixtures)

Plait = Callable[..., int]
SAID = ("a cat on the mat", "one small dog", "this photo", "user describe image")  # of each kind of image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images with two captions each, a row a caption."""
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption"])
        for n in range(80):
            make_image(n % 4, rng).resize((32, 32)).save(folder / f"{n}.png")
            for number in range(2):
                table.writerow([f"{n}.png", f"{SAID[n % 4]} word{n} {number}"])
    return folder


def test_two_encoders_learn_one_space(
    photos: Path, bert: Path, vit: Path, tmp_path: Path, plait: Plait,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, names = tmp_path / "run", f"{vit},{bert}"
    assert plait("train", photos, "-o", run, "--init-from", names, "--steps", 60) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "both frozen, projected into one space; of" in told and "texts of val" in told
    assert plait("train", photos, "-o", run, "--init-from", names, "--steps", 60) == 0
    assert "already trained" in capsys.readouterr().out
    model, rng = library.load(run), np.random.default_rng(9)
    asked = [make_image(kind, rng).resize((32, 32)) for kind in range(4)]
    labels = list(SAID)
    assert [answer[0].label for answer in model.classify(asked, labels=labels, template="{}")] == labels
    mixed = model.embed([asked[0], labels[0], asked[1]])  # images and texts keep their places
    apart = np.concatenate([model.embed([one]) for one in (asked[0], labels[0], asked[1])])
    assert np.allclose(mixed, apart, atol=1e-5) and np.allclose(np.linalg.norm(mixed, axis=1), 1, atol=1e-5)
    again = library.train(photos, tmp_path / "again", init_from=names, steps=60, progress=False)
    assert np.array_equal(again.model().embed([labels[0]]), model.embed([labels[0]]))
    assert plait("evaluate", run) == 0
    figures = read_json(run / "metrics.json")
    assert figures["retrieval/caption-image/r_at_10"]["value"] > figures["retrieval/caption-image/r_at_10"]["chance"]
    with pytest.raises(PlaitError, match="not explained"):
        model.explain(asked[0], labels=labels)
    broken = tmp_path / "broken.png"
    broken.write_bytes((photos / "0.png").read_bytes()[:200])
    capsys.readouterr()
    assert plait("embed", run, broken) == 1 and plait("classify", run, broken, "--labels", "a,b") == 1
    assert capsys.readouterr().err.count(f"{broken}: damaged png") == 2
    for odd in ((np.zeros(800, np.float32), 8000), 3):
        with pytest.raises(PlaitError, match="of kind image is wanted"):
            model.embed([odd])
    assert plait("index", "add", tmp_path / "index", photos, "--model", run) in (0, 2)


def test_the_best_start_of_captioned_images_is_a_pair(
    photos: Path, bert: Path, vit: Path, tmp_path: Path, plait: Plait,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "vit").symlink_to(vit)
    options = ("--models", shelf, "--steps", 2, "--start", "best")
    assert plait("train", photos, "-o", tmp_path / "none", *options) == 1  # an encoder of texts is not there
    (shelf / "bert").symlink_to(bert)
    capsys.readouterr()
    assert plait("train", photos, "-o", tmp_path / "run", *options) == 0
    assert "to be joined in one space" in " ".join(capsys.readouterr().out.split())
    config = read_json(tmp_path / "run" / "checkpoints" / "best" / "config.json")
    assert [Path(config[kind]["encoder"]).name for kind in ("image", "text")] == ["vit", "bert"]


def test_an_encoder_in_the_wrong_place_is_told(photos: Path, bert: Path, vit: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(PlaitError, match="image processor"):
        library.train(photos, tmp_path / "a", init_from=f"{bert},{bert}", progress=False)
    with pytest.raises(PlaitError, match="is no encoder of texts: "):
        library.train(photos, tmp_path / "b", init_from=f"{vit},{vit}", progress=False)
    (tmp_path / "texts.csv").write_text("text\n" + "\n".join(f"one more line {n}" for n in range(40)))
    with pytest.raises(PlaitError, match="has no images"):
        library.train(tmp_path / "texts.csv", tmp_path / "d", init_from=f"{vit},{bert}", progress=False)
    with pytest.raises(PlaitError, match="do not draw"):
        library.train(photos, tmp_path / "e", init_from=f"{vit},{bert}", task="draw", progress=False)
    with pytest.raises(PlaitError, match="no space to meet in"):
        recipe = {"model": {"embed_dim": 0}}
        library.train(photos, tmp_path / "f", init_from=f"{vit},{bert}", recipe=recipe, progress=False)
    with pytest.raises(PlaitError, match="no folder"):
        library.train(photos, tmp_path / "c", init_from=f"{vit},nowhere at all", progress=False)


def test_a_comma_in_the_name_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    assert encoder_names(str(tmp_path / "a,b")) is None and encoder_names("owner/name") is None
    assert encoder_names("vision, owner/text") == ("vision", "owner/text")


@pytest.mark.parametrize("name", [",bert", "vit,", "a,b,c", ","])
def test_other_than_two_names_are_refused(
    name: str, photos: Path, tmp_path: Path, plait: Plait, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plait("train", photos, "-o", tmp_path / "run", "--init-from", name) == 1
    assert f"--init-from {name}: write VISION,TEXT" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(PlaitError, match="write VISION,TEXT"):
        library.train(photos, tmp_path / "run", init_from=name, progress=False)


def test_a_pair_needs_an_image_and_a_text(photos: Path, bert: Path, vit: Path, tmp_path: Path) -> None:  # noqa: F811
    source = tmp_path / "records.jsonl"
    with source.open("w") as file:
        for n in range(80):  # the captions of most stand alone
            image = {"image": str(photos / f"{n}.png")} if n < 20 else {}
            file.write(json.dumps({**image, "caption": f"{SAID[n % 4]} word{n}"}) + "\n")
    names = {"init_from": f"{vit},{bert}", "steps": 2, "progress": False}
    run = library.train(source, tmp_path / "run", recipe={"model": {"embed_dim": 16}}, **names)
    pairs = [Pairs.of(run.dataset, split) for split in ("train", "val", "test")]
    assert sum(map(len, pairs)) == 20
    assert all(len(pair.read(np.arange(len(pair)), np.zeros(len(pair)))[0]) == len(pair) for pair in pairs)
    assert run.model().embed([SAID[0]]).shape == (1, 16)


def test_an_epoch_has_each_image_once_with_a_text_of_its_own() -> None:
    image_of, text_of = np.array([2, 0, 1, 2, 0, 3, 3]), np.arange(7)
    sampler = _Sampler(PairFeatures(np.zeros((4, 2)), np.zeros((7, 2)), image_of, text_of), 0, 2, 2)
    seen = set()
    for epoch in range(20):
        images, views, texts = (
            np.concatenate(part) for part in zip(*(sampler.draw(2 * epoch + i) for i in range(2)), strict=True)
        )
        assert sorted(images) == [0, 1, 2, 3] and set(views) <= {0, 1}
        assert (image_of[texts] == images).all()
        seen |= set(texts)
    assert seen == set(range(7))
