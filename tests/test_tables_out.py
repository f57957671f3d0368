"""Folders and tables in, tables out: what the commands write, what they go on with, what they leave alone."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import plait as api
from conftest import make_image, tone
from plait.library.sidecars import srt
from plait.library.tables import TableQuery, tabulate

Plait = Callable[..., int]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images and clips in sub-folders, one of each damaged."""
    rng = np.random.default_rng(1)
    for number in range(6):
        place = tmp_path / "in" / f"day {number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        make_image(number % 4, rng).save(place / f"{number}.png")
        (place / f"{number}.wav").write_bytes(tone(number % 4, rng))
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"no image" * 9)
    return tmp_path / "in"


def rows_of(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_is_classified(trained: Path, folder: Path, plait: Plait, capsys: Any) -> None:
    out = folder.parent / "a.csv"
    assert plait("classify", trained, folder, "-o", out, "--column", "en", "--xmp") == 0
    told = capsys.readouterr()
    assert "13 rows" in told.out and "1 could not be answered" in told.err
    model, rows = api.load(trained), rows_of(out)
    assert len(rows) == len({row["file"] for row in rows}) == 13
    for row in rows:
        if "broken" in row["file"]:
            assert row["error"] and not row["label_1"]
            continue
        expected = model.classify(Path(row["file"]), column="en", top=3)
        assert [row[f"label_{place}"] for place in (1, 2, 3)] == [one.label for one in expected]
        assert float(row["probability_1"]) == pytest.approx(expected[0].probability, abs=1e-5)
        assert row["none_of_these"] == str(expected.none_of_these).lower()
        sidecar = Path(f"{row['file']}.xmp")
        assert sidecar.exists() != expected.none_of_these
        if not expected.none_of_these:
            assert f"<rdf:li>{expected[0].label}</rdf:li>" in sidecar.read_text(encoding="utf-8")
    assert not list(folder.parent.glob(".*journal"))
    assert plait("classify", trained, folder, "-o", out) == 1 and "--overwrite" in capsys.readouterr().err
    assert plait("classify", trained, folder, "-o", folder.parent / "a.txt") == 1


def test_rows_of_a_table_keep_what_stands_beside_them(trained: Path, tmp_path: Path, plait: Plait, capsys: Any) -> None:
    table, out = tmp_path / "in.csv", tmp_path / "out.csv"
    table.write_text(
        "id,caption,from\n7,two\nlines\n,Ann\n".replace("two\nlines\n", '"two\nlines"') + "8,,Bo\n9,one,Cy\n"
    )
    assert plait("classify", trained, table) == 1 and "-o answers.csv" in capsys.readouterr().err
    assert plait("embed", trained, table, "-o", out, "--input", "caption") == 0
    rows = rows_of(out)
    assert [(row["id"], row["from"], row["text"]) for row in rows] == [
        ("7", "Ann", "two\nlines"), ("8", "", ""), ("9", "Cy", "one")
    ]  # fmt: skip
    assert [bool(row["error"]) for row in rows] == [False, True, False] and "caption" in rows[1]["error"]
    assert plait("prepare", table, "-o", tmp_path / "data", "--workers", 0) == 0
    assert plait("embed", trained, tmp_path / "data", "-o", tmp_path / "again.csv", "--input", "caption") == 0
    assert sum(bool(row["error"]) for row in rows_of(tmp_path / "again.csv")) == 1


def test_other_verbs_and_formats(trained: Path, folder: Path, plait: Plait, capsys: Any) -> None:
    base, model = folder.parent, api.load(trained)
    assert plait("embed", trained, folder, "a text", "-o", base / "e.parquet") == 0
    table = pq.read_table(base / "e.parquet").to_pylist()
    assert table[-1]["text"] == "a text" and len(table) == 14
    np.testing.assert_allclose(table[-1]["embedding"], model.embed("a text"), atol=1e-5)
    assert plait("embed", trained, folder / "day 0", "-o", base / "e.csv") == 0
    assert f"embedding_{model.embed('a').shape[0] - 1}" in rows_of(base / "e.csv")[0]
    images = sorted(folder.rglob("day*/*.png"))
    assert plait("caption", trained, *images, "-o", base / "c.jsonl", "--column", "zh") == 0
    lines = [json.loads(line) for line in (base / "c.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["caption"] for one in lines] == [model.describe(path, column="zh") for path in images]
    clips = sorted(folder.rglob("*.wav"))
    assert plait("transcribe", trained, *clips, "-o", base / "t.jsonl", "--column", "en") == 0
    assert plait("transcribe", trained, *clips, "-o", base / "s.jsonl", "--srt") == 0
    made = [json.loads(line) for line in (base / "s.jsonl").read_text(encoding="utf-8").splitlines()]
    for path, one in zip(clips, made, strict=True):
        assert one["transcript"] == " ".join(segment.text.strip() for segment in model.segments(path))
        assert path.with_suffix(".srt").exists() == bool(srt(one))
    assert srt({"segments": [{"start": 0.5, "end": 3661.25, "text": "so"}, {"start": 4, "end": 5, "text": ""}]}) == (
        "1\n00:00:00,500 --> 01:01:01,250\nso\n"
    )


def test_rows_of_a_table(plait: Plait, tmp_path: Path) -> None:
    labelled = "said,wish\n" + "".join(f"number {i} {('tea', 'milk')[i % 2]} please,{('tea', 'milk')[i % 2]}\n"
                                       for i in range(60))  # fmt: skip
    (tmp_path / "known.csv").write_text(labelled)
    (tmp_path / "new.csv").write_text('id,comment\n1,"number 71, milk please"\n2,number 72 tea please\n')
    recipe = {"model": {"backbone": {"width": 32, "layers": 1, "heads": 2, "context": 64}}}
    run = api.train(tmp_path / "known.csv", tmp_path / "run", recipe=recipe, task="recognise", steps=5, progress=False)
    found = tabulate(run.model(), [tmp_path / "new.csv"], tmp_path / "a.jsonl", TableQuery("classify", top=1))
    lines = [json.loads(line) for line in found.path.read_text().splitlines()]
    said = [(one["text"], one["label_1"]) for one in lines]
    assert said == [("number 71, milk please", "milk"), ("number 72 tea please", "tea")]


def test_a_call_that_was_killed_goes_on(trained: Path, folder: Path, plait: Plait, capsys: Any) -> None:
    """Killed in its middle, the table becomes what it would have been, and nothing is asked twice."""
    rng = np.random.default_rng(2)
    for number in range(300):
        make_image(number % 4, rng).save(folder / f"more{number}.png")
    out = folder.parent / "k.csv"
    journal = folder.parent / ".k.csv.journal"
    code = "import sys; from plait.cli import main; main()"
    command = [sys.executable, "-c", code, "classify", str(trained), str(folder), "-o", str(out), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_bytes().count(b"\n") > 20):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with journal.open("ab") as file:
        file.write(b'{"id": "cut')  # what a kill may leave
    before = journal.read_bytes().count(b"\n") - 1
    assert plait("classify", trained, folder, "-o", out, "--top", 1) == 1  # which asks something else
    assert "asked something else" in " ".join(capsys.readouterr().err.split())
    assert plait("classify", trained, folder, "-o", out) == 0
    assert f"{before} of them by an earlier call" in capsys.readouterr().out
    fresh = folder.parent / "f.csv"
    assert plait("classify", trained, folder, "-o", fresh) == 0
    assert sorted(map(str, rows_of(out))) == sorted(map(str, rows_of(fresh)))


def test_sidecars_of_others_are_left_alone(trained: Path, folder: Path, plait: Plait, capsys: Any) -> None:
    sidecar = folder / "day 0" / "0.png.xmp"
    sidecar.write_text("<x:xmpmeta>mine</x:xmpmeta>")
    assert plait("describe", trained, folder / "day 0" / "0.png", "-o", folder.parent / "x.csv", "--xmp") == 0
    assert sidecar.read_text() == "<x:xmpmeta>mine</x:xmpmeta>" and "1 sidecars of other" in capsys.readouterr().err


def test_labels_are_reviewed(plait: Plait, tmp_path: Path, capsys: Any) -> None:
    """Planted wrong labels are listed before all others; of what has no label, the most doubtful first."""
    rng, words = np.random.default_rng(3), {"tea": "leaf pot steep cup", "milk": "cow cream churn dairy"}
    rows, wrong = [], set()
    for number in range(160):
        true = ("tea", "milk")[number % 2]
        text = " ".join(rng.choice(words[true].split(), 3)) + f" {number}"
        label = {"tea": "milk", "milk": "tea"}[true] if number % 27 == 5 else true
        wrong |= {text} if label != true and number % 10 != 9 else set()
        rows.append(f"{text},{'' if number % 10 == 9 else label}")
    rows.append("leaf cow,")  # belongs to both
    (tmp_path / "in.csv").write_text("said,wish\n" + "\n".join(rows) + "\n")
    recipe = {"model": {"backbone": {"width": 32, "layers": 1, "heads": 2, "context": 64}}}
    run = api.train(tmp_path / "in.csv", tmp_path / "run", recipe=recipe, task="recognise", steps=5, progress=False)
    review = api.label_review(run, most=20)
    texts = run.dataset.texts("said")
    listed = [texts[one.record] for one in review.suspects if one.likely]
    assert set(listed) & wrong == {text for text in wrong if text in texts} and len(listed) <= len(wrong) + 3
    assert texts[review.candidates[0].record] == "leaf cow" and review.unlabelled == 17
    assert plait("evaluate", tmp_path / "run", "--labels") == 0
    assert f"{review.likely} of {review.labelled} labels" in capsys.readouterr().out
    assert "leaf cow" in (tmp_path / "run" / "labels.html").read_text(encoding="utf-8")
    table = rows_of(tmp_path / "run" / "labels.csv")
    assert {row["list"] for row in table} == {"suspect", "candidate"}
