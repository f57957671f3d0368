"""Auto-reply: right answers with their sources, silence for what was never asked."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import plait as package
from plait.chat.replies import Replies, same
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset

Plait = Callable[..., int]
THINGS = {"a tent": "Tents are at the back.", "my parcel": "See the link.", "the hours": "From nine to six.",
          "a voucher": "On the last page.", "my size": "Look at the table."}  # fmt: skip
FRAMES = [
    "What about {x}?",
    "I ask for {x}.",
    "hello, {x}?",
    "Tell me of {x}.",
    "Now {x}, please.",
    "{x}, how?",
    "Is {x} there?",
    "I need {x}.",
    "where is {x}",
    "Can I have {x} now?",
    "Do you have {x}?",
    "So {x} then.",
]
NEVER = ["zebras jump", "quiet volcano", "xylophone", "foggy jungle", "jazz club", "wizard hoaxes"]
RECIPE = """
model: {backbone: {width: 48, layers: 2, heads: 4, context: 64}, text: {vocabulary: 280}}
training: {steps: 150, batch_size: 16, learning_rate: 4.0e-3, weights: {question: 0}, validations: 3}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, plait: Plait) -> Path:
    place = tmp_path_factory.mktemp("replies")
    rows = []
    for thing, reply in THINGS.items():
        for n, frame in enumerate(FRAMES):
            split = "test" if n == 5 else "val" if n > 8 else "train"
            rows.append({"question": frame.format(x=thing), "reply": reply, "split": split})
    rows += [{"question": text, "reply": "", "split": "val" if n % 2 else "test"} for n, text in enumerate(NEVER)]
    (place / "files").mkdir()
    with (place / "files" / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (place / "recipe.yaml").write_text(RECIPE)
    assert plait("prepare", place / "files", "-o", place / "data", "--workers", 0) == 0
    assert plait("train", place / "data", "-o", place / "run", "--recipe", place / "recipe.yaml") == 0
    return place / "run"


def test_answers_and_silence(run: Path, plait: Plait, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [FRAMES[5].format(x=thing) for thing in THINGS]
    capsys.readouterr()
    assert plait("reply", run, *asked, *NEVER[::2], "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [same(one["reply"] or "", reply) for one, reply in zip(found, THINGS.values(), strict=False)]
    silent = [one["reply"] is None for one in found[len(asked) :]]
    assert sum(right) >= 4 and sum(silent) >= 2
    assert all(len(one["sources"]) == 3 and 0 <= one["confidence"] <= 1 for one in found)
    nearest = found[0]["sources"][0]
    assert nearest["reply"] == THINGS["a tent"] and 0 < nearest["nearness"] <= 1
    fitted = json.loads((run / "replies.json").read_text())
    assert fitted["confidence"]["measured"] == 3 and fitted["pairs"] == 40

    # Fitted once; the least confidence can be set by hand, and messages may come through a pipe.
    (run / "replies.json").write_text(json.dumps({**fitted, "confidence": {**fitted["confidence"], "threshold": 0.0}}))
    assert plait("reply", run, NEVER[0], "--json") == 0
    assert json.loads(capsys.readouterr().out)["threshold"] == 0
    assert plait("reply", run, asked[0], "--least", 1) == 0
    assert capsys.readouterr().out.startswith("(silence)")
    (run / "replies.json").unlink()


def test_a_reply_that_is_taken_away_counts_as_never_given(run: Path) -> None:
    replies = Replies(package.load(run), Dataset.open(run.parent / "data"))
    assert (replies.question, replies.reply) == ("question", "reply")
    known = replies._evidence("What about a tent?")
    gone = replies.place[THINGS["a tent"]]
    whole, without = (replies._features(known, place) for place in (-1, gone))
    assert whole[0] == pytest.approx(1.0) and without[0] < 0.8 and without[1] < whole[1]
    assert np.isclose(known.near.max(), 1.0) and len(known.places) == len(THINGS)


def test_mistakes(run: Path, plait: Plait, capsys: pytest.CaptureFixture[str]) -> None:
    model = package.load(run)
    with pytest.raises(PlaitError, match=r"weights\.question: 0"):
        model.generate("See the link.", to="question")
    for command, message in [
        (("reply", run, "hi", "--question", "colour"), "no 'colour' among question, reply"),
        (("reply", run / "checkpoints" / "best", "hi"), "Name them with --data"),
        (("reply", run, "hi", "--data", run), "is not a dataset"),
    ]:
        assert plait(*command) == 1
        assert message in " ".join(capsys.readouterr().err.split())
