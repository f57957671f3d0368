"""The page is one whole HTML file, escaped, with everything in it."""

import io
import json
import math
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from plait.core.errors import PlaitError
from plait.evaluation.findings import Confusion, Findings, Gallery, ReportItem, Verdict
from plait.evaluation.keys import Direction, MetricKey, Metrics
from plait.modalities.audio import spectrogram
from plait.reports.report import RunInfo, read_run, write_metrics, write_report

EVIL = "<script>alert('x')</script>&\"'>"


def make_image(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_audio(seed: int) -> ReportItem:
    buffer = io.BytesIO()
    wave = np.sin(np.arange(4000) * 0.1 * (1 + seed)) * 0.5
    soundfile.write(buffer, wave, 8000, format="WAV", subtype="PCM_16")
    mel = np.sin(np.arange(60)[:, None] / 6 + np.arange(64) / (4 + seed))
    return ReportItem(EVIL, image=spectrogram(mel), audio=buffer.getvalue(), right=seed % 3 > 0)


def figure(value: float, **more: float | None) -> dict[str, float | None]:
    return {"value": value, "stderr": 0.012, "chance": 0.1, "baseline": 0.93, "n": 360, **more}


METRICS = {
    "recognition/image-en/accuracy": figure(0.989),
    "recognition/image-en/train_accuracy": figure(0.998, chance=None, baseline=None),
    "recognition/image-en/f1": figure(0.985),
    "recognition/audio-zh/accuracy": figure(0.91),
    f"transcription/audio-{EVIL}/wer": figure(0.2, stderr=math.nan),
    "language/text/bits_per_byte": figure(2.31, chance=8, baseline=4.7),
    "retrieval/audio-image/p_at_10": figure(0.93, baseline=0.1),
    "drawing/en-image/judged_accuracy": figure(0.87, baseline=None),
    "drawing/en-image/frechet": figure(12.34, chance=None, baseline=2.2),
    "codec/image/psnr": figure(22.7, chance=None, baseline=None),
    "timing/evaluation/seconds": {"value": 31.2},
}


def findings() -> Findings:
    random = np.random.default_rng(0)
    labels = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", EVIL]
    counts = np.diag(random.integers(28, 38, 10)) + (random.random((10, 10)) < 0.08) * 3
    many = [f"class {i}" for i in range(100)]
    drawn = [
        (
            ReportItem(text=name),
            [
                ReportItem("made", make_image(9 * i + j), right=j != 3, beside=ReportItem("nearest", make_image(j)))
                for j in range(5)
            ],
        )
        for i, name in enumerate([*labels[:3], EVIL])
    ]
    return Findings(
        [
            Confusion("image → en", labels, counts, np.full(10, 0.98)),
            Confusion("many", many, np.eye(100, dtype=int) * 5 + np.eye(100, k=1, dtype=int)),
        ],
        [
            Gallery("Drawn", "Each beside its nearest training image.", drawn),
            Gallery("Spoken", "", [(ReportItem(text=labels[i]), [make_audio(i), make_audio(i + 1)]) for i in range(2)]),
            Gallery("Found", "", [(make_audio(3), [ReportItem("1", make_image(i), right=i < 3) for i in range(5)])]),
        ],
        [f"note {EVIL}"],
    )


class Checker(HTMLParser):
    """Counts tags, checks that they close, and keeps every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "rect", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_needs_no_network(tmp_path: Path) -> None:
    log = []
    for step in range(10, 810, 10):
        for split in ("train", "val") if step % 40 == 0 else ("train",):
            fall = math.exp(-step / 150)
            gap = 0.0004 * step if split == "val" else 0.0
            log.append(
                {"step": step, "split": split, "loss/text": 6 * fall + 0.2 + gap, "loss/image": 3 + 4 * fall + gap}
            )
            log[-1]["loss/contrastive:audio-image"] = 1.6 + 2 * fall
    run = RunInfo(
        f"digits {EVIL}",
        {"seed": 0, "size": "tiny", "steps": 800, "started": 1.7e9, "seconds": 61.0, "recipe": {"data": EVIL}},
        log,
        {"source": EVIL, "columns": {"image": "image", EVIL: "text"}, "counts": {"train": 10}, "warnings": [EVIL]},
        [{"file": EVIL, "line": 3, "reason": f"broken: {EVIL}"}, {"file": "b", "line": None, "reason": "empty"}],
        {"backbone": 1_000_000, "image codec": 300_000},
    )
    path = Path(os.environ.get("PLAIT_SHOW_REPORT", tmp_path / "report.html"))
    write_report(path, Metrics.read(METRICS), findings(), run)
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "script" not in checker.seen
    assert all(a.startswith(("data:image/png;base64,", "data:audio/wav;base64,", "#")) for a in checker.addresses)
    assert checker.seen.count("audio") == 5
    assert checker.seen.count("svg") >= 3
    for wanted in ("98.9 %", "±&nbsp;1.2", "broken", "gap", "image → en", "1,000,000", "nearest", "class 4"):
        assert wanted in page


def test_the_page_opens_on_the_verdict_then_shows_then_measures(tmp_path: Path) -> None:
    found = findings()
    found.verdict = Verdict("61 % against 57 %: worth it.", "plait export runs/x", better=True)
    metrics = {**METRICS, "recognition/image-a-b/accuracy": figure(0.5), "recognition/image-a-b/f1": figure(0.4)}
    run = RunInfo("x", manifest={"columns": {"image": "image", "a-b": "text"}})
    write_report(tmp_path / "report.html", Metrics.read(metrics, ["image", "a-b"]), found, run)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    order = [
        "61 % against 57 %",
        "Next: plait export runs/x",
        "<img",
        "<audio",
        'class="card"',
        "is a standard error",
    ]
    places = [page.index(words) for words in order]
    assert places == sorted(places) and page.count('class="card"') == 5
    assert "image → a-b" in page and 'class="verdict better"' in page


def test_a_page_of_nothing_and_figures_as_json(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", Metrics(), Findings(), RunInfo())
    assert "</html>" in (tmp_path / "report.html").read_text()
    write_metrics(tmp_path / "metrics.json", Metrics.read(METRICS))
    read = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert read["recognition/image-en/accuracy"] == METRICS["recognition/image-en/accuracy"]
    assert read["timing/evaluation/seconds"] == {
        "value": 31.2,
        "stderr": None,
        "chance": None,
        "baseline": None,
        "n": None,
    }
    assert read[f"transcription/audio-{EVIL}/wer"]["stderr"] is None


def test_a_run_that_was_killed_and_resumed_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"counts": {"train": 4}}')
    (tmp_path / "data" / "rejects.jsonl").write_text('{"file": "a", "line": null, "reason": "cut"}\n')
    (tmp_path / "run.json").write_text(json.dumps({"dataset": str(tmp_path / "data"), "seed": 1}))
    rows = [{"step": s, "split": "train", "loss/text": v} for s, v in ((10, 1.0), (20, 0.9), (20, 0.8))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 30, "sp')
    run = read_run(tmp_path)
    assert [(r["step"], r["loss/text"]) for r in run.log] == [(10, 1.0), (20, 0.8)]
    assert (run.metadata["seed"], len(run.rejects), run.manifest["counts"]) == (1, 1, {"train": 4})
    (tmp_path / "log.jsonl").write_text("{\n{}\n")
    with pytest.raises(PlaitError, match=r"log\.jsonl, line 1"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("recognition/image-label/accuracy", MetricKey("recognition", Direction("image", "label"), "accuracy")),
        ("recognition/image-a-b/f1_clean", MetricKey("recognition", Direction("image", "a-b"), "f1", clean=True)),
        ("recognition/image-label/f1[a/b-c]", MetricKey("recognition", Direction("image", "label"), "f1", "a/b-c")),
        ("codec/a/b/psnr", MetricKey("codec", Direction("a/b"), "psnr")),
    ],
)
def test_keys_of_metrics_are_read_as_they_are_written(text: str, key: MetricKey) -> None:
    """Columns and labels may hold the signs that part a key."""
    assert MetricKey.parse(text, ["image", "label", "a-b", "a/b"]) == key and str(key) == text
