"""The library is the product: what commands do, functions do, and data may be held in memory."""

from __future__ import annotations

import importlib
import inspect
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image
from typer.main import get_command

import plait
import plait.cli
from conftest import EN, RECIPE, make_image
from plait.console import app
from plait.core.rejects import RejectKind
from plait.inference.sampling import Options
from plait.training.callbacks import Callback, EndEvent, StartEvent, StepEvent, ValidationEvent

# Command -> the function or method that does it, and its options that only say how to print or where to write.
TWINS = {
    "prepare": "plait:prepare",
    "train": "plait:train",
    "evaluate": "plait:evaluate",
    "tune": "plait:tune",
    "transfer": "plait:transfer",
    "plan": "plait:plan",
    "demo": "plait:demo",
    "export": "plait:export",
    "generate": "plait:Model.generate",
    "classify": "plait:Model.classify",
    "decide": "plait:Model.decide",
    "describe": "plait:Model.describe",
    "caption": "plait:Model.describe",
    "transcribe": "plait:Model.transcribe",
    "draw": "plait:Model.draw",
    "speak": "plait:Model.speak",
    "embed": "plait:Model.embed",
    "explain": "plait:Model.explain",
    "recommend": "plait.recommend.model:RecommendationModel.recommend",
    "similar": "plait.recommend.model:RecommendationModel.similar",
    "search": "plait:Index.search",
    "index add": "plait:Index.add",
    "index delete": "plait:Index.delete",
    "index compact": "plait:Index.compact",
    "index verify": "plait:Index.verify",
    "checkpoint list": "plait:Run.checkpoints",
    "checkpoint verify": "plait:Run.checkpoints",
    "chat": "plait.chat.session:Session.say",
    "reply": "plait.chat.replies:open_replies",
    "serve": "plait.server.app:serve",
    "mcp": "plait.server.mcp:build_server",
    "example": "plait.data.examples:write_example",
    "models": "plait:models",
    "recipes": "plait.core.recipes:packaged_recipes",
    "studio": "plait.studio.app:serve",
    "key": "plait.server.limits:new_key",
    "doctor": "plait.doctor:check_folder",
    "sizes": "plait.training.build:size_table",
}
# Of these every option must be an argument of the function.
WHOLE = ("models", "prepare", "train", "evaluate", "tune", "transfer", "plan", "demo", "export", "generate", "classify")
SHOWS = {"as_json", "out_folder", "run", "study", "device", "model", "files", "inputs", "prompt", "source", "dataset"}
SHOWS |= {"all_figures"}
OTHER = {
    ("train", "more"),  # `plait.Run.more`
    ("train", "processes"),  # starts the program several times, as torchrun does
    ("generate", "precision"), ("generate", "adapter"), ("classify", "precision"),  # arguments of `plait.load`
    ("prepare", "several"), ("prepare", "number"),  # short for entries of `map`
    ("prepare", "estimate"),
    ("evaluate", "labels"), ("evaluate", "column"),  # of `plait.label_review`
    ("classify", "table"), ("classify", "xmp"), ("classify", "overwrite"), ("classify", "workers"),  # `plait.tabulate`
}  # fmt: skip


def _commands() -> Iterator[tuple[str, Any]]:
    group = get_command(app)
    for name, command in group.commands.items():
        for inner, part in getattr(command, "commands", {}).items():
            yield f"{name} {inner}", part
        if not hasattr(command, "commands"):
            yield name, command


def _twin(name: str) -> Any:
    module, _, path = TWINS[name].partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name,command", list(_commands()), ids=[name for name, _ in _commands()])
def test_each_command_has_its_twin(name: str, command: Any) -> None:
    assert name in TWINS, f"plait {name} has no function in the library"
    arguments = set(inspect.signature(_twin(name)).parameters)
    if "options" in arguments:  # `**options` of verbs that generate
        arguments |= Options.__annotations__.keys()
    if name in WHOLE:
        options = {parameter.name.rstrip("_") for parameter in command.params} - SHOWS
        options -= {option for owner, option in OTHER if owner == name}
        assert options <= arguments, options - arguments


@pytest.mark.parametrize("name,command", list(_commands()), ids=[name for name, _ in _commands()])
def test_each_option_is_described(name: str, command: Any) -> None:
    assert command.help and all(getattr(parameter, "help", None) for parameter in command.params), name


def test_all_names_are_there() -> None:
    assert all(getattr(plait, name) is not None for name in plait.__all__)
    for name in ("tune", "plan", "transfer", "train", "evaluate"):
        assert inspect.isfunction(getattr(plait, name))  # not a package of that name, whatever was imported before


# --- data held in memory -----------------------------------------------------------------------------------------


def _records(n: int = 24) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"picture": make_image(i % 4, rng), "label": EN[i % 4], "number": i} for i in range(n)]


def _media(dataset: plait.Dataset, column: str) -> list[bytes]:
    return sorted(record.parts[column] for record in dataset.iterate(columns=[column]))  # type: ignore[type-var]


def _pixels(dataset: plait.Dataset) -> list[bytes]:
    return sorted(Image.open(io.BytesIO(data)).convert("RGB").tobytes() for data in _media(dataset, "picture"))


def test_records_frames_and_data_sets_are_the_same(tmp_path: Path) -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    records = _records()
    first = plait.prepare(records, tmp_path / "list", workers=0)
    second = plait.prepare(pandas.DataFrame(records), tmp_path / "frame", workers=0)
    third = plait.prepare(datasets.Dataset.from_list(records), tmp_path / "set", workers=0)
    assert first.columns == second.columns == {"picture": "image", "label": "text", "number": "text"}
    assert first.columns == third.columns
    assert _media(first, "picture") == _media(second, "picture")
    assert _pixels(first) == _pixels(third)  # who encodes a PNG otherwise keeps its pixels
    assert sorted(map(str, first.texts("label"))) == sorted(map(str, third.texts("label"))) == sorted(EN * 6)
    assert not list(tmp_path.glob(".*")) and sum(first.counts.values()) == 24
    frame = first.to_pandas("train")
    assert list(frame.columns) == ["split", "label", "number", "source"] and len(frame) == first.counts["train"]
    assert "picture" in first._repr_html_() and first.report.is_file() and first.rejects == []


def test_arrays_waves_paths_and_splits(tmp_path: Path) -> None:
    wave = np.sin(np.arange(1600) / 5).astype(np.float32) * 0.5
    soundfile.write(tmp_path / "a.wav", wave * 0.25, 8000)
    clips = [(wave, 8000), (8000, (wave * 0.5 * 32768).astype(np.int16)), tmp_path / "a.wav", "missing.wav",
             {"array": wave * 0.75, "sampling_rate": 8000}]  # fmt: skip
    rows = [{"clip": clip, "says": str(i)} for i, clip in enumerate(clips)]
    made = plait.prepare(
        {"train": rows, "test": [{"clip": (wave * 0.1, 8000), "says": "x"}]}, tmp_path / "d", workers=0
    )
    assert made.columns == {"clip": "audio", "says": "text"} and made.counts["test"] == 1
    peaks = {r.parts["says"]: np.abs(soundfile.read(io.BytesIO(r.parts["clip"]))[0]).max() for r in made.iterate()}  # type: ignore[arg-type]
    expected = {"0": 0.5, "1": 0.25, "2": 0.125, "4": 0.375, "x": 0.05}
    assert {key: pytest.approx(value, abs=1e-3) for key, value in expected.items()} == peaks
    assert [row.reason for row in made.rejects] == ["the file 'missing.wav' does not exist"]


def test_rejects_are_counted_by_their_kind(tmp_path: Path) -> None:
    for n in range(3):
        Image.fromarray(np.full((8, 8, 3), 40 * n, np.uint8)).save(tmp_path / f"{n}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    (tmp_path / "noise.png").write_bytes(b"no image at all")
    (tmp_path / "none.png").touch()
    (tmp_path / "x.csv").write_text("image,caption\n0.png,a\n1.png,b\n2.png,c\ncut.png,d\nnoise.png,e\nno.png,f\n")
    dataset = plait.prepare(tmp_path, tmp_path.parent / "data", workers=0)
    kinds = RejectKind.DAMAGED, RejectKind.UNKNOWN_FORMAT, RejectKind.EMPTY, RejectKind.MISSING
    assert Counter(row.kind for row in dataset.rejects) == Counter(kinds)
    written = [json.loads(line) for line in (tmp_path.parent / "data/rejects.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in written} == {"damaged", "unknown_format", "empty", "missing"}
    assert all(kind.label in dataset.manifest.warnings[-1] for kind in kinds[:3])


def test_texts_and_conversations(tmp_path: Path) -> None:
    texts = plait.prepare([f"text number {i}" for i in range(9)], tmp_path / "texts", workers=0)
    assert texts.columns == {"text": "text"}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    chats = [{"messages": [*turns, {"role": "user", "content": str(i)}]} for i in range(9)]
    assert plait.prepare(chats, tmp_path / "chats", workers=0).manifest.chats == ["messages"]


@pytest.mark.parametrize(
    "source,words",
    [
        ([], "empty"),
        ([3], "Record 0 is of type int"),
        (3, "Data of type int"),
        ([{"a": np.zeros((2, 5))}, {"a": np.zeros(3)}], "Record 1, column 'a': An array of shape (3,) is not an image"),
        ([{"a": np.full((4, 4), 7.5)}], "Give 0 to 1 as floats"),
        ([{"a": (np.zeros(9), 0)}], "A rate of 0 Hz"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path: Path, source: Any, words: str) -> None:
    with pytest.raises(plait.PlaitError, match=None) as error:
        plait.prepare(source, tmp_path / "d", workers=0)
    assert words in str(error.value)


# --- training ----------------------------------------------------------------------------------------------------


class Recorder(Callback):
    def __init__(self, stop_at: int = -1) -> None:
        self.events: list[Any] = []
        self.stop_at = stop_at

    def on_start(self, event: StartEvent) -> None:
        self.events.append(event)

    def on_step(self, event: StepEvent) -> None:
        self.events.append(event)
        if event.step == self.stop_at:
            raise KeyboardInterrupt

    def on_validation(self, event: ValidationEvent) -> None:
        self.events.append(event)

    def on_end(self, event: EndEvent) -> None:
        self.events.append(event)


def test_train_stop_resume_evaluate(tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPE)
    recipe["training"] |= {"steps": 20, "codec_steps": 4, "batch_size": 8, "validations": 2}
    options: dict[str, Any] = {"recipe": recipe, "device": "cpu", "progress": False}
    records = [{**record, "number": None} for record in _records(60)]
    stopped = Recorder(stop_at=12)
    with pytest.raises(KeyboardInterrupt):
        plait.train(records, tmp_path / "run", callbacks=[stopped], **options)
    assert isinstance(stopped.events[-1], EndEvent) and not stopped.events[-1].finished
    run = plait.Run(tmp_path / "run")
    assert not run.finished and run.dataset.columns == {"picture": "image", "label": "text"}
    resumed = Recorder()
    run = run.resume(callbacks=[resumed], progress=False)
    start, *middle, end = resumed.events
    assert (start.step, end.step, end.finished, run.finished) == (12, 20, True, True)
    assert [e.step for e in middle if isinstance(e, StepEvent)] == list(range(13, 21))
    assert [e.step for e in stopped.events if isinstance(e, ValidationEvent)] == [10]
    steps, losses = run.history.losses("text", "val")
    assert steps == [10, 20] and all(np.isfinite(losses)) and run.best.is_dir() and run.report.is_file()
    assert run.checkpoints()[0]["step"] == 20 and "finished" in repr(run) and "val loss" in run._repr_html_()

    once = plait.train(run.dataset, tmp_path / "once", **options)  # neither stopped nor resumed
    weights = "model.safetensors"
    assert (once.last / weights).read_bytes() == (run.last / weights).read_bytes()

    result = plait.evaluate(run, reference_seconds=0.2, progress=False)
    name = "recognition/picture-label/accuracy"
    assert result[name]._asdict() == json.loads((run.folder / "metrics.json").read_text())[name]
    assert 0 <= float(result[name]) <= 1 and name in result._repr_html_() and result.report.is_file()
    answer = run.model("cpu").classify(records[0]["picture"])
    assert answer[0].label in EN and answer[0].probability == pytest.approx(max(p for _, p in answer))


def test_unknown_arguments_and_callbacks(tmp_path: Path) -> None:
    with pytest.raises(plait.PlaitError, match="did you mean 'steps'"):
        plait.train("nothing", tmp_path / "run", recipe={"training": {"step": 3}})
    with pytest.raises(plait.PlaitError, match="is not a run"):
        plait.Run(tmp_path)
