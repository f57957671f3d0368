"""Checkpoints: kept by a rule, verified, fallen back from, gone on from after changes; and the guards of training."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import RECIPE, make_image
from plait.core.device import threads
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.model import checkpoint as checkpoints
from plait.model.cross_entropy import negative_log_likelihood
from plait.training.checkpointing import Position, Saver
from plait.training.distributed import Group
from plait.training.log import Log
from plait.training.optimizer import WeightAverage, make_optimizer

Plait = Callable[..., int]
MODEL = {**yaml.safe_load(RECIPE)["model"], "backbone": {"width": 32, "layers": 1, "heads": 2, "dropout": 0.1}}
TRAINING = {
    "steps": 24, "codec_steps": 3, "batch_size": 8, "validations": 4, "save_every": 5, "keep": 1, "keep_every": 10,
    "ema": 0.9, "label_smoothing": 0.1, "log_records": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(world: Path, plait: Plait, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `recipe.yaml` and a finished `run` of few steps."""
    place = tmp_path_factory.mktemp("small")
    assert plait("prepare", world, "-o", place / "data", "--workers", 0) == 0
    (place / "recipe.yaml").write_text(yaml.safe_dump({"model": MODEL, "training": TRAINING}))
    assert plait("train", place / "data", "-o", place / "run", "--recipe", place / "recipe.yaml") == 0
    return place


@pytest.fixture
def run(small: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be spoilt."""
    return Path(shutil.copytree(small / "run", tmp_path / "run", symlinks=True))


def command(small: Path, run: Path, *more: object) -> tuple[object, ...]:
    return ("train", small / "data", "-o", run, "--recipe", small / "recipe.yaml", *more)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_what_is_kept(small: Path) -> None:
    folder = small / "run" / "checkpoints"
    best = json.loads((folder / "last" / "training_state.json").read_text())["best_step"]
    assert set(checkpoints.series(folder)) == {10, 20, 24, best}
    assert (folder / "last").resolve().name == "step-000024" and (folder / "best").resolve().name == f"step-{best:06d}"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert all(not checkpoints.verify(path) for path in folder.iterdir())


def test_what_is_used_is_the_average(small: Path) -> None:
    last = small / "run" / "checkpoints" / "last"
    used, state = load_file(last / "model.safetensors"), load_file(last / "training_state.safetensors")
    apart = [name for name in used if f"raw.{name}" in state and not torch.equal(used[name], state[f"raw.{name}"])]
    assert "backbone.blocks.0.qkv.weight" in apart


def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_used(
    small: Path, run: Path, plait: Plait, capsys: pytest.CaptureFixture[str]
) -> None:
    import plait as package

    assert plait("checkpoint", "verify", run) == 0
    newest = run / "checkpoints" / "step-000024"
    flip(newest / "training_state.safetensors")
    assert plait("checkpoint", "verify", run) == 1
    told = capsys.readouterr().out
    assert "step 24: damaged" in told and "step-000024/training_state.safetensors was altered" in told
    assert plait("checkpoint", "list", run) == 0
    assert re.search(r"24 .*damaged", capsys.readouterr().out)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({name: v for name, v in facts.items() if name != "finished"}))
    assert plait(*command(small, run)) == 0
    told = capsys.readouterr().err
    assert "step-000024/training_state.safetensors was altered" in told and "going on from step 20" in told
    for file in ("records.jsonl", "checkpoints/last/model.safetensors", "checkpoints/last/training_state.safetensors"):
        assert (run / file).read_bytes() == (small / "run" / file).read_bytes(), file
    flip((run / "checkpoints" / "best").resolve() / "model.safetensors")
    with pytest.warns(UserWarning, match="model.safetensors was altered"):
        package.load(run)
    for path in checkpoints.series(run / "checkpoints").values():
        (path / "manifest.json").unlink()
    (run / "run.json").write_text(json.dumps({name: v for name, v in facts.items() if name != "finished"}))
    assert plait(*command(small, run)) == 1
    assert "is whole" in capsys.readouterr().err


def test_changes_are_refused_until_allowed(
    small: Path, run: Path, plait: Plait, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plait(*command(small, run, "--save-every", 7)) == 0  # when to save is free
    assert plait(*command(small, run, "--learning-rate", 1e-3)) == 1
    assert "learning rate was not given, now 0.001" in capsys.readouterr().err
    assert plait(*command(small, run, "--size", "small", "--allow-changes")) == 1
    assert "size was tiny, now small" in capsys.readouterr().err
    assert plait(*command(small, run, "--learning-rate", 1e-3, "--steps", 26, "--allow-changes")) == 0
    assert "going on from step 24" in capsys.readouterr().err
    rows = [json.loads(line)["step"] for line in (run / "records.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 27))
    assert "training.learning_rate: was None, now 0.001" in json.loads((run / "run.json").read_text())["changes"][0]


def test_other_arithmetic_is_refused_until_allowed(
    small: Path, run: Path, plait: Plait, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((run / "run.json").read_text())
    assert facts["threads"] == threads() and facts["computing"]["instructions"] and facts["computing"]["blocks"]
    del facts["finished"]
    facts["computing"]["instructions"] = "another"
    (run / "run.json").write_text(json.dumps(facts))
    assert plait(*command(small, run)) == 1
    assert "instructions: was another, now" in capsys.readouterr().err
    assert plait(*command(small, run, "--allow-changes")) == 0
    assert json.loads((run / "run.json").read_text())["computing"]["instructions"] != "another"


def test_data_that_was_altered_is_refused(
    small: Path, plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(small / "data", tmp_path / "data"))
    shard = next(iter(data.glob("*.parquet")))
    flip(shard)
    assert plait("train", data, "-o", tmp_path / "run", "--recipe", small / "recipe.yaml") == 1
    assert f"{shard.name} is damaged" in capsys.readouterr().err


def test_a_save_that_fails_is_an_error(small: Path, tmp_path: Path) -> None:
    whole = checkpoints.load(small / "run" / "checkpoints" / "last")
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    saver = Saver(tmp_path / "checkpoints", 2, None, Group())
    saver.save(whole, make_optimizer([whole.model], 1e-3, 0.0, (0.9, 0.98)), None, Position(step=1))
    with pytest.raises(PlaitError, match=r"Cannot write .*checkpoints/step-000001"):
        saver.wait()


def test_the_log_goes_back_with_the_run(tmp_path: Path) -> None:
    rows = [{"step": 1, "split": "train"}, {"step": 2, "split": "train"}, {"step": 2, "split": "val"}]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 3, "split": "train"}]) + '{"step": 4, "spl'
    (tmp_path / "log.jsonl").write_text(text)
    log = Log(tmp_path, step=2, validated=1)
    log.write(3, "train", {"text": 1.5})
    log.close()
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept[:2] == rows[:2] and [row["step"] for row in kept] == [1, 2, 3] and kept[2]["loss/text"] == 1.5


def test_the_average_is_what_it_says() -> None:
    model = torch.nn.Linear(3, 2)
    average = WeightAverage(model, 0.5)
    expected = model.weight.detach().clone().double()
    for step in range(8):
        with torch.no_grad():
            model.weight += torch.randn(2, 3)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    own = model.weight.detach().clone()
    with average.used():
        assert torch.allclose(model.weight.double(), expected, atol=1e-5)
    assert torch.equal(model.weight, own)


def test_label_smoothing_spreads_a_share_of_the_target() -> None:
    hidden, rows, targets = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 3, 6, 2, 1])
    log = (hidden @ rows.t()).log_softmax(-1)
    expected = -(0.9 * log.gather(1, targets[:, None])[:, 0] + 0.1 * log.mean(-1))
    assert torch.allclose(negative_log_likelihood(hidden, rows, targets, 0.1), expected, atol=1e-5)


def test_a_loss_that_explodes_stops_the_run(
    small: Path, plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plait(*command(small, tmp_path / "run", "--learning-rate", 1e4)) == 1
    told = capsys.readouterr().err
    assert re.search(r"(exploded|not finite).* step \d+.*metadata.jsonl:\d+", told) and "learning_rate" in told


@pytest.mark.slow
def test_faults_in_short() -> None:
    """A few of each fault of `make soak`, in processes of their own."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("soak.py"), "--short"], capture_output=True, text=True, check=False
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert re.findall(r"^(R\d+) (?:skipped|(\d+)/\2) ", told, re.MULTILINE), told


def test_records_that_are_added_are_the_only_ones_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the longer data is to the byte what it is from nothing; only the new is tokenised and decoded."""
    from plait.core.config import SIZES
    from plait.modalities.image import Image, ImageSettings
    from plait.modalities.text import Text
    from plait.training.split import load_split

    def files(numbers: range) -> Path:
        rng, rows = np.random.default_rng(1), []
        for n in range(numbers.stop):
            image = make_image(n % 4, rng)
            if n in numbers:
                (tmp_path / "in").mkdir(exist_ok=True)
                image.save(tmp_path / "in" / f"{n}.png")
            rows.append({"file_name": f"{n}.png", "said": f"words of {n}", "split": "train"})
        (tmp_path / "in" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "in"

    prepare(files(range(30)), tmp_path / "first", near_duplicates=False)
    prepare(files(range(30, 42)), tmp_path / "more", near_duplicates=False)
    text = Text.train(["words of 0 1 2 3 4 5 6 7 8 9"] * 3, 300)
    settings = ImageSettings.of_size(SIZES["tiny"], {})
    media = {"image": Image(settings, 32)}
    seen: list[object] = []
    encode, windows = Text.encode_batch, Image.windows
    monkeypatch.setattr(Text, "encode_batch", lambda self, texts: seen.extend(texts) or encode(self, texts))
    monkeypatch.setattr(Image, "windows", lambda self, value: seen.append(value) or windows(self, value))

    def cached(data: str, cache: str) -> tuple[set[str], dict[str, bytes]]:
        seen.clear()
        split = load_split(Dataset.open(tmp_path / data), "train", text, media, tmp_path / cache, 64)
        return set(split.ids), {file.name: file.read_bytes() for file in sorted((tmp_path / cache).iterdir())}

    before, _ = cached("first", "grown")
    assert len(seen) == 2 * len(before) > 40
    after, grown = cached("more", "grown")
    new = len(after - before)
    assert before < after and sum(isinstance(one, str) for one in seen) == new > 5
    assert 0 < sum(isinstance(one, bytes) for one in seen) <= new  # some images are equal to earlier ones
    assert grown == cached("more", "anew")[1] and "earlier-train" not in grown
    text.tokenizer = Text.train(["other words"], 290).tokenizer
    cached("more", "grown")
    assert len(seen) == len(after)  # another tokenizer: texts alone
