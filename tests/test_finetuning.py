"""Going on from a trained model: what is old is kept, what is frozen stays to the bit, low-rank updates add up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from conftest import RECIPE, make_image
from plait.core.errors import PlaitError
from plait.data.dataset import ConcatDataset, Dataset
from plait.data.samples import Samples
from plait.data.tokens import Ids, Tokens
from plait.model import checkpoint as checkpoints
from plait.model import lora
from plait.model.cross_entropy import total_loss
from plait.model.multimodal import SplitTable
from plait.training.batches import Sampler
from plait.training.split import Split

Plait = Callable[..., int]
STEPS = {"steps": 8, "codec_steps": 3, "batch_size": 8, "validations": 2, "learning_rate": 3e-3}
NEW = ["green disc", "green bar", "black disc"]


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory, plait: Plait) -> Path:
    """A dataset with new names, under a new column, of images as the world has them; no audio."""
    place = tmp_path_factory.mktemp("new")
    rng = np.random.default_rng(1)
    rows = []
    for i in range(48):
        make_image(i % 4, rng).save(place / f"{i}.png")
        split = "test" if i % 6 == 5 else "val" if i % 6 == 4 else "train"
        rows.append({"image_file_name": f"{i}.png", "fr": NEW[i % 3], "split": split})
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plait("prepare", place, "-o", place / "data", "--workers", 0) == 0
    return place / "data"


@pytest.fixture(scope="module")
def base(world: Path, plait: Plait, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a short `run` of the world."""
    place = tmp_path_factory.mktemp("base")
    assert plait("prepare", world, "-o", place / "data", "--workers", 0) == 0
    recipe = {"model": yaml.safe_load(RECIPE)["model"], "training": STEPS}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert plait("train", place / "data", "-o", place / "run", "--recipe", place / "recipe.yaml") == 0
    return place


def recipe(folder: Path, **training: object) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"training": {**STEPS, **training}}))
    return file


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / name / "model.safetensors")


def test_what_is_new_is_added_and_what_is_frozen_stays(base: Path, new: Path, tmp_path: Path, plait: Plait) -> None:
    run = tmp_path / "run"
    frozen = ("--freeze", "encoder,backbone,token_embedding", "--init-from", base / "run")
    assert plait("train", new, "-o", run, "--recipe", recipe(tmp_path), *frozen) == 0
    was, now = checkpoints.load(base / "run/checkpoints/best"), checkpoints.load(run / "checkpoints/last")
    old, grown = was.model.vocabulary, now.model.vocabulary
    assert list(grown.columns) == [*old.columns, "fr"] and grown.levels == old.levels
    before, after = was.model.state_dict(), now.model.state_dict()
    for name in before:
        if not name.startswith(("token_embedding.free", "lm_head.free", "project", "logit_scale")):
            assert torch.equal(before[name], after[name]), name
    for table in ("token_embedding.free", "lm_head.free"):
        assert torch.equal(before[table][: old.opener("zh") + 1], after[table][: old.opener("zh") + 1])
        for kind, (start, stop) in old.id_ranges.items():
            if kind != "text":  # codes have moved up by the new column's token
                assert torch.equal(before[table][start:stop], after[table][start + 1 : stop + 1])
        assert not torch.equal(after[table][grown.opener("fr")], before[table].mean(0))
    assert now.labels["fr"] == sorted(NEW, key=now.labels["fr"].index) and now.labels["en"] == was.labels["en"]
    # What went in and what came out for the old columns is the same, to the bit.
    from plait.inference.model import PlaitModel

    image = make_image(0, np.random.default_rng(7))
    scores = [PlaitModel(one, "cpu").classify(image, column="en") for one in (was, now)]
    assert scores[0] == scores[1]


def test_low_rank_runs_keep_what_is_trained_alone_and_go_on_exactly(
    base: Path, new: Path, tmp_path: Path, plait: Plait
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    file = recipe(tmp_path, lora={"rank": 4, "alpha": 8}, save_every=4, ema=0.9, keep=9)
    source = shutil.copytree(base / "run", tmp_path / "source", symlinks=True)
    assert plait("train", new, "-o", whole, "--recipe", file, "--init-from", source) == 0
    shutil.copytree(whole, cut, symlinks=True)
    for folder in (cut / "checkpoints").glob("step-000008"):
        shutil.rmtree(folder)
    facts = json.loads((cut / "run.json").read_text())
    del facts["finished"]
    (cut / "run.json").write_text(json.dumps(facts))
    shutil.rmtree(source)  # a run that has begun no longer needs it
    assert plait("train", new, "-o", cut, "--recipe", file, "--init-from", source) == 0
    first, second = weights(whole), weights(cut)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    old, state = weights(base / "run", "best"), load_file(whole / "checkpoints/last/training_state.safetensors")
    name = "backbone.blocks.0.qkv"
    grown = checkpoints.load(whole / "checkpoints" / "last").model.vocabulary
    kept = {"backbone.final_norm.weight", f"{name}.weight", "token_embedding.text_rows"} & first.keys()
    assert not kept and len(first["token_embedding.free"]) == len(old["token_embedding.free"]) + 1 - grown.text
    assert not any(f"{name}.weight" in key for key in state)
    assert state["optimizer.exp_avg.token_embedding.free"].shape == first["token_embedding.free"].shape
    used = checkpoints.load(whole / "checkpoints" / "last").model.state_dict()
    update, heads = used[f"{name}.weight"] - old[f"{name}.weight"], 48
    parts = [2 * first[f"{name}.up.{i}"] @ first[f"{name}.down.{i}"] for i in range(3)]
    assert update[:heads].abs().max() > 0 and torch.allclose(update, torch.cat(parts), atol=1e-6)
    assert torch.equal(used["backbone.final_norm.weight"], old["backbone.final_norm.weight"])
    # Nothing of the base's content may be another.
    (cut / "base" / "manifest.json").unlink()
    with pytest.raises(PlaitError, match="which cannot be loaded"):
        checkpoints.load(cut / "checkpoints" / "last")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_layer_computes_what_the_merged_one_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 20)
    linear.weight.data = linear.weight.data.to(dtype)
    parts = [lora.Part(0, 8, 3, 2.0), lora.Part(8, 12, 2, 0.5), lora.Part(16, 20, 1, 1.0)]
    layer = lora.LowRank(linear, parts)
    for up in layer.up:
        nn.init.normal_(up)
    x = torch.randn(7, 12, requires_grad=True)
    apart = layer(x)
    apart.square().sum().backward()
    whole = linear.weight.detach().float().clone()
    dense = [up.detach().requires_grad_() for up in layer.up], [down.detach().requires_grad_() for down in layer.down]
    added = whole.clone()
    for part, up, down in zip(parts, *dense, strict=True):
        rows = torch.zeros(20, 12).index_add(0, torch.arange(part.start, part.stop), part.scale * up @ down)
        added = added + rows
    again = x.detach().requires_grad_()
    plain = again @ added.t() + linear.bias.detach()
    plain.square().sum().backward()
    assert torch.allclose(apart, plain, atol=1e-5) and torch.allclose(x.grad, again.grad, atol=1e-4)
    for mine, theirs in zip([*layer.up, *layer.down], [*dense[0], *dense[1]], strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-4)
    assert torch.allclose(layer.merged()(x), apart, atol=1e-5) and layer.weight.grad is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_over_frozen_rows_is_that_over_all(smoothing: float) -> None:
    torch.manual_seed(0)
    frozen, rest = torch.randn(9000, 16).bfloat16(), torch.randn(7, 16)
    hidden, targets = torch.randn(200, 16), torch.randint(9007, (200,))
    found = []
    for split in (True, False):
        states, rows = hidden.clone().requires_grad_(), rest.clone().requires_grad_()
        table = SplitTable(frozen, rows) if split else torch.cat((frozen.float(), rows))
        loss = total_loss(states, table, targets, smoothing)
        loss.backward()
        found.append((loss, states.grad, rows.grad))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(total_loss(hidden, SplitTable(frozen, rest), targets, smoothing), found[0][0])


def test_replay_takes_its_share_of_every_batch(base: Path, new: Path, tmp_path: Path, plait: Plait) -> None:
    both = ConcatDataset([Dataset.open(new), Dataset.open(base / "data")])
    train = both.indices("train")
    assert len(train) == sum(len(one.indices("train")) for one in both.datasets)
    assert both.texts("fr")[int(both.indices("test")[-1])] is None and both.texts("fr")[0] in NEW
    records = list(both.iterate(train[[0, -1]]))
    assert ("fr" in records[0].parts and "en" in records[1].parts) or "zh" in records[1].parts
    one_each = Samples(np.ones(len(train), np.uint16), np.arange(len(train) + 1))
    tokens = Tokens(one_each, np.arange(len(train)))
    split = Split(
        Ids([pa.array([str(i) for i in train], pa.string())]), {"t": tokens}, {}, {}, sources=both.source(train)
    )
    from plait.modalities.base import Vocabulary

    words = Vocabulary(text=300, columns={"t": "text"}, levels={}, closers=[])
    sampler = Sampler(split, words, {}, 10, 64, 0, 0.0, False, shares=[0.3])
    seen: list[int] = []
    for step in range(40):
        _, items = sampler.members(step)
        sources = split.sources[items[:, 0]]
        assert (sources == 0).sum() == 7 and (sources == 1).sum() == 3
        seen += items[sources == 1, 0].tolist()
        assert np.array_equal(items, Sampler(split, words, {}, 10, 64, 0, 0.0, False, shares=[0.3]).members(step)[1])
    assert len(set(seen)) == len(seen)  # none twice in an epoch
    parts = [sampler.step(3, part, 4).records for part in range(4)]  # as four processes share a step
    assert np.array_equal(np.concatenate(parts), sampler.step(3).records)
    run = tmp_path / "run"
    more = ("--init-from", base / "run", "--replay", f"{base / 'data'}=0.5")
    assert plait("train", new, "-o", run, "--recipe", recipe(tmp_path), *more) == 0
    config = json.loads((run / "checkpoints/best/config.json").read_text())
    assert config["labels"]["en"] and config["labels"]["fr"]
    assert plait("train", new, "-o", run, "--recipe", recipe(tmp_path), *more) == 0  # finished: nothing to do


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--freeze", "backbone"), "Name that model"),
        (("--init-from", "BASE", "--freeze", "backbon"), "did you mean 'backbone'"),
        (("--init-from", "BASE", "--replay", "x"), "write DATASET=SHARE"),
        (("--init-from", "BASE", "--replay", "x=1.5"), "between 0 and 1"),
        (("--init-from", "BASE", "--replay", "nowhere=0.5"), "is not a dataset"),
        (("--init-from", "runs/nothing"), "does not exist"),
    ],
)
def test_mistakes(
    base: Path, new: Path, tmp_path: Path, plait: Plait, capsys: pytest.CaptureFixture[str], more: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    given = [str(base / "run") if value == "BASE" else value for value in more]
    assert plait("train", new, "-o", tmp_path / "run", "--recipe", recipe(tmp_path), *given) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_weight_of_what_is_not_there(
    new: Path, tmp_path: Path, plait: Plait, capsys: pytest.CaptureFixture[str]
) -> None:
    for weights in ({"colour": 0}, {"fr": 0.5}):
        assert plait("train", new, "-o", tmp_path / "run", "--recipe", recipe(tmp_path, weights=weights)) == 1
        assert "cannot be obeyed" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "run")
