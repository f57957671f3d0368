"""Evaluation end to end on small untrained models: every direction is there, and figures are what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plait.core.config import parse_recipe
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.evaluation.tasks import Limits, evaluate
from plait.inference.model import PlaitModel
from plait.modalities.text import Text
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import Multimodal, collate
from plait.reports.report import RunInfo, write_metrics, write_report
from plait.training.batches import lm_windows
from plait.training.build import label_columns, model_config
from plait.training.losses import token_losses


def untrained(data: Path) -> tuple[PlaitModel, Dataset]:
    dataset = Dataset.open(data)
    texts = [t for c, kind in dataset.columns.items() if kind == "text" for t in dataset.texts(c) if t]
    text = Text.train(texts, 300)
    backbone = {"width": 32, "layers": 1, "heads": 2, "context": 64}
    recipe = parse_recipe({"model": {"backbone": backbone, "image": {"size": 16, "codec_width": 16}}}, "the test")
    torch.manual_seed(0)
    network = Multimodal(model_config(recipe, dataset, text.size, None)).eval()
    return PlaitModel(
        Checkpoint(network, text, label_columns(dataset, network.config.backbone.max_length)), "cpu"
    ), dataset


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random, rows = np.random.default_rng(0), []
    (folder / "files").mkdir()
    for i in range(120):
        colour = i % 3
        pixels = random.integers(0, 60, (16, 16, 3), np.uint8)
        pixels[..., colour] += 180
        Image.fromarray(pixels).save(folder / "files" / f"{i}.png")
        name = ["red", "green", "blue"][colour]
        split = ["train", "train", "val", "test"][i // 30]
        rows.append({"file_name": f"{i}.png", "colour": name, "caption": f"{name} image {i}", "split": split})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "files" / "metadata.jsonl").write_text(lines)
    prepare(folder / "files", folder / "data", workers=1)
    return folder / "data"


def test_every_direction_of_images_with_labels_and_captions(images: Path, tmp_path: Path) -> None:
    model, dataset = untrained(images)
    (image,) = (c for c, kind in dataset.columns.items() if kind == "image")
    found, findings = evaluate(model, dataset, reference_seconds=0.1, limits=Limits(made=6, records=20, written=5))
    directions = {f"{key.task}/{key.direction}" for key in found}
    assert {
        f"recognition/{image}-colour",
        f"transcription/{image}-caption",
        f"retrieval/{image}-colour",
        f"retrieval/caption-{image}",
        f"drawing/colour-{image}",
        f"codec/{image}",
        "timing/evaluation",
    } <= directions
    assert found[f"recognition/{image}-colour/accuracy"]["n"] == 20
    assert found[f"recognition/{image}-colour/accuracy"]["baseline"] == 1.0  # colours are easy for the judge
    assert found[f"drawing/colour-{image}/judge_real"]["value"] == 1.0
    assert found[f"drawing/colour-{image}/near_copies"]["n"] == 6
    assert found[f"transcription/{image}-caption/exact"]["value"] == 0
    assert found[f"retrieval/{image}-caption/r_at_1"]["chance"] > 0.2  # a third share the colour
    assert any("20 records of test" in note for note in findings.notes)
    write_metrics(tmp_path / "metrics.json", found)
    write_report(tmp_path / "report.html", found, findings, RunInfo())
    assert "training sample nearest to it" in (tmp_path / "report.html").read_text()


def test_language_agrees_with_the_training_objective(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(30):
        split = "test" if i < 4 else "train"
        (tmp_path / "texts" / split).mkdir(exist_ok=True)
        (tmp_path / "texts" / split / f"{i}.txt").write_text(f"The story of {i} begins. " * (i + 3))
    prepare(tmp_path / "texts", tmp_path / "data", workers=1)
    model, dataset = untrained(tmp_path / "data")
    (column,) = dataset.columns
    found, _ = evaluate(model, dataset)
    network, text = model.checkpoint.model, model.checkpoint.text
    nats = count = size = 0.0
    for i in dataset.indices("test"):
        written = dataset.texts(column)[i]
        assert written is not None
        size += len(written.encode())
        windows = lm_windows(text.encode(written), network.vocabulary.opener(column), network.vocabulary.end, 64)
        batch = collate(windows, {}, network.vocabulary.pad)
        with torch.no_grad():
            total, number = token_losses(network, network(batch), batch.targets)["text"]
        nats, count = nats + float(total), count + int(number)
    assert found[f"language/{column}/nats_per_token"]["value"] == pytest.approx(nats / count, rel=1e-4)
    assert found[f"language/{column}/nats_per_token"]["n"] == count
    assert found[f"language/{column}/bits_per_byte"]["value"] == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    assert found[f"language/{column}/nats_per_token"]["baseline"] < found[f"language/{column}/nats_per_token"]["chance"]


def test_a_dataset_of_other_columns_is_refused(images: Path, tmp_path: Path) -> None:
    model, _ = untrained(images)
    (tmp_path / "table.csv").write_text("question,answer\nwhat,this\nwho,that\n" * 5)
    prepare(tmp_path / "table.csv", tmp_path / "data", workers=1)
    with pytest.raises(PlaitError, match="no column of the model"):
        evaluate(model, Dataset.open(tmp_path / "data"), "train")


def test_figures_without_what_train_has_too(tmp_path: Path) -> None:
    """Ten of thirty test images are train's, five equal and five smaller: the others are the clean ones."""
    rows = []
    for i in range(90):
        train = i - 60 if 60 <= i < 70 else i
        small = np.random.default_rng(train).integers(0, 256, (6, 6, 3), np.uint8)
        image = Image.fromarray(small).resize((48, 48) if i < 65 else (32, 32), Image.Resampling.BICUBIC)
        image.save(tmp_path / f"{i}.png")
        split = "train" if i < 50 else "val" if i < 60 else "test"
        rows.append({"file_name": f"{i}.png", "label": "ab"[train % 2], "caption": f"number {i}", "split": split})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = prepare(tmp_path, tmp_path / "data", workers=0)
    assert manifest.overlap == {"test/train": 5} and manifest.near_duplicates == {"test/train": 5}
    model, dataset = untrained(tmp_path / "data")
    found, findings = evaluate(model, dataset, reference_seconds=0.1, limits=Limits(made=2, written=30))
    assert found["recognition/image-label/accuracy"]["n"] == 30
    names = ["recognition/image-label/accuracy", "transcription/image-caption/cer", "retrieval/image-caption/r_at_5"]
    assert [found[f"{name}_clean"]["n"] for name in names] == [20, 20, 20]
    assert any("figures named _clean" in note for note in findings.notes)
    whole, clean = (found[f"recognition/image-label/accuracy{end}"]["value"] for end in ("", "_clean"))
    assert abs(whole * 30 - clean * 20) <= 10
